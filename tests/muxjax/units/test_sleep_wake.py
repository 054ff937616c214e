"""Models that sleep and wake, on tiny random models."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from muxjax import Fleet, SamplingParams
from muxjax.errors import FleetConfigError, ModelUnavailable, UnknownModel, WrongState
from muxjax.executor import weight_offload as parking
from muxjax.executor.programs import ModelPrograms
from tests.muxjax.tiny_fleets import entry, fleet

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)


def two(**more: Any) -> dict[str, Any]:
    """A fleet file of two models; `more` is of the first."""
    file = fleet("llama", "qwen3", max_seqs=2, prefill_tokens=16)
    file["models"][0] |= more
    return file


@pytest.fixture(scope="module")
def loaded() -> Iterator[Fleet]:
    with Fleet.load(two(), poison=True) as found:
        yield found
        found.wake("llama")
        found.units[0].engine.call(lambda unit: unit.check_invariants())
        stats = found.stats()
        assert all(model["kv_pages_used"] == 0 for model in stats["models"].values())


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleeping moves weights, as it does where a device has memory of its own."""
    monkeypatch.setattr(parking, "host_memory", lambda device: "pinned_host")


def bytes_of(fleet: Fleet, model: str) -> list[bytes]:
    leaves = fleet.units[0].programs[model].parameters
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def kinds_of(fleet: Fleet, model: str) -> set[str]:
    leaves = fleet.units[0].programs[model].parameters
    return {leaf.sharding.memory_kind for leaf in leaves}


def memory() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


def test_sleep_gives_pages_to_the_others_and_wake_takes_them_back(loaded: Fleet) -> None:
    before = loaded.stats()["models"]
    right = loaded.generate("llama", "hello", GREEDY)
    loaded.sleep("llama")
    loaded.sleep("llama")  # nothing
    states = loaded.model_states()
    assert (states["llama"].status, states["qwen3"].status) == ("sleeping", "loaded")
    asleep = loaded.stats()["models"]
    assert "llama" not in asleep
    assert asleep["qwen3"]["kv_pages_quota"] > before["qwen3"]["kv_pages_quota"]
    loaded.wake("llama")
    loaded.wake("llama")  # nothing
    after = loaded.stats()["models"]
    assert after["llama"]["kv_pages_quota"] == before["llama"]["kv_pages_quota"]
    assert loaded.generate("llama", "hello", GREEDY) == right


@pytest.mark.usefixtures("on_host")
def test_a_hundred_sleeps_keep_weights_and_memory(loaded: Fleet) -> None:
    right, memories = bytes_of(loaded, "llama"), []
    for turn in range(100):
        loaded.sleep("llama")
        if turn in (0, 99):
            assert kinds_of(loaded, "llama") == {"pinned_host"}
        loaded.wake("llama")
        memories.append(memory())
    assert kinds_of(loaded, "llama") == {"device"}
    assert bytes_of(loaded, "llama") == right
    assert len(set(memories[1:])) == 1


def test_requests_to_a_sleeping_model_wake_it_and_wait_in_order(loaded: Fleet) -> None:
    prompts = ["a", "bc", "def", "gh", "hello"]
    right = [loaded.generate("llama", prompt, GREEDY)[0] for prompt in prompts]
    loaded.sleep("llama")
    streams = [loaded.stream("llama", prompt, GREEDY) for prompt in prompts]
    for stream, answer in zip(streams, right, strict=True):
        assert [t for delta in stream for t in delta.token_ids] == answer.token_ids
    assert loaded.model_states()["llama"].status == "loaded"


def test_what_runs_for_too_long_is_put_back_in_line(
    loaded: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = loaded.generate("llama", ["one", "two", "three"], LONG)
    monkeypatch.setattr(loaded.admin.lifecycle, "drain_seconds", 0.0)
    streams = [loaded.stream("llama", prompt, LONG) for prompt in ("one", "two", "three")]
    first = next(iter(streams[0]))
    loaded.sleep("llama")  # and they wake it
    for stream, answer in zip(streams, right, strict=True):
        begun = first.token_ids if stream is streams[0] else []
        rest = [t for delta in stream for t in delta.token_ids]
        assert begun + rest == answer.token_ids


def test_a_held_request_may_be_cancelled(loaded: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded.sleep("llama")
    monkeypatch.setattr(loaded._router, "on_held", lambda model: None)
    stream = loaded.stream("llama", "hello", GREEDY)
    stream.cancel()
    assert [delta.finish_reason for delta in stream] == ["cancelled"]
    assert loaded.model_states()["llama"].status == "sleeping"
    loaded.wake("llama")


def test_others_go_on_while_one_sleeps_and_wakes(loaded: Fleet) -> None:
    right = loaded.generate("qwen3", "hello", LONG)
    wrong, done = [], threading.Event()

    def ask() -> None:
        while not done.is_set():
            if loaded.generate("qwen3", "hello", LONG) != right:
                wrong.append(1)

    asking = threading.Thread(target=ask)
    asking.start()
    for _ in range(10):
        loaded.sleep("llama")
        loaded.wake("llama")
    done.set()
    asking.join(30)
    assert not wrong
    assert not asking.is_alive()


def test_who_is_idle_sleeps(loaded: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    life = loaded.admin.lifecycle
    monkeypatch.setattr(loaded._router, "_clock", lambda: now[0])
    monkeypatch.setattr(life, "idle_timeout", 60.0)
    for model in loaded.models:
        loaded.generate(model, "x", GREEDY)
    now[0] += 59.0
    assert life.look() == []
    loaded.generate("qwen3", "x", GREEDY)
    now[0] += 2.0
    assert life.look() == ["llama"]
    stream = loaded.stream("llama", "x", GREEDY)
    assert len([t for delta in stream for t in delta.token_ids]) == 12
    assert life.look() == []


def test_a_restarted_unit_knows_who_sleeps(loaded: Fleet) -> None:
    right = loaded.generate("llama", "hello", GREEDY)
    loaded.sleep("llama")
    loaded.restart("0", "a test")
    assert "llama" not in loaded.stats()["models"]
    assert loaded.generate("llama", "hello", GREEDY) == right
    loaded.restart("0", "a test")
    assert loaded.generate("llama", "hello", GREEDY) == right


def test_room_is_made_by_putting_the_idle_to_sleep(
    loaded: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded.sleep("llama")
    wake, tries = ModelPrograms.wake, []

    def without_room(programs: ModelPrograms) -> None:
        tries.append(programs.name)
        if len(tries) == 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        wake(programs)

    monkeypatch.setattr(ModelPrograms, "wake", without_room)
    loaded.wake("llama")
    states = loaded.model_states()
    assert (states["llama"].status, states["qwen3"].status) == ("loaded", "sleeping")
    monkeypatch.undo()
    loaded.wake("qwen3")


@pytest.mark.usefixtures("on_host")
def test_a_wake_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with Fleet.load(two()) as one:
        right = one.generate("llama", "hello", GREEDY)
        one.sleep("llama")
        full = memory()

        def broken(programs: ModelPrograms) -> None:
            raise RuntimeError("the link is down")

        monkeypatch.setattr(ModelPrograms, "wake", broken)
        stream = one.stream("llama", "hello", GREEDY)
        with pytest.raises(ModelUnavailable, match="llama could not be loaded: the link is down"):
            list(stream)
        monkeypatch.undo()
        state = one.model_states()["llama"]
        assert (state.status, state.error) == ("failed", "the link is down")
        assert memory() < full  # its weights are freed
        with pytest.raises(ModelUnavailable, match="the link is down"):
            one.stream("llama", "hello", GREEDY)
        for refused in (one.sleep, one.wake):
            with pytest.raises(WrongState, match=r"it is failed \(the link is down\)"):
                refused("llama")
        assert len(one.generate("qwen3", "hello", GREEDY)[0].token_ids) == 12
        one.load_model("llama")
        assert one.generate("llama", "hello", GREEDY) == right


def test_one_that_sleeps_from_the_start_is_loaded_by_its_first_request() -> None:
    with Fleet.load(two(sleeping=True)) as one:
        assert one.model_states()["llama"].status == "sleeping"
        assert not one.units[0].programs["llama"].programs()
        assert len(one.generate("llama", "hello", GREEDY)[0].token_ids) == 12
        assert one.model_states()["llama"].status == "loaded"


def test_a_first_load_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Fleet.load(two(sleeping=True)) as one:
        gc.collect()  # what other tests left is not to go meanwhile
        before = memory()

        def broken(programs: ModelPrograms, kind: str, size: int) -> None:
            raise RuntimeError("no compiler")

        monkeypatch.setattr(ModelPrograms, "compile", broken)
        with pytest.raises(ModelUnavailable, match="no compiler"):
            one.wake("llama")
        assert memory() == before


def test_pinned_models_never_sleep() -> None:
    with Fleet.load(two(pinned=True)) as one:
        with pytest.raises(WrongState, match="llama is pinned"):
            one.sleep("llama")
        with pytest.raises(UnknownModel, match="no model 'nobody'"):
            one.sleep("nobody")
        one.admin.lifecycle.idle_timeout = 1e-9
        assert one.admin.lifecycle.look() == ["qwen3"]
        assert one.model_states()["llama"].pinned
    for key in ({"sleeping": True}, {"idle_timeout": 3.0}):
        with pytest.raises(FleetConfigError, match="pinned models never sleep"):
            Fleet.load({"models": [entry("llama", pinned=True, **key)]}, warm_up=False)


def test_states_without_an_engine() -> None:
    with Fleet.load(two(), warm_up=False) as one:
        assert one.model_states() == {}


def test_weights_that_do_not_fit_the_host_stay_where_they_are(
    loaded: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(leaves: object, kind: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: host")

    monkeypatch.setattr(parking, "park", full)
    with pytest.raises(RuntimeError, match="host"):
        loaded.sleep("llama")
    assert loaded.model_states()["llama"].status == "loaded"
    assert len(loaded.generate("llama", "hello", GREEDY)[0].token_ids) == 12
