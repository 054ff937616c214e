"""Log-probabilities in the formats of both endpoints."""

from __future__ import annotations

import math

from muxjax.scheduling.steps import TokenLogprobs
from muxjax.serve.openai.logprobs import (
    TextOffsets,
    chat_logprobs,
    completion_logprobs,
    token_text,
)
from tests.serve.fake_fleet import fake_tokenizer

TOKENIZER = fake_tokenizer(None)
LOGPROBS = TokenLogprobs(-0.5, [(98, -0.25), (99, -math.inf)])


def test_chat_logprobs_have_one_entry_per_token() -> None:
    (entry,) = chat_logprobs(TOKENIZER, [97], [LOGPROBS])["content"]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("a", -0.5, [97])
    assert [(other["token"], other["logprob"]) for other in entry["top_logprobs"]] == [
        ("b", -0.25),
        ("c", -9999.0),
    ]
    (entry,) = chat_logprobs(None, [97], [LOGPROBS])["content"]
    assert (entry["token"], entry["bytes"]) == ("token_id:97", None)


def test_completion_alternatives_include_the_chosen_token() -> None:
    logprobs = completion_logprobs(
        TOKENIZER, [96, 97], [None, LOGPROBS], alternatives=2, offsets=[0, 1]
    )
    assert logprobs == {
        "tokens": ["`", "a"],
        "token_logprobs": [None, -0.5],
        "top_logprobs": [None, {"b": -0.25, "c": -9999.0, "a": -0.5}],
        "text_offset": [0, 1],
    }
    without = completion_logprobs(TOKENIZER, [97], [LOGPROBS], alternatives=0, offsets=[0])
    assert without["top_logprobs"] is None


def test_tokens_of_one_character_share_its_offset() -> None:
    offsets = TextOffsets(TOKENIZER)
    assert offsets.advance(list("aé".encode())) == [0, 1, 1]
    assert offsets.advance(list(b"b")) == [2]
    assert TextOffsets(None).advance([1, 2]) == [0, 0]
    assert token_text(None, 7) == "token_id:7"
