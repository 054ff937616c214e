"""Parts of responses that completions and chat completions share: header and usage."""

from __future__ import annotations

import time
import uuid
from typing import Any

from muxjax._version import __version__
from muxjax.serve.openai.generation import GenerationCall

SYSTEM_FINGERPRINT = f"muxjax-{__version__}"


def response_header(id_prefix: str, object_type: str, model: str) -> dict[str, Any]:
    """Returns the first fields of a response or of every event of a streamed response."""
    return {
        "id": f"{id_prefix}-{uuid.uuid4().hex}",
        "object": object_type,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": SYSTEM_FINGERPRINT,
    }


def usage_counts(call: GenerationCall, completion_tokens: int) -> dict[str, Any]:
    """Returns the token counts of a call whose streams have ended."""
    prompt_tokens = call.num_prompt_tokens
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": call.num_cached_tokens},
    }
