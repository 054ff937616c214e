"""Chat templates: Jinja source from the checkpoint, rendered in a sandbox.

The template comes with the model file and is not trusted. It can only read the values passed here,
and has no access to attributes that Jinja's sandbox considers unsafe. It has the variables and
functions of Hugging Face's templates.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from muxjax.errors import InvalidRequest


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Renders the prompt text of a conversation.

    Args:
      template: Jinja source.
      messages: each with `role` and `content`, and optionally `tool_calls` or `tool_call_id`.
      add_generation_prompt: whether to end the prompt with the start of the assistant's message.
      special_tokens: texts of special tokens by their template names (`bos_token`, `eos_token`,
        ...).
      tools: functions that the model may call, in the format of OpenAI's `tools`.

    Raises:
      InvalidRequest: the template rejects the messages, or fails.
    """
    try:
        return _compiled(template).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            tools=None if tools is None else [dict(tool) for tool in tools],
            documents=None,
            **special_tokens,
        )
    except jinja2.TemplateError as error:
        raise InvalidRequest(f"chat template: {error}", field="messages") from error
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        # Raised by expressions of the template for messages with unexpected fields or types.
        raise InvalidRequest(
            f"the model's chat template cannot use these messages: {error}", field="messages"
        ) from error


@lru_cache(maxsize=64)
def supports_tools(template: str) -> bool:
    """Whether a template uses `tools`; False for a template that cannot be parsed."""
    try:
        parsed = _environment().parse(template)
    except jinja2.TemplateError:
        return False
    return "tools" in jinja2.meta.find_undeclared_variables(parsed)


@lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _now
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's `tojson`, which would change the prompt."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
