"""Reads fleets and searches for plans, for `muxjax plan` and `muxjax simulate`."""

from __future__ import annotations

from pathlib import Path

from muxjax.config.fleet_file import FleetConfig, load_fleet_config
from muxjax.config.muxserve_yaml import read_muxserve
from muxjax.errors import FleetConfigError
from muxjax.placement.planner.plan import PlacementPlan
from muxjax.placement.planner.planner import PlannerOptions
from muxjax.placement.simulator.fleet_plan import plan_fleet
from muxjax.progress import Bars
from muxjax.units.plan_inputs import PlanInputs


def search_plan(inputs: PlanInputs, options: PlannerOptions, policy: str) -> PlacementPlan:
    """Searches for a plan and simulates it, with a progress bar on standard error.

    Args:
      inputs: models, cluster and costs.
      options: options of the search.
      policy: scheduling policy of the simulation.

    Raises:
      PlanError: no placement fits.
    """
    with Bars({"planning": 1000}, show=True) as bars:
        shown = 0

        def report(fraction: float, score: float) -> None:
            nonlocal shown
            bars.advance("planning", round(1000 * fraction) - shown, f"{score:.5g}")
            shown = round(1000 * fraction)

        return plan_fleet(
            inputs.loads,
            inputs.cluster,
            inputs.costs,
            options,
            policy=policy,
            profile=inputs.profile,
            report=report,
        )


def read_fleet(fleet_file: Path | None, muxserve: Path | None) -> FleetConfig:
    """Reads a fleet file or MuxServe's models.yaml.

    Raises:
      FleetConfigError: neither or both are given, or the file is invalid.
    """
    if (fleet_file is None) == (muxserve is None):
        raise FleetConfigError("give either a fleet file or --muxserve FILE")
    if fleet_file is not None:
        return load_fleet_config(fleet_file)

    assert muxserve is not None
    try:
        return load_fleet_config(read_muxserve(muxserve))
    except FleetConfigError as error:
        text = str(error)
        has_path = text.startswith(str(muxserve))
        raise FleetConfigError(text if has_path else f"{muxserve}: {text}") from error
