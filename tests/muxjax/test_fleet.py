"""The Python API, on tiny random models."""

import asyncio
import dataclasses
import gc
import json
import threading
import time
from collections import Counter

import pytest

from muxjax import Fleet, Grammar, SamplingParams
from muxjax.engine.grammar_constraints import ConstraintCompiler
from muxjax.errors import EngineDead, FleetConfigError, InvalidRequest, PoolTooSmall, UnknownModel
from muxjax.models.tokenizers.tokenizer import Tokenizer
from muxjax.outputs import ModelStats, ProgramStats, UnitStats
from tests.muxjax.tiny_fleets import entry, fleet

GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def loaded():
    with Fleet.load(fleet()) as tiny_fleet:
        yield tiny_fleet
        stats = tiny_fleet.stats()
        assert all(model["kv_pages_used"] == 0 for model in stats["models"].values())
        assert stats["requests"] == 0


def test_prompts_are_text_or_token_ids(loaded):
    by_text, by_ids = loaded.generate("llama", ["abc", list(b"abc")], GREEDY)
    assert by_text.token_ids == by_ids.token_ids
    assert len(by_text.token_ids) == 10
    assert by_text.finish_reason == "length"
    assert by_text.num_prompt_tokens == 3
    assert by_text.prompt_token_ids == by_ids.prompt_token_ids == list(b"abc")
    assert by_text.text == loaded.models["llama"].tokenizer.decode(by_text.token_ids)


def test_a_single_prompt_needs_no_list(loaded):
    expected = loaded.generate("qwen3", ["ab"], GREEDY)
    assert loaded.generate("qwen3", "ab", GREEDY) == expected
    assert loaded.generate("qwen3", [97, 98], GREEDY) == expected
    assert loaded.generate("qwen3", [], GREEDY) == []


def test_prompts_may_have_different_params(loaded):
    short = dataclasses.replace(GREEDY, max_tokens=2)
    first, second = loaded.generate("llama", ["abc", "abc"], [GREEDY, short])
    assert second.token_ids == first.token_ids[:2]
    with pytest.raises(InvalidRequest, match="1 sampling parameters for 2 prompts"):
        loaded.generate("llama", ["a", "b"], [GREEDY])


def test_streams_match_generate(loaded):
    expected = loaded.generate("gemma3", "hello", GREEDY)[0]
    deltas = list(loaded.stream("gemma3", "hello", GREEDY))
    assert [t for delta in deltas for t in delta.token_ids] == expected.token_ids
    assert "".join(delta.text for delta in deltas) == expected.text
    assert [delta.finish_reason for delta in deltas][-1] == "length"
    assert not any(delta.finish_reason for delta in deltas[:-1])

    async def collect():
        return [delta async for delta in loaded.stream("gemma3", "hello", GREEDY)]

    assert [t for d in asyncio.run(collect()) for t in d.token_ids] == expected.token_ids
    assert asyncio.run(loaded.agenerate("gemma3", "hello", GREEDY)) == [expected]


def test_logprobs(loaded):
    params = dataclasses.replace(GREEDY, logprobs=3)
    answer = loaded.generate("llama", "abc", params)[0]
    assert len(answer.logprobs) == len(answer.token_ids)
    for token, entry_ in zip(answer.token_ids, answer.logprobs, strict=True):
        assert entry_.top[0] == (token, entry_.logprob)  # greedy selects the most likely token
        assert [p for _, p in entry_.top] == sorted((p for _, p in entry_.top), reverse=True)
        assert len(entry_.top) == 3
    assert (
        loaded.generate("llama", "abc", dataclasses.replace(GREEDY, logprobs=0))[0].logprobs[0].top
        == []
    )
    assert loaded.generate("llama", "abc", GREEDY)[0].logprobs is None


def test_stop_tokens_and_strings(loaded):
    free = loaded.generate("llama", "abc", GREEDY)[0]
    at = next(i for i in range(1, 10) if free.token_ids[i] not in free.token_ids[:i])
    stopped = loaded.generate(
        "llama", "abc", dataclasses.replace(GREEDY, stop_token_ids=[free.token_ids[at]])
    )[0]
    assert stopped.finish_reason == "stop"
    assert stopped.stop_reason == free.token_ids[at]
    assert stopped.token_ids == free.token_ids[: at + 1]
    text = free.text
    if text:
        params = dataclasses.replace(GREEDY, stop=text[len(text) // 2])
        answer = loaded.generate("llama", "abc", params)[0]
        assert (answer.finish_reason, answer.stop_reason) == ("stop", params.stop[0])
        assert answer.text == text[: text.index(text[len(text) // 2])]


def test_high_penalties_prevent_repetition(loaded):
    params = dataclasses.replace(
        GREEDY, max_tokens=40, presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=50.0
    )
    plain = loaded.generate("llama", "abc", dataclasses.replace(GREEDY, max_tokens=40))[0]
    varied = loaded.generate("llama", "abc", params)[0]
    assert len(set(varied.token_ids)) == 40
    assert len(set(plain.token_ids)) < 40


def test_the_length_limit_ends_a_request(loaded):
    limit = loaded.models["llama"].max_model_len
    params = dataclasses.replace(GREEDY, max_tokens=10_000)
    answer = loaded.generate("llama", [5] * (limit - 3), params)[0]
    assert (len(answer.token_ids), answer.finish_reason) == (3, "length")


@pytest.mark.parametrize(
    ("model", "prompt", "message"),
    [
        ("unknown", "a", "no model 'unknown'; there are llama, qwen3, gemma3"),
        ("llama", "", "the prompt is empty"),
        ("llama", [5] * 256, "accepts at most 255"),
        ("llama", [5, 300], "300 is not a token id of llama: valid ids are 0 to 299"),
        ("llama", [5, -1], "-1 is not a token id"),
    ],
)
def test_invalid_requests_are_rejected(loaded, model, prompt, message):
    before = loaded.stats()["requests"]
    with pytest.raises(InvalidRequest, match=message):
        loaded.generate(model, [prompt], GREEDY)
    with pytest.raises(InvalidRequest, match=message):
        loaded.stream(model, prompt, GREEDY)
    assert loaded.stats()["requests"] == before


def test_an_invalid_prompt_prevents_the_whole_call(loaded):
    finished = loaded.stats()["models"]["llama"]["finished"]
    with pytest.raises(InvalidRequest):
        loaded.generate("llama", ["valid", ""], GREEDY)
    assert loaded.stats()["models"]["llama"]["finished"] == finished
    with pytest.raises(UnknownModel):
        loaded.generate("unknown", ["valid"], GREEDY)


def test_too_many_stop_tokens_are_rejected(loaded):
    with pytest.raises(InvalidRequest, match="at most 8"):
        loaded.generate("llama", "a", SamplingParams(stop_token_ids=list(range(9))))


def test_closed_and_cancelled_streams_free_their_pages(loaded):
    for _ in range(3):
        stream = loaded.stream("llama", "abc", dataclasses.replace(GREEDY, max_tokens=200))
        next(stream)
        stream.close()
    stream = loaded.stream("llama", "abc", dataclasses.replace(GREEDY, max_tokens=200))
    stream.cancel()
    stream.cancel()
    assert list(stream)[-1].finish_reason == "cancelled"
    stats = loaded.stats()
    assert stats["models"]["llama"]["kv_pages_used"] == 0


def test_requests_are_encoded_and_compiled_once(loaded, monkeypatch):
    calls = Counter()

    def counted(name, function):
        def call(*arguments):
            calls[name] += 1
            return function(*arguments)

        return call

    monkeypatch.setattr(Tokenizer, "encode", counted("encode", Tokenizer.encode))
    compiler = ConstraintCompiler
    monkeypatch.setattr(compiler, "compile", counted("compile", compiler.compile))
    params = SamplingParams(max_tokens=3, grammar=Grammar.regex("[ab]{1,8}"))
    loaded.generate("llama", ["one", "two", "three"], params)
    assert calls == {"encode": 3, "compile": 3}


def test_an_unreferenced_stream_ends_its_request(loaded):
    for _ in loaded.stream("llama", "abc", dataclasses.replace(GREEDY, max_tokens=200)):
        break
    gc.collect()
    deadline = time.monotonic() + 20.0
    while loaded.stats()["requests"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loaded.stats()["requests"] == 0


CHAT = (
    '{% if tools %}"parameters"{% endif %}'
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
)


@pytest.fixture
def chat_fleet(loaded, monkeypatch):
    """The fleet, with a chat template for its llama."""
    model = loaded.models["llama"]
    tokenizer = dataclasses.replace(model.tokenizer, chat_template=CHAT)
    chat = {**loaded.models, "llama": dataclasses.replace(model, tokenizer=tokenizer)}
    monkeypatch.setattr(loaded, "models", chat)
    return loaded


def test_chat_renders_the_chat_template(chat_fleet):
    messages = [{"role": "user", "content": "hi"}]
    expected = chat_fleet.generate("llama", "u:hi;", GREEDY)
    assert chat_fleet.chat("llama", messages, GREEDY) == expected
    assert chat_fleet.chat("llama", [messages, messages], GREEDY) == expected * 2
    assert asyncio.run(chat_fleet.achat("llama", messages, GREEDY)) == expected
    deltas = list(chat_fleet.chat_stream("llama", messages, GREEDY))
    assert [token for delta in deltas for token in delta.token_ids] == expected[0].token_ids
    with pytest.raises(InvalidRequest, match="no chat template"):
        chat_fleet.chat("qwen3", messages, GREEDY)


def test_chat_with_tools_returns_calls(chat_fleet):
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "now", "parameters": schema}}]
    messages = [{"role": "user", "content": "x"}]
    # A bias for "{" makes the random model begin a call; the grammar then completes it.
    params = SamplingParams(temperature=0.0, max_tokens=80, logit_bias={ord("{"): 100.0})
    (answer,) = chat_fleet.chat("llama", messages, params, tools=tools)
    assert bytes(answer.prompt_token_ids) == b'"parameters"u:x;'
    assert (answer.text, answer.finish_reason) == ("", "stop")
    (call,) = answer.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("now", {})


def test_model_handles_match_the_fleet(chat_fleet):
    model = chat_fleet.model("llama")
    messages = [{"role": "user", "content": "hi"}]
    expected = chat_fleet.generate("llama", "abc", GREEDY)
    assert model.name == "llama"
    assert model.generate("abc", GREEDY) == expected
    assert asyncio.run(model.agenerate(["abc"], GREEDY)) == expected
    assert [t for d in model.stream("abc", GREEDY) for t in d.token_ids] == expected[0].token_ids
    assert model.chat(messages, GREEDY) == chat_fleet.chat("llama", messages, GREEDY)
    with pytest.raises(UnknownModel, match="no model 'unknown'"):
        chat_fleet.model("unknown")


def test_stats_have_only_declared_keys(loaded):
    stats = loaded.stats()
    assert set(stats) <= set(UnitStats.__annotations__)
    assert set(loaded.stats(block=False)) <= set(stats)
    for model in stats["models"].values():
        assert set(model) <= set(ModelStats.__annotations__)
    for program in stats["programs"]:
        assert set(program) == set(ProgramStats.__annotations__)


def test_a_fleet_serves_several_threads(loaded):
    expected = {name: loaded.generate(name, "xyz", GREEDY)[0] for name in loaded.models}
    wrong = []

    def generate(name: str) -> None:
        for _ in range(3):
            if loaded.generate(name, "xyz", GREEDY)[0] != expected[name]:
                wrong.append(name)

    threads = [threading.Thread(target=generate, args=(name,)) for name in [*loaded.models] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_fleet_without_warm_up_cannot_generate():
    with Fleet.load(fleet(), warm_up=False) as cold:
        assert cold.models["gemma3"].config.num_layers == 5
        assert cold.stats()["programs"] == []
        with pytest.raises(EngineDead, match="warm_up=False"):
            cold.generate("llama", "a")


def test_a_closed_fleet_raises_engine_dead():
    closed = Fleet.load(fleet("llama"))
    stream = closed.stream("llama", "abc", dataclasses.replace(GREEDY, max_tokens=200))
    closed.close()
    closed.close()
    with pytest.raises(EngineDead, match="closed"):
        list(stream)
    with pytest.raises(EngineDead, match="closed"):
        closed.generate("llama", "abc")
    with pytest.raises(EngineDead, match="closed"):
        closed.stats()
    stream.cancel()


def test_too_small_pools_are_rejected():
    with pytest.raises(PoolTooSmall, match="pool too small"):
        Fleet.load(fleet(memory="30kB"))
    config = fleet("llama", memory="100kB")
    config["models"][0]["max_model_len"] = 256
    with pytest.raises(PoolTooSmall, match="llama"):
        Fleet.load(config)


def test_lengths_above_the_context_length_are_rejected():
    config = fleet("llama")
    config["models"][0]["max_model_len"] = 257
    with pytest.raises(FleetConfigError, match="model's context length is 256"):
        Fleet.load(config)


def test_bfloat16_models_generate(loaded):
    config = fleet("llama")
    config["models"] = [entry("llama", dtype="bfloat16")]
    with Fleet.load(config) as bfloat16_fleet:
        model = bfloat16_fleet.models["llama"]
        assert model.dtype == "bfloat16"
        assert model.param_bytes < loaded.models["llama"].param_bytes
        assert len(bfloat16_fleet.generate("llama", ["abc", "d"], GREEDY)[0].token_ids) == 10


def test_int8_and_float32_models_share_a_fleet(loaded):
    config = fleet()
    config["models"] = [entry("gemma3", quantization="int8"), entry("llama")]
    with Fleet.load(config) as mixed:
        model = mixed.models["gemma3"]
        assert model.precision == "int8"
        assert model.param_bytes < loaded.models["gemma3"].param_bytes / 2
        isolated = [mixed.generate("gemma3", [text], GREEDY)[0].token_ids for text in ("abc", "d")]
        batched = mixed.generate("gemma3", ["abc", "d"], GREEDY)
        assert [completion.token_ids for completion in batched] == isolated
        expected = loaded.generate("llama", ["abc"], GREEDY)[0].token_ids
        assert mixed.generate("llama", ["abc"], GREEDY)[0].token_ids == expected


def test_restart_keeps_tokens_and_running_requests():
    with Fleet.load(fleet("llama")) as llama:
        expected = llama.generate("llama", "abc", GREEDY)
        long = dataclasses.replace(GREEDY, max_tokens=200)
        (uninterrupted,) = llama.generate("llama", "hello", long)
        running = llama.stream("llama", "hello", long)
        tokens = list(next(running).token_ids)
        (before,) = llama.health()
        assert before.works(60.0)
        llama.restart("0", "for the test")
        tokens += [token for delta in running for token in delta.token_ids]
        assert tokens == uninterrupted.token_ids
        (after,) = llama.health()
        assert (after.alive, after.restarts, after.reason) == (True, 1, None)
        assert llama.stats(block=False)["requests"] == 0
        assert llama.generate("llama", "abc", GREEDY) == expected
        with pytest.raises(EngineDead, match="does not exist"):
            llama.restart("1", "no such unit")
    (closed,) = llama.health()
    assert not closed.works(60.0)
    with pytest.raises(EngineDead, match="closed"):
        llama.restart("0", "too late")


def test_streams_can_be_ended_by_another_caller():
    with Fleet.load(fleet("llama")) as llama:
        long = dataclasses.replace(GREEDY, max_tokens=200)
        aborted = llama.stream("llama", "hello", long)
        aborted.end()
        aborted.end(ValueError("ends once"))
        assert [delta.finish_reason for delta in aborted][-1] == "abort"
        failed = llama.stream("llama", "hello", long)
        failed.end(TimeoutError("too long"))
        with pytest.raises(TimeoutError, match="too long"):
            list(failed)
        assert llama.stats()["requests"] == 0
