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
from muxjax.executor import weight_offload
from muxjax.executor.programs import ModelPrograms
from tests.muxjax.tiny_fleets import entry, fleet

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)


def two_models(**settings: Any) -> dict[str, Any]:
    """Returns a fleet file of two models; `settings` are for the first."""
    file = fleet("llama", "qwen3", max_seqs=2, prefill_tokens=16)
    file["models"][0] |= settings
    return file


@pytest.fixture(scope="module")
def loaded() -> Iterator[Fleet]:
    with Fleet.load(two_models(), poison=True) as fleet:
        yield fleet
        fleet.admin.wake("llama")
        fleet.units[0].engine.call(lambda scheduler: scheduler.check_invariants())
        stats = fleet.stats()
        assert all(model["kv_pages_used"] == 0 for model in stats["models"].values())


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleeping moves weights, as on a device with separate memory."""
    monkeypatch.setattr(weight_offload, "offload_memory_kind", lambda device: "pinned_host")


def bytes_of(fleet: Fleet, model: str) -> list[bytes]:
    leaves = fleet.units[0].programs[model].parameters
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def kinds_of(fleet: Fleet, model: str) -> set[str]:
    leaves = fleet.units[0].programs[model].parameters
    return {leaf.sharding.memory_kind for leaf in leaves}


def memory() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


def test_sleep_releases_pages_and_wake_restores_them(loaded: Fleet) -> None:
    before = loaded.stats()["models"]
    expected = loaded.generate("llama", "hello", GREEDY)
    loaded.admin.sleep("llama")
    loaded.admin.sleep("llama")  # does nothing
    states = loaded.model_states()
    assert (states["llama"].status, states["qwen3"].status) == ("sleeping", "loaded")
    asleep = loaded.stats()["models"]
    assert "llama" not in asleep
    assert asleep["qwen3"]["kv_pages_quota"] > before["qwen3"]["kv_pages_quota"]
    loaded.admin.wake("llama")
    loaded.admin.wake("llama")  # does nothing
    after = loaded.stats()["models"]
    assert after["llama"]["kv_pages_quota"] == before["llama"]["kv_pages_quota"]
    assert loaded.generate("llama", "hello", GREEDY) == expected


@pytest.mark.usefixtures("on_host")
def test_a_hundred_sleeps_keep_weights_and_memory(loaded: Fleet) -> None:
    expected, memories = bytes_of(loaded, "llama"), []
    for cycle in range(100):
        loaded.admin.sleep("llama")
        if cycle in (0, 99):
            assert kinds_of(loaded, "llama") == {"pinned_host"}
        loaded.admin.wake("llama")
        memories.append(memory())
    assert kinds_of(loaded, "llama") == {"device"}
    assert bytes_of(loaded, "llama") == expected
    assert len(set(memories[1:])) == 1


def test_requests_wake_a_sleeping_model_and_keep_their_order(loaded: Fleet) -> None:
    prompts = ["a", "bc", "def", "gh", "hello"]
    expected = [loaded.generate("llama", prompt, GREEDY)[0] for prompt in prompts]
    loaded.admin.sleep("llama")
    streams = [loaded.stream("llama", prompt, GREEDY) for prompt in prompts]
    for stream, answer in zip(streams, expected, strict=True):
        assert [t for delta in stream for t in delta.token_ids] == answer.token_ids
    assert loaded.model_states()["llama"].status == "loaded"


def test_requests_that_run_too_long_are_withdrawn_and_resumed(
    loaded: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = loaded.generate("llama", ["one", "two", "three"], LONG)
    monkeypatch.setattr(loaded.admin, "drain_seconds", 0.0)
    streams = [loaded.stream("llama", prompt, LONG) for prompt in ("one", "two", "three")]
    first = next(iter(streams[0]))
    loaded.admin.sleep("llama")  # the withdrawn requests wake it
    for stream, answer in zip(streams, expected, strict=True):
        begun = first.token_ids if stream is streams[0] else []
        rest = [t for delta in stream for t in delta.token_ids]
        assert begun + rest == answer.token_ids


def test_held_request_is_cancelled(loaded: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded.admin.sleep("llama")
    monkeypatch.setattr(loaded._router, "on_held", lambda model: None)
    stream = loaded.stream("llama", "hello", GREEDY)
    stream.cancel()
    assert [delta.finish_reason for delta in stream] == ["cancelled"]
    assert loaded.model_states()["llama"].status == "sleeping"
    loaded.admin.wake("llama")


def test_other_models_are_served_during_sleep_and_wake(loaded: Fleet) -> None:
    expected = loaded.generate("qwen3", "hello", LONG)
    errors, done = [], threading.Event()

    def generate() -> None:
        while not done.is_set():
            if loaded.generate("qwen3", "hello", LONG) != expected:
                errors.append(1)

    traffic = threading.Thread(target=generate)
    traffic.start()
    for _ in range(10):
        loaded.admin.sleep("llama")
        loaded.admin.wake("llama")
    done.set()
    traffic.join(30)
    assert not errors
    assert not traffic.is_alive()


def test_idle_models_sleep(loaded: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    admin = loaded.admin
    monkeypatch.setattr(loaded._router, "_clock", lambda: now[0])
    monkeypatch.setattr(admin, "idle_timeout", 60.0)
    for model in loaded.models:
        loaded.generate(model, "x", GREEDY)
    now[0] += 59.0
    assert admin.sleep_idle() == []
    loaded.generate("qwen3", "x", GREEDY)
    now[0] += 2.0
    assert admin.sleep_idle() == ["llama"]
    stream = loaded.stream("llama", "x", GREEDY)
    assert len([t for delta in stream for t in delta.token_ids]) == 12
    assert admin.sleep_idle() == []


def test_restarted_unit_keeps_models_asleep(loaded: Fleet) -> None:
    expected = loaded.generate("llama", "hello", GREEDY)
    loaded.admin.sleep("llama")
    loaded.restart("0", "a test")
    assert "llama" not in loaded.stats()["models"]
    assert loaded.generate("llama", "hello", GREEDY) == expected
    loaded.restart("0", "a test")
    assert loaded.generate("llama", "hello", GREEDY) == expected


def test_idle_model_sleeps_to_make_room(loaded: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded.admin.sleep("llama")
    wake, tries = ModelPrograms.restore, []

    def without_room(programs: ModelPrograms) -> None:
        tries.append(programs.name)
        if len(tries) == 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        wake(programs)

    monkeypatch.setattr(ModelPrograms, "restore", without_room)
    loaded.admin.wake("llama")
    states = loaded.model_states()
    assert (states["llama"].status, states["qwen3"].status) == ("loaded", "sleeping")
    monkeypatch.undo()
    loaded.admin.wake("qwen3")


@pytest.mark.usefixtures("on_host")
def test_failed_wake(monkeypatch: pytest.MonkeyPatch) -> None:
    with Fleet.load(two_models()) as fleet_of_two:
        expected = fleet_of_two.generate("llama", "hello", GREEDY)
        fleet_of_two.admin.sleep("llama")
        full = memory()

        def broken(programs: ModelPrograms) -> None:
            raise RuntimeError("the link is down")

        monkeypatch.setattr(ModelPrograms, "restore", broken)
        stream = fleet_of_two.stream("llama", "hello", GREEDY)
        with pytest.raises(ModelUnavailable, match="llama could not be loaded: the link is down"):
            list(stream)
        monkeypatch.undo()
        state = fleet_of_two.model_states()["llama"]
        assert (state.status, state.error) == ("failed", "the link is down")
        assert memory() < full  # its weights are freed
        with pytest.raises(ModelUnavailable, match="the link is down"):
            fleet_of_two.stream("llama", "hello", GREEDY)
        for refused in (fleet_of_two.admin.sleep, fleet_of_two.admin.wake):
            with pytest.raises(WrongState, match=r"it is failed \(the link is down\)"):
                refused("llama")
        assert len(fleet_of_two.generate("qwen3", "hello", GREEDY)[0].token_ids) == 12
        fleet_of_two.admin.load("llama")
        assert fleet_of_two.generate("llama", "hello", GREEDY) == expected


def test_first_request_loads_a_model_that_starts_asleep() -> None:
    with Fleet.load(two_models(sleeping=True)) as fleet_of_two:
        assert fleet_of_two.model_states()["llama"].status == "sleeping"
        assert not fleet_of_two.units[0].programs["llama"].programs()
        assert len(fleet_of_two.generate("llama", "hello", GREEDY)[0].token_ids) == 12
        assert fleet_of_two.model_states()["llama"].status == "loaded"


def test_failed_first_load_frees_all_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with Fleet.load(two_models(sleeping=True)) as fleet_of_two:
        gc.collect()  # so that arrays of other tests do not change `memory`
        before = memory()

        def broken(programs: ModelPrograms, kind: str, size: int) -> None:
            raise RuntimeError("no compiler")

        monkeypatch.setattr(ModelPrograms, "compile", broken)
        with pytest.raises(ModelUnavailable, match="no compiler"):
            fleet_of_two.admin.wake("llama")
        assert memory() == before


def test_pinned_models_never_sleep() -> None:
    with Fleet.load(two_models(pinned=True)) as fleet_of_two:
        with pytest.raises(WrongState, match="llama is pinned"):
            fleet_of_two.admin.sleep("llama")
        with pytest.raises(UnknownModel, match="no model 'unknown'"):
            fleet_of_two.admin.sleep("unknown")
        fleet_of_two.admin.idle_timeout = 1e-9
        assert fleet_of_two.admin.sleep_idle() == ["qwen3"]
        assert fleet_of_two.model_states()["llama"].pinned
    for key in ({"sleeping": True}, {"idle_timeout": 3.0}):
        with pytest.raises(FleetConfigError, match="pinned models never sleep"):
            Fleet.load({"models": [entry("llama", pinned=True, **key)]}, warm_up=False)


def test_states_without_an_engine() -> None:
    with Fleet.load(two_models(), warm_up=False) as fleet_of_two:
        assert fleet_of_two.model_states() == {}


def test_weights_that_do_not_fit_the_host_stay_on_the_device(
    loaded: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(leaves: object, kind: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: host")

    monkeypatch.setattr(weight_offload, "offload", full)
    with pytest.raises(RuntimeError, match="host"):
        loaded.admin.sleep("llama")
    assert loaded.model_states()["llama"].status == "loaded"
    assert len(loaded.generate("llama", "hello", GREEDY)[0].token_ids) == 12
