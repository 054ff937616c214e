"""Policies on a fake view instead of a scheduler, and proposals that can or cannot be built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.fair_share import FairShare, StepKey
from muxjax.scheduling.model_state import ModelState
from muxjax.scheduling.policies.interface import (
    Defer,
    Policy,
    Proposal,
    Recall,
    SchedulerView,
    StepProposal,
)
from muxjax.scheduling.policies.registry import create_policy, policy_names
from muxjax.scheduling.requests import Request, RequestState
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.steps import Prefill, Step
from tests.muxjax.scheduling.harness import request, spec


@dataclass
class FakeView:
    """A view of models with waiting prompts and nothing else."""

    models: dict[str, ModelState]
    estimates: StepEstimates
    fair_share: FairShare
    models_version: int = 0

    def backlog(self) -> tuple[list[StepKey], list[StepKey]]:
        prefills = [state.prefill_key for state in self.models.values() if state.first]
        self.fair_share.set_active(prefills)
        return prefills, []

    def in_flight_keys(self) -> list[StepKey]:
        return []

    def may_prefill(self, model: str) -> bool:
        return self.models[model].first is not None

    def is_settled(self, request: Request) -> bool:
        return request.last_step == 0


def fake_view(*waiting: str) -> FakeView:
    """Two models, with prompts of these in order of arrival."""
    view = FakeView(
        {name: ModelState(spec(name)) for name in "ab"}, StepEstimates("ab"), FairShare("ab")
    )
    for order, name in enumerate(waiting):
        prompt = request(order, name)
        prompt.order, prompt.max_new_tokens = order, 6
        view.models[name].enqueue(prompt)
    return view


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_proposes_the_models_that_have_prompts(name: str) -> None:
    view = fake_view("b")
    assert isinstance(view, SchedulerView)
    proposals = list(create_policy(name).propose(view, 0.0))
    assert proposals
    assert all(isinstance(proposal, StepProposal) for proposal in proposals)
    assert {proposal[:2] for proposal in proposals} == {("b", "prefill")}
    assert list(create_policy(name).propose(fake_view(), 0.0)) == []


def test_round_robin_continues_after_the_model_that_ran() -> None:
    policy, view = create_policy("round_robin"), fake_view("a", "b")
    for name in "abab":
        proposal = next(iter(policy.propose(view, 0.0)))
        assert proposal == StepProposal(name, "prefill")
        policy.on_scheduled(view, Prefill(name, []), 0.0)
    # A proposal that fails does not count as a turn.
    assert [p[0] for p in policy.propose(view, 0.0)] == ["a", "b"]
    assert [p[0] for p in policy.propose(view, 0.0)] == ["a", "b"]


@dataclass
class Scripted(Policy):
    """Yields given proposals and records what happens."""

    script: list[Proposal]
    resumed: list[Proposal] = field(default_factory=list)
    scheduled: list[Step] = field(default_factory=list)

    name = "scripted"

    def propose(self, view: SchedulerView, now: float) -> Iterator[Proposal]:
        for proposal in self.script:
            yield proposal
            self.resumed.append(proposal)

    def on_scheduled(self, view: SchedulerView, step: Step, now: float) -> None:
        assert view.in_flight_keys() == []
        self.scheduled.append(step)


def test_the_scheduler_builds_the_first_possible_proposal() -> None:
    impossible, possible = StepProposal("b", "prefill"), StepProposal("a", "prefill", 3)
    policy = Scripted([impossible, possible, StepProposal("a", "prefill")])
    scheduler = Scheduler([spec("a"), spec("b")], 200, policy)
    assert isinstance(scheduler, SchedulerView)
    scheduler.add(request(0, "a", prompt_tokens=5))
    step = scheduler.next_step(0.0)
    assert isinstance(step, Prefill)
    assert step.num_tokens == 3
    assert policy.resumed == [impossible]
    assert policy.scheduled == [step]
    assert scheduler.in_flight_keys() == [("a", "prefill")]


def test_without_a_possible_proposal_there_is_no_step() -> None:
    policy = Scripted([StepProposal("a", "decode"), StepProposal("a", "prefill")])
    scheduler = Scheduler([spec("a")], 200, policy)
    assert scheduler.next_step(0.0) is None
    assert policy.resumed == policy.script
    assert policy.scheduled == []


def test_requests_are_deferred_and_recalled_between_proposals() -> None:
    first, second = request(0), request(1)
    policy = Scripted([Defer(first), StepProposal("a", "prefill", 5)])
    scheduler = Scheduler([spec("a")], 200, policy)
    for prompt in (first, second):
        scheduler.add(prompt)
    step = scheduler.next_step(0.0)
    assert isinstance(step, Prefill)
    assert [chunk.request_id for chunk in step.chunks] == [1]
    assert first.state is RequestState.DEFERRED
    policy.script = [Recall("a")]
    assert scheduler.next_step(0.0) is None
    assert first.state is RequestState.WAITING
    assert first.deferred
    scheduler.check_invariants()
