from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxjax.scheduling.expected_load import ExpectedLoad
from muxjax.scheduling.requests import Request
from muxjax.scheduling.specs import LatencySlo
from muxjax.scheduling.steps import Decode, Prefill
from muxjax.testing.mock_executor import MockLatency
from tests.muxjax.scheduling.harness import Loop, request, shorthand, spec, two_models


def arriving(loop: Loop, number: int, model: str = "a", **how: int) -> Request:
    """A request that comes now."""
    made = request(number, model, **how)
    made.arrival = loop.executor.now
    loop.unit.add(made)
    return made


def test_prompts_go_first_where_nothing_else_runs() -> None:
    assert shorthand(two_models("slo"))[:3] == "ABA"


def test_a_wave_of_prompts_is_let_in_before_decoding() -> None:
    loop = Loop.of([spec("a", 2, 4, 256, max_seqs=8, prefill_tokens=16)], 2000, "slo")
    for number in range(8):
        arriving(loop, number, prompt_tokens=16, max_tokens=30)
    loop.run()
    assert shorthand(loop).startswith("A" * 8)


def test_prompts_wait_for_each_other_while_many_decode() -> None:
    # A prefill of one prompt costs nearly what one of two does.
    specs = [spec("a", 1, 16, 512, max_seqs=32, prefill_tokens=64, prompt_tokens=8.0)]
    loop = Loop.of(specs, 2000, "slo")
    loop.executor.latency = MockLatency(prefill=0.05, prefill_token=0.0, decode=0.01)
    for tokens in (8, 16, 32):  # as a warm-up measures them
        loop.unit.estimates.observe_prefill("a", tokens, 0.05)
    for number in range(16):
        arriving(loop, number, prompt_tokens=8, max_tokens=200)
    for _ in range(30):
        loop.turn()
    before = len(loop.steps)
    first = arriving(loop, 100, prompt_tokens=8)
    for _ in range(4):
        loop.turn()
    second = arriving(loop, 101, prompt_tokens=8)
    loop.run()
    steps = [s for s in loop.steps[before:] if isinstance(s, Prefill)]
    assert {chunk.request_id for chunk in steps[0].chunks} == {first.id, second.id}


@pytest.mark.parametrize(("token", "made"), [(0.002, 4), (0.009, 3), (0.04, 1)])
def test_the_shortest_burst_is_four_tokens_or_30_ms(token: float, made: int) -> None:
    # A prefill costs as much a token however many it takes: nothing is saved by waiting.
    loop = Loop.of([spec("a", 1, 16, 512, prefill_tokens=64, decode_tokens=16)], 2000, "slo")
    loop.executor.latency = MockLatency(prefill=0.0, prefill_token=0.01, decode=token)
    for tokens in (8, 16, 32):
        loop.unit.estimates.observe_prefill("a", tokens, 0.01 * tokens)
    loop.unit.estimates.observe_decode("a", 1, 1, token)
    arriving(loop, 0, prompt_tokens=8, max_tokens=200)
    loop.run()
    decodes = [step.num_tokens for step in loop.steps if isinstance(step, Decode)]
    assert set(decodes[:20]) == {made}


def test_a_target_for_the_first_token_ends_the_wait() -> None:
    targets = LatencySlo(ttft=0.1)
    specs = [
        spec("a", 1, 16, 512, max_seqs=32, prefill_tokens=64, prompt_tokens=8.0, targets=targets)
    ]
    loop = Loop.of(specs, 2000, "slo")
    loop.executor.latency = MockLatency(prefill=0.02, prefill_token=0.0, decode=0.01)
    for number in range(16):
        arriving(loop, number, prompt_tokens=8, max_tokens=200)
    for _ in range(30):
        loop.turn()
    late = arriving(loop, 100, prompt_tokens=8)
    loop.run()
    assert late.first_token_at is not None
    assert late.first_token_at - late.arrival < 0.2


def test_late_requests_are_deferred_and_still_served() -> None:
    targets = LatencySlo(ttft=0.3)
    specs = [spec("a", 1, 16, 512, max_seqs=2, output_tokens=20.0, targets=targets)]
    loop = Loop.of(specs, 2000, "slo")
    old = [arriving(loop, number, max_tokens=20) for number in range(12)]
    for _ in range(10):
        loop.turn()
    loop.executor.now += 1.0  # all of those that wait are too late now
    fresh = arriving(loop, 100, max_tokens=20)
    loop.run()
    waited = [one for one in old if one.deferred]
    assert waited
    assert all(one.finished for one in old)
    assert fresh.first_token_at is not None
    assert fresh.first_token_at < min(one.first_token_at or 0.0 for one in waited[1:])
    loop.assert_empty()


def test_a_higher_priority_goes_first_and_no_request_starves() -> None:
    loop = Loop.of([spec("a", max_seqs=1)], 400, "slo")
    order: list[int] = []
    loop.on_update = lambda u: order.append(u.request.id) if u.finish_reason else None
    low = [request(number) for number in range(4)]
    high = request(50, priority=1)
    for one in [*low[:3], high, low[3]]:
        loop.unit.add(one)
    loop.run()
    assert order == [50, 0, 1, 2, 3]


@pytest.mark.parametrize("tpot", [None, 0.05])
def test_decodes_go_by_shares_until_tokens_are_due(tpot: float | None) -> None:
    specs = [
        spec("a", 1, 16, 512, decode_tokens=2),
        spec("b", 1, 16, 512, decode_tokens=2, targets=LatencySlo(tpot=tpot)),
    ]
    loop = Loop.of(specs, 2000, "slo")
    loop.executor.latency = MockLatency(prefill=0.001, prefill_token=0.0, decode=0.04)
    for number, name in enumerate("ab"):
        arriving(loop, number, name, max_tokens=100)
    for _ in range(40):
        loop.turn()
    made = [step.model for step in loop.steps[10:] if isinstance(step, Decode)]
    share = made.count("a") / len(made)
    # A token every 50 ms of steps of 40 ms leaves the other model little.
    assert share < 0.35 if tpot else 0.4 < share < 0.6


@pytest.mark.parametrize("tpot", [None, 0.012])
def test_long_prompts_are_chunked_if_tokens_of_others_are_due(tpot: float | None) -> None:
    # A prompt of 4,096 tokens, of which 1,024 in one step would take 0.8 s.
    specs = [
        spec("a", 1, 16, 8192, prefill_tokens=1024),
        spec("b", 1, 16, 2048, decode_tokens=2, targets=LatencySlo(tpot=tpot)),
    ]
    loop = Loop.of(specs, 2000, "slo")
    loop.check = False
    loop.executor.latency = MockLatency(prefill=0.005, prefill_token=0.0008, decode=0.01)
    for tokens in (256, 1024):
        loop.unit.estimates.observe_prefill("a", tokens, 0.005 + 0.0008 * tokens)
    arriving(loop, 0, "b", max_tokens=400)
    for _ in range(10):
        loop.turn()
    came: list[float] = []
    loop.on_update = lambda u: came.append(loop.executor.now) if u.request.id == 0 else None
    long = arriving(loop, 1, "a", prompt_tokens=4096, max_tokens=2)
    loop.run()
    gaps = [later - sooner for sooner, later in itertools.pairwise(came)]
    chunks = [s.chunks[0] for s in loop.steps if isinstance(s, Prefill) and s.model == "a"]
    assert len(chunks) == (16 if tpot else 4)
    # A part takes 0.21 s, and between two there is one burst.
    assert max(gaps) < 0.3 if tpot else max(gaps) > 0.8
    assert (long.finished_at or 0.0) - long.arrival < 5.0


def test_tight_targets_for_whole_requests_go_before_shares_while_all_can_be_kept() -> None:
    # Steps of 10 ms. One model needs a token every 20 ms, three others every 100 ms: 0.8 of the
    # time in all. A quarter of it would not do for the first, and is more than the others need.
    specs = [
        spec(name, 1, 16, 512, decode_tokens=2, targets=LatencySlo(None, None, 2.0, 0.02, alone))
        for name, alone in zip("abcd", (0.01, 0.05, 0.05, 0.05), strict=True)
    ]
    loop = Loop.of(specs, 2000, "slo")
    loop.executor.latency = MockLatency(prefill=0.001, prefill_token=0.0, decode=0.01)
    for name in "abcd":
        loop.unit.estimates.observe_decode(name, 1, 1, 0.01)
    made = [arriving(loop, number, name, max_tokens=80) for number, name in enumerate("abcd")]
    loop.run()
    ends = [one.finished_at or 0.0 for one in made]
    assert ends[0] <= 80 * 0.02 + 0.04
    assert max(ends) <= 80 * 0.04  # the time is not left idle


def test_late_requests_behind_the_first_of_the_queue_do_not_overtake_it() -> None:
    targets = LatencySlo(scale=4.0, isolated_ttft=0.02, isolated_tpot=0.01)
    specs = [spec("a", 1, 16, 512, max_seqs=2, output_tokens=50.0, targets=targets)]
    loop = Loop.of(specs, 2000, "slo")
    for number in range(2):
        arriving(loop, number, max_tokens=40)
    for _ in range(4):
        loop.turn()
    patient, hasty = arriving(loop, 10, max_tokens=100), arriving(loop, 11, max_tokens=2)
    loop.executor.now += 0.2
    loop.turn()
    assert hasty.deferred
    assert not patient.deferred
    loop.run()
    assert patient.finished
    assert hasty.finished


def test_prompts_wait_where_more_sequences_would_make_all_late() -> None:
    # Three models that make their tokens just in time; prompts of one of them come.
    targets = LatencySlo(scale=5.2, isolated_ttft=0.02, isolated_tpot=0.01)
    specs = [spec(name, 1, 16, 512, decode_tokens=2, targets=targets) for name in "abc"]
    loop = Loop.of(specs, 2000, "slo")
    for name in "abc":
        loop.unit.estimates.observe_decode(name, 1, 1, 0.01)
        loop.unit.estimates.observe_decode(name, 2, 1, 0.035)
    loop.executor.latency = MockLatency(prefill=0.001, prefill_token=0.0, decode=0.01)
    first = [arriving(loop, number, name, max_tokens=30) for number, name in enumerate("abc")]
    for _ in range(12):
        loop.turn()
    later = [arriving(loop, number, "a", max_tokens=10) for number in (10, 11, 12)]
    loop.run()
    ended = min(one.finished_at or 0.0 for one in first)
    for one in later:
        assert one.finished
        assert ended < (one.first_token_at or 0.0)


@pytest.mark.parametrize("step", [0.01, 0.1])
@pytest.mark.parametrize(("names", "scale", "most"), [("ab", 2, 3), ("abc", 2, 4), ("abc", 8, 999)])
def test_with_targets_too_tight_for_turns_the_oldest_sequence_goes_first(
    step: float, names: str, scale: float, most: int
) -> None:
    # Three models in turn need one and a half times what scale 2 allows, two all of it, with
    # nothing left for prefills. However long steps take: requests last for 0.8 and for 8 s.
    targets = LatencySlo(scale=scale, isolated_ttft=2 * step, isolated_tpot=step)
    specs = [
        spec(
            name,
            1,
            16,
            512,
            prefill_seqs=8,
            prefill_tokens=64,
            decode_tokens=2,
            output_tokens=80.0,
            targets=targets,
        )
        for name in names
    ]
    loop = Loop.of(specs, 2000, "slo")
    loop.executor.latency = MockLatency(prefill=step / 10, prefill_token=0.0, decode=step)
    for name in names:
        for size in (1, 2):
            loop.unit.estimates.observe_decode(name, size, 1, step)
    made = [arriving(loop, number, name, max_tokens=80) for number, name in enumerate(names)]
    loop.run()
    assert all(one.finished for one in made)
    decodes = [step.model for step in loop.steps if isinstance(step, Decode)]
    turns = sum(one != other for one, other in itertools.pairwise(decodes))
    assert turns <= most
    if scale > 2:
        assert turns > 10


def test_the_oldest_sequence_leaves_the_others_their_share() -> None:
    targets = LatencySlo(scale=1.0, isolated_ttft=0.02, isolated_tpot=0.01)
    specs = [
        spec(name, 1, 16, 512, decode_tokens=2, output_tokens=50.0, targets=targets)
        for name in "ab"
    ]
    loop = Loop.of(specs, 2000, "slo")
    loop.executor.latency = MockLatency(prefill=0.001, prefill_token=0.0, decode=0.04)
    made = [arriving(loop, number, name, max_tokens=400) for number, name in enumerate("ab")]
    loop.run()
    first, second = (one.finished_at or 0.0 for one in made)
    # 16 s of decodes each; no model is ahead by more than a few requests of mean length.
    assert abs(first - second) < 6


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"),
            st.integers(1, 40),
            st.integers(1, 30),
            st.integers(-2, 2),
            st.floats(0, 0.2),
        ),
        min_size=1,
        max_size=30,
    ),
    st.sampled_from([0.01, 1.0, 50.0]),
)
def test_every_request_ends(asked: list[tuple[str, int, int, int, float]], scale: float) -> None:
    targets = LatencySlo(scale=scale)
    specs = [spec("a", 2, 4, 96, targets=targets), spec("b", 3, 4, 96, max_seqs=2, targets=targets)]
    loop = Loop.of(specs, 3 + 3 * 50, "slo")
    made = []
    for number, (model, prompt, tokens, priority, gap) in enumerate(asked):
        one = request(number, model, prompt, tokens, priority=priority)
        one.arrival = loop.executor.now
        loop.unit.add(one)
        made.append(one)
        loop.executor.now += gap
        loop.turn()
    loop.run()
    assert all(one.finished for one in made)
    loop.assert_empty()


def first_tokens(*, greedy: int) -> list[float]:
    """Times to the first token of a modest model's requests beside a greedy one's long queue."""
    specs = [
        spec("greedy", 2, 16, 2048, max_seqs=64, prefill_tokens=256, decode_tokens=8),
        spec("modest", 2, 16, 2048, max_seqs=64, prefill_tokens=256, decode_tokens=8),
    ]
    specs = [replace(one, load=ExpectedLoad(one.load.rate, 64.0, 30.0)) for one in specs]
    loop = Loop.of(specs, 2 + 2 * 4000, "slo")
    loop.check = False
    loop.executor.latency = MockLatency(prefill=0.01, prefill_token=2e-4, decode=0.01)
    for number in range(greedy):
        arriving(loop, number, "greedy", prompt_tokens=1000, max_tokens=500)
    modest: list[Request] = []
    for _ in range(1200):
        if loop.executor.now >= 0.25 * (len(modest) + 1) and len(modest) < 40:
            modest.append(
                arriving(loop, 5000 + len(modest), "modest", prompt_tokens=64, max_tokens=30)
            )
        if not loop.turn() and not greedy:
            loop.executor.now += 0.01
        if len(modest) == 40 and all(one.finished for one in modest):
            break
    return sorted(one.first_token_at - one.arrival for one in modest if one.first_token_at)


def test_a_greedy_neighbor_at_most_doubles_the_latency() -> None:
    isolated, beside = first_tokens(greedy=0), first_tokens(greedy=1000)
    assert len(isolated) == len(beside) == 40
    assert beside[-1] <= 2 * isolated[-1]
