"""Chat templates: a real one, and expressions that the sandbox rejects."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from muxjax.errors import InvalidRequest
from muxjax.models.checkpoints.checkpoint import Checkpoint
from muxjax.models.tokenizers.chat_template import render_chat
from tests import golden

HELLO = [{"role": "user", "content": "hi"}]


def render(template: str, messages: list[dict[str, str]] = HELLO, prompt: bool = True) -> str:
    return render_chat(
        template, messages, add_generation_prompt=prompt, special_tokens={"bos_token": "<s>"}
    )


def test_variables_and_functions_of_templates() -> None:
    assert render("{{ bos_token }}{{ messages[0]['content'] }}") == "<s>hi"
    assert render("{% if add_generation_prompt %}A{% endif %}", prompt=False) == ""
    assert render("{{ messages | tojson }}") == '[{"role": "user", "content": "hi"}]'
    assert render("{{ {'b': '<é>', 'a': 1} | tojson(indent=1) }}") == '{\n "b": "<é>",\n "a": 1\n}'
    assert render("{{ strftime_now('%Y') }}").isdigit()
    assert render("{% if tools is none and documents is none %}x{% endif %}") == "x"
    assert (
        render("{% for m in messages %}{% if true %}{% break %}{% endif %}{% endfor %}ok") == "ok"
    )


def test_blocks_leave_no_blank_lines() -> None:
    assert render("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"


def test_raise_exception_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as refused:
        render("{{ raise_exception('roles must alternate') }}")
    assert refused.value.field == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ render.__globals__ }}",
        "{% if %}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ messages[5]['content'] }}",
        "{{ range(1000000000) | list }}",
    ],
)
def test_unsafe_or_failing_expressions_are_invalid_requests(template: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template"):
        render(template)


def test_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(InvalidRequest):
        render("{{ messages[0].update({'content': 'x'}) }}", messages)
    assert messages == HELLO


def test_template_of_smollm2(demo_checkpoint: Callable[[str], Checkpoint]) -> None:
    tokenizer = demo_checkpoint("smollm2-135m").tokenizer
    assert tokenizer is not None
    messages, prompt = golden.chat_case()
    assert tokenizer.apply_chat(messages) == prompt
    ids = tokenizer.encode(prompt, add_special=False)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(1) == 5  # <|im_start|>: a system message, three of the chat, the answer
    without = tokenizer.apply_chat(messages, add_generation_prompt=False)
    assert prompt == without + "<|im_start|>assistant\n"
