"""LangChain with a running server, as for any library that accepts a base URL for OpenAI's API.

make serve                                   # in another terminal
pip install langchain-openai
python examples/langchain_client.py [URL]
"""

from __future__ import annotations

import sys

from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"


class River(BaseModel):
    """A river."""

    name: str = Field(max_length=30)
    kilometers: int = Field(ge=1, le=7000)


def main() -> None:
    """Requests an answer, a stream, and a structured answer."""
    model = ChatOpenAI(
        base_url=f"{URL}/v1", api_key="none", model="chat", temperature=0, max_tokens=80
    )
    print(model.invoke("Name three rivers.").content)
    for part in model.stream("Count to five."):
        print(part.content, end="", flush=True)
    print()
    print(model.with_structured_output(River, method="json_schema").invoke("A river, as JSON."))


if __name__ == "__main__":
    main()
