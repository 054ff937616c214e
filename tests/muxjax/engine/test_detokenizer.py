import pytest

from muxjax.engine.detokenizer import Detokenizer
from muxjax.models.tokenizers.byte_tokenizer import byte_tokenizer
from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.requests import Request, RequestUpdate
from muxjax.scheduling.steps import TokenLogprobs

TOKENIZER = byte_tokenizer(260)


def update(text: str | list[int], reason=None, logprobs=None, stop_ids=()) -> RequestUpdate:
    tokens = list(text.encode()) if isinstance(text, str) else text
    return RequestUpdate(Request(0, "m", [1], stop_ids=stop_ids), tokens, logprobs, reason)


def run(stop: list[str], *texts: str, reason="length"):
    output = Detokenizer(TOKENIZER, stop)
    deltas = []
    for index, text in enumerate(texts):
        last = index == len(texts) - 1
        deltas.append(output.push(update(text, reason if last else None)))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def test_text_follows_the_tokens():
    deltas = run([], "ab", "c")
    assert [delta.text for delta in deltas] == ["ab", "c"]
    assert deltas[1].token_ids == [99]
    assert deltas[1].finish_reason == "length"


def test_incomplete_characters_are_held_back():
    output = Detokenizer(TOKENIZER, [])
    assert output.push(update([0xC3])).text == ""
    assert output.push(update([0xA9], "length")).text == "é"
    output = Detokenizer(TOKENIZER, [])
    assert output.push(update([0xC3], "length")).text == "�"


def test_text_of_a_stop_token_is_omitted():
    delta = Detokenizer(TOKENIZER, []).push(update("abX", "stop", stop_ids=(88,)))
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("ab", [97, 98, 88], "stop")


def test_the_last_token_of_a_complete_grammar_is_text():
    delta = Detokenizer(TOKENIZER, []).push(update("{}", "stop", stop_ids=(88,)))
    assert (delta.text, delta.finish_reason) == ("{}", "stop")


def test_stop_strings_are_ignored_before_min_tokens():
    output = Detokenizer(TOKENIZER, ["b"], 4)
    deltas = [output.push(update(text)) for text in "abab"]
    assert [delta.text for delta in deltas] == ["a", "b", "a", ""]
    assert [delta.finish_reason for delta in deltas] == [None, None, None, "stop"]


def test_prompt_logprobs_come_with_the_first_delta():
    request = Request(0, "m", [1, 2], SamplingParams(prompt_logprobs=0))
    request.prompt_logprobs = [TokenLogprobs(-1.0, [])]
    output = Detokenizer(TOKENIZER, [])
    first, second = (output.push(RequestUpdate(request, [97], None, None)) for _ in range(2))
    assert (first.prompt_logprobs, second.prompt_logprobs) == (request.prompt_logprobs, None)


@pytest.mark.parametrize(
    "texts", [("hello END and more",), ("hel", "lo E", "ND and more"), tuple("hello END and more")]
)
def test_stop_strings_end_the_output_across_any_split(texts):
    deltas = run(["END", "never"], *texts)
    assert "".join(delta.text for delta in deltas) == "hello "
    assert deltas[-1].finish_reason == "stop"
    assert [t for delta in deltas for t in delta.token_ids] == list(b"hello END")


def test_possible_start_of_a_stop_string_is_held_back_then_emitted():
    deltas = run(["abcd"], "xxab", "c", "yy")
    assert [delta.text for delta in deltas] == ["xx", "", "abcyy"]
    assert "".join(d.text for d in run(["abcd"], "xxabc")) == "xxabc"


def test_earliest_stop_string_ends_the_output():
    assert run(["d", "b"], "abcd")[0].text == "a"


def test_logprobs_are_truncated_with_the_tokens():
    logprobs = [TokenLogprobs(-float(i), []) for i in range(4)]
    delta = Detokenizer(TOKENIZER, ["b"]).push(update("abcd", None, logprobs))
    assert delta.logprobs == logprobs[:2]


def test_text_is_empty_without_a_tokenizer():
    delta = Detokenizer(None, []).push(update([5, 6], "stop"))
    assert (delta.text, delta.token_ids) == ("", [5, 6])


def test_updates_are_not_modified():
    tokens = list(b"abEND")
    Detokenizer(TOKENIZER, ["END"]).push(update(tokens))
    assert tokens == list(b"abEND")


def test_the_stop_reason_is_the_string_or_the_requested_token() -> None:
    assert run(["d", "b"], "abcd")[0].stop_reason == "b"
    assert run(["d"], "abc")[0].stop_reason is None
    for requested, reason in (((88,), 88), ((), None)):
        params = SamplingParams(stop_token_ids=requested)
        request = Request(0, "m", [1], params, stop_ids=(88,))
        delta = Detokenizer(TOKENIZER, []).push(RequestUpdate(request, [97, 88], None, "stop"))
        assert (delta.finish_reason, delta.stop_reason) == ("stop", reason)
