"""Explains validation errors of request bodies in terms of the API instead of Python types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from muxjax.serve.errors import ApiError
from muxjax.serve.openai.fields import MAX_CHOICES

_EXPECTED = {
    "ignore_eos": "true or false",
    "add_generation_prompt": "true or false",
    "cache_salt": "a string",
    "add_special_tokens": "true or false",
    "echo": "true or false",
    "logit_bias": "an object of numbers by token id",
    "messages": "a list of messages with a role and a content",
    "model": "the name of a model",
    "n": f"a whole number from 1 to {MAX_CHOICES}",
    "parallel_tool_calls": "true or false",
    "prompt": "a string, a list of strings, a list of token ids or a list of such lists",
    "response_format": (
        'an object with the type "text", "json_object" or "json_schema"; the last one needs a '
        "json_schema with name and schema"
    ),
    "return_token_strs": "true or false",
    "stop": "a string or a list of strings",
    "stop_token_ids": "a list of token ids",
    "stream": "true or false",
    "stream_options": "an object",
    "stream_options.include_usage": "true or false",
    "tokens": "a list of token ids",
    "tool_choice": '"none", "auto", "required" or {"type": "function", "function": {"name": ...}}',
    "tools": "a list of tools of type function, each with a function that has a name",
    "user": "a string",
}
"""What a field must be; any other field must be a number."""
_INTEGERS = (
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "priority",
    "seed",
    "top_k",
    "top_logprobs",
)
_UNION_BRANCHES = {"text", "json_object", "json_schema", "str", "list[TextPart]"}
"""Names that pydantic inserts into the path of a field for the branch of a union."""
_NESTED = ("messages", "response_format", "stream_options", "tools")


def explain(error: ValidationError, data: Mapping[str, Any]) -> ApiError:
    """Builds the error response for the first validation error of a body.

    Args:
      error: pydantic's error.
      data: the body.
    """
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0])
    path = _field_path(first["loc"])
    if first["type"] == "missing":
        return ApiError(f"{path} is missing", param=path)
    if field in _NESTED and len(first["loc"]) > 1:
        return _explain_nested(field, path, first)
    value = data.get(field)
    if field == "logprobs" and isinstance(value, (bool, int)):
        return ApiError(
            "logprobs is a number in completions and true or false in chat", param="logprobs"
        )
    expected = _EXPECTED.get(field, "a whole number" if field in _INTEGERS else "a number")
    return ApiError(f"{field} must be {expected}", param=field)


def _explain_nested(field: str, path: str, first: Any) -> ApiError:
    if first["type"] == "extra_forbidden":
        return ApiError(f"{path} is not supported by this server", param=path)
    last = path.rpartition(".")[2]
    if path in _EXPECTED:
        return ApiError(f"{path} must be {_EXPECTED[path]}", param=path)
    if field == "messages":
        if last == "role":
            expected = "system, developer, user, assistant or tool"
        elif ".content" in path:
            path = path.partition(".content")[0] + ".content"
            expected = "a string or a list of text parts"
        elif path.endswith("]"):
            expected = "an object"
        else:
            expected = _expected_value(first)
        return ApiError(f"{path} must be {expected}", param=path)
    return ApiError(f"{path} must be {_expected_value(first)}", param=path)


def _expected_value(first: Any) -> str:
    error_type, context = first["type"], first.get("ctx", {})
    if error_type == "literal_error":
        return str(context["expected"])
    if error_type == "string_pattern_mismatch":
        return "1 to 64 letters, digits, underscores and dashes"
    expected = {
        "string_type": "a string",
        "bool_type": "true or false",
        "dict_type": "an object",
        "list_type": "a list",
        "model_type": "an object",
        "model_attributes_type": "an object",
    }
    return expected.get(error_type, f"valid: {first['msg']}")


def _field_path(location: Sequence[str | int]) -> str:
    path = str(location[0])
    has_unions = path in ("response_format", "messages")
    for position, part in enumerate(location[1:], start=1):
        if isinstance(part, int):
            path += f"[{part}]"
        elif not (has_unions and part in _UNION_BRANCHES and _is_branch(location, position)):
            path += f".{part}"
    return path


def _is_branch(location: Sequence[str | int], position: int) -> bool:
    """Whether this part is the name of a union branch, directly under a union field."""
    return location[position - 1] in ("response_format", "content")
