"""The interface between the scheduler and its policy: a policy proposes, the scheduler builds.

Before each step the scheduler calls `Policy.propose`, which yields proposals in order of
preference. The scheduler builds the first `StepProposal` that is possible, calls
`Policy.on_scheduled` with the step, and ignores the rest. A proposal is impossible if the model has
nothing to run in that phase, no free slot, no free pages, or all its tokens are in flight.

`propose` is usually a generator. It continues after a `yield` only if that proposal was impossible,
or was a `Defer` or `Recall`. The code after the `yield` therefore sees the updated queues and can
record the failure. It never continues after a proposal that was built.

A policy allocates nothing and changes no request, so it can be tested with a plain object that has
the attributes of `SchedulerView`. New policies are added with `registry.register_policy`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.fair_share import FairShare, Phase, StepKey
from muxjax.scheduling.model_state import ModelState
from muxjax.scheduling.requests import Request
from muxjax.scheduling.steps import Step


class StepProposal(NamedTuple):
    """A candidate for the next step.

    Attributes:
      model: name of the model.
      phase: 'prefill' or 'decode'.
      max_tokens: limit on the tokens of a prefill, or on the tokens per sequence of a decode, below
        the model's limits. Values below 1 count as 1; None sets no limit.
    """

    model: str
    phase: Phase
    max_tokens: int | None = None


class Defer(NamedTuple):
    """Puts a waiting request behind all others of its model, at most once for each request."""

    request: Request


class Recall(NamedTuple):
    """Puts the first deferred request of a model at the end of the model's queue."""

    model: str


type Proposal = StepProposal | Defer | Recall
"""A value that a policy yields. `Defer` and `Recall` are applied at once and build no step."""


@runtime_checkable
class SchedulerView(Protocol):
    """Read-only view of the scheduler for policies."""

    @property
    def models(self) -> Mapping[str, ModelState]:
        """State of each model by name, in the order in which the models were added."""
        ...

    @property
    def estimates(self) -> StepEstimates:
        """Expected durations of steps."""
        ...

    @property
    def fair_share(self) -> FairShare:
        """Shares, use and credit of device time of each (model, phase)."""
        ...

    @property
    def models_version(self) -> int:
        """A count that changes whenever models are added, removed or updated."""
        ...

    def backlog(self) -> tuple[list[StepKey], list[StepKey]]:
        """Prefills and decodes that have work, in the order of `models`; new lists.

        Deferred requests do not count. The credits of `fair_share` are up to date after this call.
        """
        ...

    def in_flight_keys(self) -> list[StepKey]:
        """Model and phase of each step in flight, oldest first."""
        ...

    def may_prefill(self, model: str) -> bool:
        """Whether a prefill may be possible; False if the model is known to lack pages or slots."""
        ...

    def is_settled(self, request: Request) -> bool:
        """Whether no step in flight contains the request."""
        ...


class Policy(ABC):
    """Chooses which model and phase runs next.

    Attributes:
      name: the policy's name in the fleet file.
    """

    name: ClassVar[str]

    @abstractmethod
    def propose(self, view: SchedulerView, now: float) -> Iterable[Proposal]:
        """Yields proposals for the next step, best first; see the docstring of this module.

        Args:
          view: state of the scheduler.
          now: current time, in seconds.
        """

    def on_scheduled(self, view: SchedulerView, step: Step, now: float) -> None:
        """Records the step that was built from the last proposal.

        Called before the step is charged to `fair_share` and counted as in flight.

        Args:
          view: state of the scheduler, with the step's requests already moved to their new groups.
          step: the step.
          now: current time, in seconds.
        """
        del view, step, now
