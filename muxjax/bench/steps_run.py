"""Runs of `muxjax bench steps`: step times with a progress bar, and the profile of a session."""

from __future__ import annotations

import sys
from typing import Any

from muxjax.bench.profile_file import build_profile
from muxjax.bench.session import BenchSession
from muxjax.bench.step_recorder import measure_in_service
from muxjax.bench.steps import Kind, StepMeasurement, step_kinds
from muxjax.progress import Bars


def measure_steps(
    session: BenchSession, repeats: int, contexts: list[int] | None
) -> StepMeasurement:
    """Measures the steps; after Ctrl-C, the result has the finished rounds."""
    kinds = step_kinds(session, contexts)
    measured = StepMeasurement()
    try:
        with Bars({"measuring": len(kinds) * (repeats + 1)}, show=True) as bars:

            def done(kind: Kind) -> None:
                bars.advance("measuring", 1, f"{kind.model} {kind.phase} {kind.size}")

            measure_in_service(
                session, repeats=repeats, contexts=contexts, done=done, into=measured
            )
    except KeyboardInterrupt:
        if not measured.steps:
            raise
        rounds = len(measured.steps[0].seconds)
        sys.stderr.write(
            f"muxjax: interrupted after {rounds} of {repeats} rounds; in-service factors are "
            f"missing\n"
        )
    return measured


def build_session_profile(session: BenchSession, measured: StepMeasurement) -> dict[str, Any]:
    """The profile, under the model names that the planner uses."""
    kinds = {entry.name: entry.profile or entry.name for entry in session.config.models}
    return build_profile(
        {kind: measured.times(name) for name, kind in kinds.items()},
        {kind: session.specs[name].limits for name, kind in kinds.items()},
        {kind: session.models[name].max_model_len for name, kind in kinds.items()},
    )
