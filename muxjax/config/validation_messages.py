"""Error messages for a fleet file, from pydantic's errors: one line per problem.

    fleet.yaml:4: models[0].dtype: unknown value; got 'fp8', choose auto, float32 or bfloat16

Imports no JAX.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping

from pydantic import ValidationError
from pydantic_core import ErrorDetails

_MESSAGES = {
    "string_type": "must be text (quote it if it looks like something else)",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must not contain spaces or control characters",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "too_short": "must not be empty",
    "model_type": "must be a mapping",
    "dict_type": "must be a mapping",
    "invalid_key": "a key must be text",
}
"""Messages by pydantic's error type."""

KnownKeys = Callable[[list[int | str]], list[str]]


def validation_messages(
    error: ValidationError, file: str, lines: Mapping[str, int], known_keys: KnownKeys
) -> str:
    """Returns the message of a validation error, one line per problem.

    Args:
      error: from pydantic.
      file: path of the file; empty for a mapping.
      lines: the line of each key path in the file.
      known_keys: returns the keys that are allowed as the last key of a location.
    """
    return "\n".join(
        _message(details, file, lines, known_keys)
        for details in error.errors(include_url=False)
        # pydantic also reports a list with invalid entries as too short.
        if not (details["type"] == "too_short" and details["input"])
    )


def format_value(value: object) -> str:
    """Formats a value for a message: shortened, with YAML's names of constants."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _message(
    details: ErrorDetails, file: str, lines: Mapping[str, int], known_keys: KnownKeys
) -> str:
    kind, context = details["type"], details.get("ctx", {})
    # A union adds the name of its branch to the location.
    location = [part for part in details["loc"] if part not in ("int", "float", "str")]
    key = _key_path(location)
    value = format_value(details["input"])
    numbers = {name: f"{v:g}" if isinstance(v, float) else v for name, v in context.items()}
    message = _MESSAGES[kind].format_map(numbers) if kind in _MESSAGES else details["msg"]
    if kind == "extra_forbidden":
        text = f"{key}: unknown key{_suggestion(str(location[-1]), known_keys(location))}"
    elif kind == "missing":
        text = f"{key}: missing"
    elif kind == "literal_error":
        choices = re.sub("'", "", str(context["expected"]))
        text = f"{key}: unknown value; got {value}, choose {choices}"
    elif kind in ("missing_config", "surplus_config", "cluster", "pinned"):
        text = f"{key}: {message}"
    elif kind in ("duplicate_name", "floors"):
        # The messages of errors in several entries begin with the key.
        key, text = message.split(":", 1)[0], message
    elif kind in ("model_type", "dict_type") and location and location[-1] == "config":
        text = f"{key}: must be a mapping; got {value}"
    else:
        text = f"{key}: {message}; got {value}"
    line = _line_of(key, lines)
    prefix = f"{file}:{line}: " if file and line else f"{file}: " if file else ""
    return prefix + text


def _key_path(location: Iterable[int | str]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _suggestion(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def _line_of(key: str, lines: Mapping[str, int]) -> int | None:
    """Returns the line of a key, or of the nearest enclosing key that is in the file."""
    while key and key not in lines:
        end = max(key.rfind("."), key.rfind("["))
        key = key[:end] if end > 0 else ""
    return lines.get(key)
