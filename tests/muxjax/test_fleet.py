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
    with Fleet.load(fleet()) as found:
        yield found
        stats = found.stats()
        assert all(model["kv_pages_used"] == 0 for model in stats["models"].values())
        assert stats["requests"] == 0


def test_text_and_token_ids_are_prompts(loaded):
    by_text, by_ids = loaded.generate("llama", ["abc", list(b"abc")], GREEDY)
    assert by_text.token_ids == by_ids.token_ids
    assert len(by_text.token_ids) == 10
    assert by_text.finish_reason == "length"
    assert by_text.num_prompt_tokens == 3
    assert by_text.prompt_token_ids == by_ids.prompt_token_ids == list(b"abc")
    assert by_text.text == loaded.models["llama"].tokenizer.decode(by_text.token_ids)


def test_one_prompt_may_stand_alone(loaded):
    many = loaded.generate("qwen3", ["ab"], GREEDY)
    assert loaded.generate("qwen3", "ab", GREEDY) == many
    assert loaded.generate("qwen3", [97, 98], GREEDY) == many
    assert loaded.generate("qwen3", [], GREEDY) == []


def test_each_prompt_may_have_its_own_params(loaded):
    short = dataclasses.replace(GREEDY, max_tokens=2)
    one, two = loaded.generate("llama", ["abc", "abc"], [GREEDY, short])
    assert two.token_ids == one.token_ids[:2]
    with pytest.raises(InvalidRequest, match="1 sampling parameters for 2 prompts"):
        loaded.generate("llama", ["a", "b"], [GREEDY])


def test_streams_give_what_generate_gives(loaded):
    wanted = loaded.generate("gemma3", "hello", GREEDY)[0]
    deltas = list(loaded.stream("gemma3", "hello", GREEDY))
    assert [t for delta in deltas for t in delta.token_ids] == wanted.token_ids
    assert "".join(delta.text for delta in deltas) == wanted.text
    assert [delta.finish_reason for delta in deltas][-1] == "length"
    assert not any(delta.finish_reason for delta in deltas[:-1])

    async def collect():
        return [delta async for delta in loaded.stream("gemma3", "hello", GREEDY)]

    assert [t for d in asyncio.run(collect()) for t in d.token_ids] == wanted.token_ids
    assert asyncio.run(loaded.agenerate("gemma3", "hello", GREEDY)) == [wanted]


def test_logprobs(loaded):
    params = dataclasses.replace(GREEDY, logprobs=3)
    answer = loaded.generate("llama", "abc", params)[0]
    assert len(answer.logprobs) == len(answer.token_ids)
    for token, entry_ in zip(answer.token_ids, answer.logprobs, strict=True):
        assert entry_.top[0] == (token, entry_.logprob)  # greedy takes the most likely
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
        cut = dataclasses.replace(GREEDY, stop=text[len(text) // 2])
        answer = loaded.generate("llama", "abc", cut)[0]
        assert (answer.finish_reason, answer.stop_reason) == ("stop", cut.stop[0])
        assert answer.text == text[: text.index(text[len(text) // 2])]


def test_penalties_forbid_repetition(loaded):
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
        ("nobody", "a", "no model 'nobody'; there are llama, qwen3, gemma3"),
        ("llama", "", "the prompt is empty"),
        ("llama", [5] * 256, "accepts at most 255"),
        ("llama", [5, 300], "300 is not a token id of llama: valid ids are 0 to 299"),
        ("llama", [5, -1], "-1 is not a token id"),
    ],
)
def test_bad_requests_are_refused(loaded, model, prompt, message):
    before = loaded.stats()["requests"]
    with pytest.raises(InvalidRequest, match=message):
        loaded.generate(model, [prompt], GREEDY)
    with pytest.raises(InvalidRequest, match=message):
        loaded.stream(model, prompt, GREEDY)
    assert loaded.stats()["requests"] == before


def test_one_bad_prompt_among_good_ones_queues_nothing(loaded):
    finished = loaded.stats()["models"]["llama"]["finished"]
    with pytest.raises(InvalidRequest):
        loaded.generate("llama", ["good", ""], GREEDY)
    assert loaded.stats()["models"]["llama"]["finished"] == finished
    with pytest.raises(UnknownModel):
        loaded.generate("nobody", ["good"], GREEDY)


def test_too_many_stop_tokens_are_refused(loaded):
    with pytest.raises(InvalidRequest, match="at most 8"):
        loaded.generate("llama", "a", SamplingParams(stop_token_ids=list(range(9))))


def test_a_stream_that_is_left_frees_its_pages(loaded):
    for _ in range(3):
        stream = loaded.stream("llama", "abc", dataclasses.replace(GREEDY, max_tokens=200))
        next(stream)
        stream.close()
    opened = loaded.stream("llama", "abc", dataclasses.replace(GREEDY, max_tokens=200))
    opened.cancel()
    opened.cancel()
    assert list(opened)[-1].finish_reason == "cancelled"
    stats = loaded.stats()
    assert stats["models"]["llama"]["kv_pages_used"] == 0


def test_each_request_is_prepared_once(loaded, monkeypatch):
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


def test_a_stream_that_is_dropped_ends_its_request(loaded):
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
def chatty(loaded, monkeypatch):
    """The fleet, whose llama has a chat template."""
    model = loaded.models["llama"]
    tokenizer = dataclasses.replace(model.tokenizer, chat_template=CHAT)
    chat = {**loaded.models, "llama": dataclasses.replace(model, tokenizer=tokenizer)}
    monkeypatch.setattr(loaded, "models", chat)
    return loaded


def test_chat_renders_the_model_s_template(chatty):
    talk = [{"role": "user", "content": "hi"}]
    wanted = chatty.generate("llama", "u:hi;", GREEDY)
    assert chatty.chat("llama", talk, GREEDY) == wanted
    assert chatty.chat("llama", [talk, talk], GREEDY) == wanted * 2
    assert asyncio.run(chatty.achat("llama", talk, GREEDY)) == wanted
    deltas = list(chatty.chat_stream("llama", talk, GREEDY))
    assert [token for delta in deltas for token in delta.token_ids] == wanted[0].token_ids
    with pytest.raises(InvalidRequest, match="no chat template"):
        chatty.chat("qwen3", talk, GREEDY)


def test_chat_with_tools_returns_calls(chatty):
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "now", "parameters": schema}}]
    talk = [{"role": "user", "content": "x"}]
    # A bias towards "{" makes the random model begin a call; the grammar then completes it.
    params = SamplingParams(temperature=0.0, max_tokens=80, logit_bias={ord("{"): 100.0})
    (answer,) = chatty.chat("llama", talk, params, tools=tools)
    assert bytes(answer.prompt_token_ids) == b'"parameters"u:x;'
    assert (answer.text, answer.finish_reason) == ("", "stop")
    (call,) = answer.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("now", {})


def test_a_model_s_handle_does_what_the_fleet_does(chatty):
    model = chatty.model("llama")
    talk = [{"role": "user", "content": "hi"}]
    wanted = chatty.generate("llama", "abc", GREEDY)
    assert model.name == "llama"
    assert model.generate("abc", GREEDY) == wanted
    assert asyncio.run(model.agenerate(["abc"], GREEDY)) == wanted
    assert [t for d in model.stream("abc", GREEDY) for t in d.token_ids] == wanted[0].token_ids
    assert model.chat(talk, GREEDY) == chatty.chat("llama", talk, GREEDY)
    with pytest.raises(UnknownModel, match="no model 'nobody'"):
        chatty.model("nobody")


def test_the_types_of_stats_have_all_keys(loaded):
    stats = loaded.stats()
    assert set(stats) <= set(UnitStats.__annotations__)
    assert set(loaded.stats(block=False)) <= set(stats)
    for model in stats["models"].values():
        assert set(model) <= set(ModelStats.__annotations__)
    for program in stats["programs"]:
        assert set(program) == set(ProgramStats.__annotations__)


def test_many_threads_may_ask(loaded):
    wanted = {name: loaded.generate(name, "xyz", GREEDY)[0] for name in loaded.models}
    wrong = []

    def ask(name: str) -> None:
        for _ in range(3):
            if loaded.generate(name, "xyz", GREEDY)[0] != wanted[name]:
                wrong.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in [*loaded.models] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_without_warm_up_there_is_only_the_plan():
    with Fleet.load(fleet(), warm_up=False) as plan:
        assert plan.models["gemma3"].config.num_layers == 5
        assert plan.stats()["programs"] == []
        with pytest.raises(EngineDead, match="warm_up=False"):
            plan.generate("llama", "a")


def test_a_closed_fleet_says_so():
    found = Fleet.load(fleet("llama"))
    stream = found.stream("llama", "abc", dataclasses.replace(GREEDY, max_tokens=200))
    found.close()
    found.close()
    with pytest.raises(EngineDead, match="closed"):
        list(stream)
    with pytest.raises(EngineDead, match="closed"):
        found.generate("llama", "abc")
    with pytest.raises(EngineDead, match="closed"):
        found.stats()
    stream.cancel()


def test_pools_that_are_too_small_are_refused():
    with pytest.raises(PoolTooSmall, match="pool too small"):
        Fleet.load(fleet(memory="30kB"))
    config = fleet("llama", memory="100kB")
    config["models"][0]["max_model_len"] = 256
    with pytest.raises(PoolTooSmall, match="llama"):
        Fleet.load(config)


def test_lengths_beyond_the_model_are_refused():
    config = fleet("llama")
    config["models"][0]["max_model_len"] = 257
    with pytest.raises(FleetConfigError, match="model's context length is 256"):
        Fleet.load(config)


def test_bfloat16_models_run(loaded):
    config = fleet("llama")
    config["models"] = [entry("llama", dtype="bfloat16")]
    with Fleet.load(config) as found:
        model = found.models["llama"]
        assert model.dtype == "bfloat16"
        assert model.param_bytes < loaded.models["llama"].param_bytes
        assert len(found.generate("llama", ["abc", "d"], GREEDY)[0].token_ids) == 10


def test_int8_models_run_beside_others(loaded):
    config = fleet()
    config["models"] = [entry("gemma3", quantization="int8"), entry("llama")]
    with Fleet.load(config) as found:
        model = found.models["gemma3"]
        assert model.precision == "int8"
        assert model.param_bytes < loaded.models["gemma3"].param_bytes / 2
        alone = [found.generate("gemma3", [text], GREEDY)[0].token_ids for text in ("abc", "d")]
        assert [c.token_ids for c in found.generate("gemma3", ["abc", "d"], GREEDY)] == alone
        exact = loaded.generate("llama", ["abc"], GREEDY)[0].token_ids
        assert found.generate("llama", ["abc"], GREEDY)[0].token_ids == exact


def test_a_restarted_unit_gives_the_same_answers_from_a_new_pool():
    with Fleet.load(fleet("llama")) as found:
        wanted = found.generate("llama", "abc", GREEDY)
        long = dataclasses.replace(GREEDY, max_tokens=200)
        (undisturbed,) = found.generate("llama", "hello", long)
        running = found.stream("llama", "hello", long)
        tokens = list(next(running).token_ids)
        (before,) = found.health()
        assert before.works(60.0)
        found.restart("0", "it was asked for")
        tokens += [token for delta in running for token in delta.token_ids]
        assert tokens == undisturbed.token_ids
        (after,) = found.health()
        assert (after.alive, after.restarts, after.reason) == (True, 1, None)
        assert found.stats(block=False)["requests"] == 0
        assert found.generate("llama", "abc", GREEDY) == wanted
        with pytest.raises(EngineDead, match="does not exist"):
            found.restart("1", "no such unit")
    (closed,) = found.health()
    assert not closed.works(60.0)
    with pytest.raises(EngineDead, match="closed"):
        found.restart("0", "too late")


def test_a_stream_can_be_ended_from_outside():
    with Fleet.load(fleet("llama")) as found:
        long = dataclasses.replace(GREEDY, max_tokens=200)
        cut = found.stream("llama", "hello", long)
        cut.end()
        cut.end(ValueError("ends once"))
        assert [delta.finish_reason for delta in cut][-1] == "abort"
        failed = found.stream("llama", "hello", long)
        failed.end(TimeoutError("too long"))
        with pytest.raises(TimeoutError, match="too long"):
            list(failed)
        assert found.stats()["requests"] == 0
