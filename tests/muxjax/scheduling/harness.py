"""A loop like the engine's around a scheduler and the mock executor, one step ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.expected_load import (
    MEAN_OUTPUT_TOKENS,
    MEAN_PROMPT_TOKENS,
    ExpectedLoad,
)
from muxjax.scheduling.policies.registry import create_policy
from muxjax.scheduling.requests import Request, RequestUpdate
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.specs import BucketLimits, ModelSpec
from muxjax.scheduling.steps import Prefill, Step
from muxjax.testing.mock_executor import MockExecutor, mock_tokens


def spec(
    name: str = "a",
    layers: int = 2,
    tokens_per_page: int = 4,
    max_model_len: int = 64,
    *,
    max_seqs: int = 4,
    prefill_tokens: int = 16,
    prefill_seqs: int = 4,
    decode_tokens: int = 4,
    rate: float = 1.0,
    prompt_tokens: float = MEAN_PROMPT_TOKENS,
    output_tokens: float = MEAN_OUTPUT_TOKENS,
    **fields: float | None,
) -> ModelSpec:
    limits = BucketLimits(max_seqs, prefill_tokens, prefill_seqs, decode_tokens)
    load = ExpectedLoad(rate, prompt_tokens, output_tokens)
    return ModelSpec(name, layers, tokens_per_page, max_model_len, limits, load, **fields)


def request(
    number: int,
    model: str = "a",
    prompt_tokens: int = 5,
    max_tokens: int = 6,
    *,
    stop_ids: Sequence[int] = (),
    **params: float | str | None,
) -> Request:
    """A request whose prompt is computed from its number, so that prompts differ."""
    prompt = [(number * 37 + i * i * 11 + 3) % 1009 for i in range(prompt_tokens)]
    settings = SamplingParams(max_tokens=max_tokens, temperature=0.0, **params)
    return Request(number, model, prompt, settings, tuple(stop_ids))


def isolated_tokens(scheduler: Scheduler, req: Request) -> list[int]:
    """The output tokens of the request without other load."""
    limit = scheduler.models[req.model].spec.max_model_len
    return mock_tokens(
        req.model,
        req.prompt,
        req.params,
        max_new_tokens=min(req.params.max_tokens, limit - len(req.prompt)),
        stop_ids=req.stop_ids,
    )


@dataclass
class Loop:
    """Drives a scheduler and checks its invariants at each turn.

    Attributes:
      unit: the scheduler.
      executor: the mock executor.
      depth: number of steps in flight while the next step is built; 1 in the engine.
      steps: all steps so far.
      updates: all updates so far.
      on_update: called with each update.
      check: whether to check invariants at each turn, which is slow with many requests.
    """

    scheduler: Scheduler
    executor: MockExecutor
    depth: int = 1
    steps: list[Step] = field(default_factory=list)
    updates: list[RequestUpdate] = field(default_factory=list)
    on_update: Callable[[RequestUpdate], None] | None = None
    check: bool = True

    @property
    def shapes(self) -> list[str]:
        """Steps as text: P and the sizes of the chunks, or D and the tokens of the sequences."""
        return [
            "P" + ",".join(str(len(chunk.tokens)) for chunk in step.chunks)
            if isinstance(step, Prefill)
            else "D" + ",".join(str(sequence.num_tokens) for sequence in step.sequences)
            for step in self.steps
        ]

    def __post_init__(self) -> None:
        self._pending: list[tuple[Step, object]] = []

    @classmethod
    def create(
        cls, specs: Sequence[ModelSpec], num_pages: int, policy: str = "adbs", **options: object
    ) -> Loop:
        """Creates a loop; `options` are arguments of the `Scheduler`."""
        return cls(
            Scheduler(specs, num_pages, create_policy(policy), record_freed=True, **options),
            MockExecutor(specs, num_pages),
        )

    def turn(self) -> bool:
        """Submits the next step and applies the oldest in flight; False if there is neither."""
        step = self.scheduler.next_step(self.executor.now)
        if self.check:
            self.scheduler.check_invariants()
        self.executor.poison(self.scheduler.take_freed_pages())
        if step is not None:
            self.steps.append(step)
            self._pending.append((step, self.executor.submit(step)))
        if self._pending and (step is None or len(self._pending) > self.depth):
            oldest, handle = self._pending.pop(0)
            result = self.executor.result(handle)
            for update in self.scheduler.apply(oldest, result, self.executor.now):
                self.updates.append(update)
                if self.on_update is not None:
                    self.on_update(update)
            if self.check:
                self.scheduler.check_invariants()
            return True
        return step is not None

    def run(self, max_turns: int = 10_000) -> None:
        """Repeats `turn` until there is neither a step to submit nor a result to apply."""
        for _ in range(max_turns):
            if not self.turn():
                assert self.scheduler.num_requests == 0, "requests wait and no step can be built"
                return
        raise AssertionError(f"not done after {max_turns} turns")

    def assert_empty(self) -> None:
        """Asserts that no request is left and that all pages and slots are free."""
        scheduler = self.scheduler
        assert scheduler.num_requests == 0
        assert scheduler.num_in_flight == 0
        assert scheduler.allocator.free_slabs == scheduler.allocator.num_slabs
        assert not any(map(scheduler.allocator.used_pages, scheduler.models))
        for state in scheduler.models.values():
            assert not state.has_prefill
            assert not state.has_decode
            assert len(state.free_slots) == state.spec.limits.max_seqs


def shorthand(loop: Loop) -> str:
    """Steps as letters: the name of the model, in upper case for a prefill step."""
    return "".join(
        step.model.upper() if isinstance(step, Prefill) else step.model for step in loop.steps
    )


def two_models(policy: str, tokens: int = 9) -> Loop:
    """Runs two models with two requests each, in the order of arrival a b a b."""
    specs = [spec("a", prefill_tokens=5, decode_tokens=4), spec("b", 3, decode_tokens=4)]
    loop = Loop.create(specs, 400, policy)
    for i in range(4):
        loop.scheduler.add(request(i, "ab"[i % 2], prompt_tokens=5, max_tokens=tokens))
    loop.run()
    return loop
