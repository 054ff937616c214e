"""Step times of tiny models and their profile, and exact results for prescribed times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from muxjax.bench.isolated import measure_isolated
from muxjax.bench.profile_file import build_profile, write_profile
from muxjax.bench.session import BenchSession
from muxjax.bench.simulated_session import simulate_session
from muxjax.bench.step_recorder import measure_in_service, speed_now
from muxjax.bench.steps import (
    Kind,
    StepMeasurement,
    Timed,
    default_contexts,
    measure,
    step_kinds,
    step_rows,
)
from muxjax.errors import BenchError
from muxjax.placement.costs.profile_table import ProfileTable
from muxjax.placement.workload.trace import TraceRequest
from muxjax.scheduling.steps import Decode, Handle, Step
from muxjax.units.plan_inputs import model_shape


def test_a_fleet_is_measured_and_simulated(session: BenchSession, tmp_path: Path) -> None:
    done: list[Kind] = []
    measured = measure_in_service(session, repeats=1, contexts=[8, 60], done=done.append)
    kinds = step_kinds(session, [8, 60])
    assert done == 2 * kinds  # an uncounted round and a counted one
    assert len(step_rows(measured)) == len(measured.steps) == len(kinds)
    sizes = {(step.model, step.phase, step.size) for step in measured.steps}
    for name in ("llama", "qwen3"):
        buckets = session.buckets[name]
        assert {size for n, p, size in sizes if (n, p) == (name, "prefill")} == set(
            buckets.prefill_tokens
        )
        assert {size for n, p, size in sizes if (n, p) == (name, "decode")} == set(
            buckets.decode_seqs
        )
    assert set(measured.in_service) == sizes
    assert min(measured.in_service.values()) > 0
    assert speed_now(session, measured) > 0

    times = {name: measured.times(name) for name in session.models}
    profile = build_profile(
        times,
        {name: session.specs[name].limits for name in session.models},
        {name: model.max_model_len for name, model in session.models.items()},
    )
    path = tmp_path / "new" / "profile.json"
    write_profile(profile, path)
    shapes = {
        name: model_shape(model.config, weight_bits=32.0, embed_bits=32.0, kv_bits=32.0)
        for name, model in session.models.items()
    }
    table = ProfileTable(path, shapes)
    assert set(table.models) == set(session.models)
    assert set(table.step_times) == set(session.models)

    workload = [
        TraceRequest(0.0, "llama", 50, 7),
        TraceRequest(0.0, "qwen3", 9, 3),
        TraceRequest(0.001, "llama", 4, 1),
    ]
    records = simulate_session(session, table, workload, "adbs")
    assert [(record.id, record.made_tokens) for record in records] == [(0, 7), (1, 3), (2, 1)]
    assert records == simulate_session(session, table, workload, "adbs")
    assert all(record.ttft is not None and record.ttft > 0 for record in records)


def test_an_interrupt_keeps_complete_rounds(session: BenchSession) -> None:
    kinds = step_kinds(session, [60])
    seen: list[Kind] = []

    def stop(kind: Kind) -> None:
        seen.append(kind)
        if len(seen) == 3 * len(kinds) - 1:  # in the second counted round
            raise KeyboardInterrupt

    measured = StepMeasurement()
    with pytest.raises(KeyboardInterrupt):
        measure(session, repeats=5, contexts=[60], done=stop, into=measured)
    assert [(step.model, step.size) for step in measured.steps] == [
        (k.model, k.size) for k in kinds
    ]
    assert {len(step.seconds) for step in measured.steps} == {1}


def test_steps_do_not_exceed_the_longest_sequence(
    session: BenchSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[tuple[str, int]] = []
    submit = session.executor.submit

    def recording_submit(step: Step) -> Handle:
        if isinstance(step, Decode):
            ends.extend((step.model, sequence.num_blocks) for sequence in step.sequences)
        return submit(step)

    monkeypatch.setattr(session.executor, "submit", recording_submit)
    longest = {name: model.max_model_len for name, model in session.models.items()}
    measure(session, repeats=1, contexts=sorted({limit - 1 for limit in longest.values()}))
    for name, limit in longest.items():
        per_block = session.models[name].layout.tokens_per_page
        assert max(blocks for model, blocks in ends if model == name) == -(-limit // per_block)


def timed(
    phase: str, size: int, parts: int, context: int, ms: float, *, last: bool = True
) -> Timed:
    return Timed("m", phase, size, parts, context, last, (ms / 1e3,) * 3)


def test_components_follow_from_differences() -> None:
    measured = StepMeasurement(
        [
            timed("prefill", 32, 1, 32, 10.0),
            timed("prefill", 32, 1, 32, 8.0, last=False),
            timed("prefill", 32, 4, 8, 13.0),
            timed("prefill", 32, 1, 96, 16.0),
            timed("decode", 4, 1, 50, 3.0),
            timed("decode", 4, 5, 50, 11.0),
            timed("decode", 4, 5, 100, 16.0),
        ],
        {("m", "prefill", 32): 0.9, ("m", "decode", 4): 1.1, ("other", "decode", 4): 7.0},
    )
    times = measured.times("m")
    prefill, decode = times.prefill[32], times.decode[4]
    assert prefill.sample == pytest.approx(0.9 * 0.002)
    assert prefill.base == pytest.approx(0.9 * 0.007)  # 10 - 2 - 1
    assert dict(prefill.chunk) == pytest.approx({32: 0.9 * 0.001, 96: 0.9 * 0.007})
    assert decode.base == pytest.approx(1.1 * 0.001)
    assert dict(decode.token) == pytest.approx({50: 1.1 * 0.002, 100: 1.1 * 0.003})
    # One chunk that ends at 64: 7 + 4 + 2.
    assert times.prefill_seconds([(20, 64, True)]) == pytest.approx(0.9 * 0.013)
    assert times.decode_seconds(3, 6, 75) == pytest.approx(1.1 * (0.001 + 6 * 0.0025))


def test_invalid_measurements_are_errors(session: BenchSession) -> None:
    with pytest.raises(BenchError, match="--repeats"):
        measure(session, repeats=0)
    with pytest.raises(BenchError, match=r"--context 10000: llama accepts sequences of 1 to 255"):
        step_kinds(session, [10_000])
    with pytest.raises(BenchError, match="measurement of m is incomplete"):
        StepMeasurement([timed("decode", 1, 1, 1, 1.0)]).times("m")
    with pytest.raises(BenchError, match="cannot be written"):
        write_profile({}, Path("/proc/none/profile.json"))


def test_default_contexts() -> None:
    assert default_contexts(255, 3) == [31, 143, 255]
    assert default_contexts(255) == [31, 63, 95, 127, 159, 191, 223, 255]
    assert default_contexts(1) == [1]


def test_isolated_latency_is_measured_for_each_prompt_length(session: BenchSession) -> None:
    workload = [TraceRequest(0.0, "llama", tokens, 5) for tokens in (4, 9, 30)]
    steps: list[int] = []
    isolated = measure_isolated(session, workload, repeats=1, done=steps.append)
    assert [(row["model"], row["prompt_tokens"]) for row in isolated.rows] == [
        ("llama", 4),
        ("llama", 9),
        ("llama", 30),
        ("qwen3", 1),  # no requests in the workload
    ]
    assert all(row["ttft_s"] > 0 and row["tpot_s"] > 0 for row in isolated.rows)
    first = isolated.rows[0]
    assert isolated.costs.prefill_seconds("llama", 4, 4) == pytest.approx(first["ttft_s"])
    assert json.dumps(isolated.rows)
