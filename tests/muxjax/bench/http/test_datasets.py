"""Data sets, the models of their requests, and arrival times."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muxjax.bench.http.datasets import ArrivalPattern, Prompts, build_request_inputs, model_shares
from muxjax.bench.http.prompts import PromptGenerator
from muxjax.errors import BenchError, WorkloadError


def generators(*names: str, as_text: bool = False) -> dict[str, PromptGenerator]:
    counted_by = "words" if as_text else "token ids"
    return {name: PromptGenerator(counted_by, None, as_text, random.Random(name)) for name in names}


def test_random_lengths_and_popularity() -> None:
    prompts = Prompts(count=400, input_len=20, output_len=10, range_ratio=0.5)
    inputs = build_request_inputs(
        prompts, ArrivalPattern(), generators("a", "b"), model_shares(["a", "b"], 2.0)
    )
    assert len(inputs) == 400
    assert {len(request.prompt) for request in inputs} <= set(range(10, 31))
    assert all(len(request.prompt) == request.prompt_tokens for request in inputs)
    assert {request.output_tokens for request in inputs} <= set(range(5, 16))
    counts = Counter(request.model for request in inputs)
    assert 280 < counts["a"] < 360  # four fifths
    assert all(request.arrival == 0 for request in inputs)
    assert inputs == build_request_inputs(
        prompts, ArrivalPattern(), generators("a", "b"), model_shares(["a", "b"], 2.0)
    )


def test_a_prefix_is_shared_within_a_model() -> None:
    prompts = Prompts(count=6, input_len=5, output_len=1, prefix_len=4)
    inputs = build_request_inputs(prompts, ArrivalPattern(), generators("a"), {"a": 1.0})
    assert {request.prompt[:4] for request in inputs} == {inputs[0].prompt[:4]}
    assert {len(request.prompt) for request in inputs} == {inputs[0].prompt_tokens} == {9}
    texts = build_request_inputs(
        prompts, ArrivalPattern(), generators("a", as_text=True), {"a": 1.0}
    )
    assert len({" ".join(str(request.prompt).split()[:4]) for request in texts}) == 1


def test_due_times() -> None:
    times = ArrivalPattern(rate=10.0, burstiness=0.3).times(1000, seed=1)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(100)  # scaled as in vLLM
    gaps = np.diff([0.0, *times])
    assert 1.4 < gaps.std() / gaps.mean() < 2.4  # 1 / sqrt(0.3) = 1.8
    even = np.diff(ArrivalPattern(rate=10.0, burstiness=1e4).times(100, seed=1))
    assert even.std() < 0.1 * even.mean()
    ramp = np.diff(ArrivalPattern(ramp="linear", ramp_from=1, ramp_to=19).times(2000, seed=1))
    assert ramp[:200].mean() == pytest.approx(1 / 1.9, rel=0.25)
    assert ramp[-200:].mean() == pytest.approx(1 / 18.1, rel=0.25)
    steep = np.diff(ArrivalPattern(ramp="exponential", ramp_from=1, ramp_to=16).times(2000, seed=1))
    assert steep[900:1100].mean() == pytest.approx(1 / 4, rel=0.25)


def test_sharegpt_and_custom(tmp_path: Path) -> None:
    def talk(*texts: str) -> dict[str, Any]:
        return {"conversations": [{"from": "human", "value": text} for text in texts]}

    path = tmp_path / "sharegpt.json"
    question, answer = "Why is the sky blue?", "Because of how light is scattered."
    path.write_text(json.dumps([talk(question, answer), talk("short"), talk("a", "b")]))
    prompts = Prompts(name="sharegpt", path=path, count=3)
    inputs = build_request_inputs(
        prompts, ArrivalPattern(), generators("a", as_text=True), {"a": 1.0}
    )
    assert [
        (request.prompt, request.prompt_tokens, request.output_tokens) for request in inputs
    ] == [(question, 5, 6)] * 3  # repeated
    once = Prompts(name="sharegpt", path=path, count=3, oversample=False, fixed_output=9)
    (request,) = build_request_inputs(
        once, ArrivalPattern(), generators("a", as_text=True), {"a": 1.0}
    )
    assert request.output_tokens == 9

    lines = tmp_path / "custom.jsonl"
    lines.write_text('{"prompt": "one"}\n\n{"prompt": "two", "output_tokens": 3}\n')
    custom = Prompts(name="custom", path=lines, count=2, shuffle=False)
    inputs = build_request_inputs(
        custom, ArrivalPattern(), generators("a", as_text=True), {"a": 1.0}
    )
    assert [(request.prompt, request.output_tokens) for request in inputs] == [
        ("one", 256),
        ("two", 3),
    ]


def test_traces_have_times_and_models(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 0, "model": "x", "input_length": 3, "output_length": 4},
        {"timestamp": 500, "input_length": 5, "output_length": 6},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = Prompts(name="trace", path=path, count=10)
    inputs = build_request_inputs(
        prompts, ArrivalPattern(), generators("a"), {"a": 1.0}, {"x": "a"}
    )
    assert [(r.model, len(r.prompt), r.output_tokens, r.arrival) for r in inputs] == [
        ("a", 3, 4, 0.0),
        ("a", 5, 6, 0.5),
    ]
    with pytest.raises(WorkloadError, match="--map x=MODEL"):
        build_request_inputs(prompts, ArrivalPattern(), generators("a"), {"a": 1.0})
    with pytest.raises(BenchError, match="own arrival times"):
        build_request_inputs(prompts, ArrivalPattern(rate=1.0), generators("a"), {"a": 1.0})
    with pytest.raises(BenchError, match="--map"):
        build_request_inputs(
            Prompts(count=1), ArrivalPattern(), generators("a"), {"a": 1.0}, {"x": "a"}
        )


def test_burstgpt_lengths(tmp_path: Path) -> None:
    path = tmp_path / "burst.csv"
    head = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    path.write_text(head + "5,ChatGPT,7,8,15,Conversation log\n")
    (request,) = build_request_inputs(
        Prompts(name="burstgpt", path=path, count=1), ArrivalPattern(), generators("a"), {"a": 1.0}
    )
    assert (len(request.prompt), request.output_tokens, request.arrival) == (7, 8, 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "imagenet"}, "no data set 'imagenet'; there are random"),
        ({"path": Path("x")}, "takes no --dataset-path"),
        ({"name": "custom"}, "needs --dataset-path"),
        ({"count": 0}, "--num-prompts"),
        ({"input_len": 0}, "at least 1 token"),
        ({"fixed_output": 0}, "at least 1 token"),
        ({"range_ratio": 1.0}, "--random-range-ratio"),
    ],
)
def test_invalid_prompts(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        Prompts(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 0.0}, "--request-rate"),
        ({"rate": math.nan}, "--request-rate"),
        ({"burstiness": 0.0}, "--burstiness"),
        ({"ramp_from": 1.0}, "need --ramp-up-strategy"),
        ({"ramp": "linear"}, "needs --ramp-up-start-rps"),
        ({"ramp": "linear", "ramp_from": 2.0, "ramp_to": 1.0}, "must not be above"),
        ({"ramp": "exponential", "ramp_from": 0.0, "ramp_to": 1.0}, "must not be above"),
        ({"ramp": "linear", "ramp_from": 0.0, "ramp_to": 1.0, "rate": 3.0}, "exclude"),
    ],
)
def test_invalid_arrival_patterns(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        ArrivalPattern(**settings)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sharegpt", "[{}]", "no list of conversations"),
        ("sharegpt", "{}", "list of conversations"),
        ("sharegpt", "nonsense", "not JSON"),
        ("sharegpt", "[]", "no conversation"),
        ("custom", "nonsense", ":1: expected"),
        ("custom", '{"prompt": ""}', "non-empty"),
        ("custom", '{"prompt": "a", "output_tokens": 0}', "integer above 0"),
        ("custom", "", "no prompts"),
    ],
)
def test_invalid_files(tmp_path: Path, name: Any, text: str, message: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(BenchError, match=message):
        build_request_inputs(
            Prompts(name=name, path=path), ArrivalPattern(), generators("a"), {"a": 1.0}
        )
    with pytest.raises(BenchError):
        build_request_inputs(
            Prompts(name=name, path=tmp_path / "no"), ArrivalPattern(), generators("a"), {"a": 1.0}
        )
