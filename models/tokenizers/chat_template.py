"""Chat templates: Jinja text from the checkpoint, run in a sandbox.

The template comes with the model file and is not trusted: it sees only the values given here, can
change none of them, and reaches no attribute that Jinja's sandbox calls unsafe. The names it may
use are those that Hugging Face's templates are written for.
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
    """The prompt text of a conversation.

    Args:
      template: Jinja source.
      messages: each with `role` and `content`, and perhaps `tool_calls` or `tool_call_id`.
      add_generation_prompt: end with the opening of the assistant's answer.
      special_tokens: texts by the names that templates know (`bos_token`, `eos_token`, ...).
      tools: functions that the model may call, as OpenAI's `tools`.

    Raises:
      InvalidRequest: the template refuses the messages, or cannot be run.
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
        # What a template does with a message of another form than it expects.
        raise InvalidRequest(
            f"the model's chat template cannot use these messages: {error}", field="messages"
        ) from error


@lru_cache(maxsize=64)
def supports_tools(template: str) -> bool:
    """Whether a template has a use for tools; one that cannot be parsed has none."""
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
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


def _refuse(message: str) -> None:
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
    """Jinja's own `tojson` escapes HTML, which would change the prompt."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
