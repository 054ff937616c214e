"""OpenAI's Python client with a running server: streaming, JSON Schema and tools.

make serve                                   # in another terminal
pip install openai
python examples/openai_client.py [URL]
"""

from __future__ import annotations

import json
import sys

from openai import OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{URL}/v1", api_key="none")
MODEL = "chat"


def stream() -> None:
    """Streams an answer."""
    events = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Why is the sky blue?"}],
        max_tokens=48,
        seed=1,
        stream=True,
    )
    for event in events:
        print(event.choices[0].delta.content or "", end="", flush=True)
    print()


def json_schema() -> None:
    """Requests JSON that conforms to a schema."""
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "sunny": {"type": "boolean"},
            "degrees": {"type": "integer", "minimum": -40, "maximum": 50},
        },
        "required": ["city", "sunny", "degrees"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Make up a weather report of Rome, as JSON."}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "weather", "schema": schema, "strict": True},
        },
        max_tokens=120,
        temperature=0,
    )
    print(json.loads(answer.choices[0].message.content or ""))


def call_tool() -> None:
    """Has the model call a function and answer with the result."""
    tool = {
        "type": "function",
        "function": {
            "name": "get_time",
            "description": "The time in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 20}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    messages: list = [{"role": "user", "content": "What time is it in Paris?"}]
    options = {"model": MODEL, "tools": [tool], "max_tokens": 80, "temperature": 0}
    answer = client.chat.completions.create(messages=messages, tool_choice="required", **options)
    message = answer.choices[0].message
    print(answer.choices[0].finish_reason)
    messages.append(message.model_dump(exclude_none=True))
    for call in message.tool_calls or ():
        print(call.function.name, json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "half past nine"})
    answer = client.chat.completions.create(messages=messages, tool_choice="none", **options)
    print(answer.choices[0].message.content)


if __name__ == "__main__":
    stream()
    json_schema()
    call_tool()
