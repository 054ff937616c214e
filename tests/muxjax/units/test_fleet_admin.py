"""Loading, unloading and replacing models of a running fleet; reloading its file."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from muxjax import Fleet, SamplingParams
from muxjax.errors import (
    CheckpointError,
    FleetConfigError,
    ModelUnavailable,
    PoolTooSmall,
    UnknownModel,
    WrongState,
)
from muxjax.units import model_loader
from tests.muxjax.tiny_fleets import entry
from tests.muxjax.units.harness import EXTRA, FILE, changed

STEP_BYTES = 10_000
"""More than the results of the last step, and less than the weights of a model."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)


def other_weights(model: dict[str, Any]) -> dict[str, Any]:
    return {**model, "config": {**model["config"], "seed": 7}}


@pytest.fixture(scope="module")
def shared() -> Iterator[Fleet]:
    with Fleet.load(FILE) as fleet:
        yield fleet
        fleet.units[0].engine.call(lambda scheduler: scheduler.check_invariants())


@pytest.fixture
def loaded(shared: Fleet) -> Iterator[Fleet]:
    """The shared fleet, restored to its file after each test."""
    gc.collect()  # so that arrays of other tests do not change `memory` during this test
    yield shared
    assert shared.admin.reload(FILE)["failed"] == {}
    for model in shared.models:
        shared.admin.wake(model)


def tokens(fleet: Fleet, model: str, params: SamplingParams = GREEDY) -> list[int]:
    return fleet.generate(model, "hello", params)[0].token_ids


def memory() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


class Traffic:
    """Threads that send requests to models in a `with` block, and fail the test on an error."""

    def __init__(self, fleet: Fleet, *models: str) -> None:
        self._fleet = fleet
        self._done = threading.Event()
        self.answers: dict[str, list[list[int]]] = {model: [] for model in models}
        self.errors: list[Exception] = []
        self._threads = [
            threading.Thread(target=self._generate, args=(model,)) for model in models * 2
        ]

    def _generate(self, model: str) -> None:
        while not self._done.is_set():
            try:
                self.answers[model].append(tokens(self._fleet, model, LONG))
            except Exception as error:  # noqa: BLE001  checked in `__exit__`
                self.errors.append(error)
                return

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads)
        assert self.errors == []


def test_load_and_unload_under_load(loaded: Fleet) -> None:
    expected = {model: tokens(loaded, model, LONG) for model in loaded.models}
    before = memory()
    with Traffic(loaded, *loaded.models) as traffic:
        loaded.admin.load(EXTRA)
        assert list(loaded.models) == ["llama", "qwen3", "extra"]
        assert tokens(loaded, "extra") == expected["qwen3"][:12]  # the same weights
        stats = loaded.stats()["models"]
        assert stats["extra"]["kv_pages_quota"] > 0
        with pytest.raises(WrongState, match="extra is loaded already"):
            loaded.admin.load(EXTRA)
        loaded.admin.unload("extra")
    for model, answers in traffic.answers.items():
        assert answers
        assert all(answer == expected[model] for answer in answers)
    assert "extra" not in loaded.models
    with pytest.raises(UnknownModel, match="no model 'extra'"):
        tokens(loaded, "extra")
    assert abs(memory() - before) < STEP_BYTES


def test_model_of_the_file_is_loaded_by_name(loaded: Fleet) -> None:
    expected = tokens(loaded, "qwen3")
    stream = loaded.stream("qwen3", "hello", LONG)
    loaded.admin.unload("qwen3")  # waits for the request
    assert len([t for delta in stream for t in delta.token_ids]) == 60
    loaded.admin.load("qwen3")
    assert tokens(loaded, "qwen3") == expected
    with pytest.raises(UnknownModel, match="with a complete entry"):
        loaded.admin.load("unknown")


def test_unload_ends_requests_after_the_drain_time(
    loaded: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded.admin, "drain_seconds", 0.0)
    stream = loaded.stream("qwen3", "hello", SamplingParams(max_tokens=240, ignore_eos=True))
    loaded.admin.unload("qwen3")
    with pytest.raises(ModelUnavailable, match="qwen3 is being unloaded"):
        list(stream)
    with pytest.raises(WrongState, match="llama is the last model of unit 0"):
        loaded.admin.unload("llama")


def test_model_that_does_not_fit_changes_nothing(loaded: Fleet) -> None:
    before, states = memory(), loaded.model_states()
    deep = entry("gemma3")
    with pytest.raises(FleetConfigError, match=r"block of gemma3 has 5 pages.*`sleeping: true`"):
        loaded.admin.load(deep)
    wide = {**EXTRA, "config": {**EXTRA["config"], "num_key_value_heads": 4, "head_dim": 1024}}
    with pytest.raises(FleetConfigError, match=r"extra needs 64 rows .* a page .* has 32"):
        loaded.admin.load(wide)
    with pytest.raises(PoolTooSmall):
        loaded.admin.load({**EXTRA, "kv_floor": 0.99})
    with pytest.raises(CheckpointError):
        loaded.admin.load({"name": "extra", "source": "/no/such/file.gguf"})
    with pytest.raises(WrongState, match="no unit '7'; there are 0"):
        loaded.admin.load(EXTRA, "7")
    assert loaded.model_states() == states
    assert abs(memory() - before) < STEP_BYTES


def test_reload_under_load(loaded: Fleet) -> None:
    old = tokens(loaded, "llama", LONG)
    with Traffic(loaded, *loaded.models) as traffic:
        llama = other_weights(entry("llama", rate=2.0))
        qwen3 = entry("qwen3", rate=3.0, slo={"ttft": 0.5})
        result = loaded.admin.reload(changed(llama=llama, qwen3=qwen3, extra=EXTRA))
        assert result == {
            "added": ["extra"],
            "removed": [],
            "replaced": ["llama"],
            "changed": ["qwen3"],
            "failed": {},
        }
        new = tokens(loaded, "llama", LONG)
    assert new != old
    assert {tuple(answer) for answer in traffic.answers["llama"]} <= {tuple(old), tuple(new)}
    spec = loaded.units[0].engine.call(lambda scheduler: scheduler.models["qwen3"].spec)
    assert (spec.load.rate, spec.targets.ttft) == (3.0, 0.5)
    assert loaded.admin.reload(FILE)["removed"] == ["extra"]
    assert tokens(loaded, "llama", LONG) == old


def test_invalid_file_changes_nothing(loaded: Fleet) -> None:
    states, expected = loaded.model_states(), tokens(loaded, "llama")
    invalid: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({**FILE, "policy": "fcfs"}, FleetConfigError, "policy: restart to change it"),
        ({**FILE, "pool": {"memory": "9MB"}}, FleetConfigError, "pool: restart to change it"),
        ({"models": []}, FleetConfigError, "models: must not be empty"),
        (changed(extra={**EXTRA, "kv_floor": 0.99}), PoolTooSmall, "pool too small"),
        (
            changed(llama=None, extra={"name": "extra", "source": "./none.gguf"}),
            CheckpointError,
            "none.gguf",
        ),
    ]
    for file, error, message in invalid:
        with pytest.raises(error, match=message):
            loaded.admin.reload(file)
        assert loaded.model_states() == states
    assert tokens(loaded, "llama") == expected


def test_failed_replacement_keeps_the_old_model(
    loaded: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, before = tokens(loaded, "llama"), memory()

    def broken(*arguments: object) -> None:
        raise RuntimeError("bad weights")

    monkeypatch.setattr(model_loader, "load_model_programs", broken)
    result = loaded.admin.reload(changed(llama=other_weights(entry("llama"))))
    assert result["failed"] == {"llama": "llama cannot be replaced: bad weights"}
    assert tokens(loaded, "llama") == expected
    assert abs(memory() - before) < STEP_BYTES


def test_sleeping_model_is_replaced_and_pinned(loaded: Fleet) -> None:
    old = tokens(loaded, "llama")
    loaded.admin.sleep("llama")
    loaded.admin.reload(changed(llama=other_weights(entry("llama"))))
    assert loaded.model_states()["llama"].status == "sleeping"
    assert tokens(loaded, "llama") != old
    loaded.admin.sleep("llama")
    loaded.admin.reload(changed(llama=other_weights(entry("llama", pinned=True))))
    state = loaded.model_states()["llama"]
    assert (state.status, state.pinned) == ("loaded", True)
