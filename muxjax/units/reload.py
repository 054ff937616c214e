"""Compares a new fleet file with a running fleet, and checks that the changes are possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from muxjax.config.fleet_file import FleetConfig
from muxjax.config.model_entry import ModelEntry
from muxjax.errors import FleetConfigError
from muxjax.units.build_unit_spec import build_added_model_spec
from muxjax.units.local_unit import LocalUnit
from muxjax.units.unit_spec import ModelBuildSpec

_CHANGEABLE = frozenset(
    {
        "rate",
        "prompt_tokens",
        "output_tokens",
        "kv_floor",
        "slo",
        "profile",
        "pinned",
        "idle_timeout",
        "sleeping",
    }
)
"""Keys of a model that can change while it is served; any other key reloads the model."""
_RELOADABLE = frozenset({"models", "idle_timeout", "cluster"})
"""Top-level keys that can change without a restart."""


@dataclass(frozen=True)
class FleetChanges:
    """The changes of a fleet's models, by name.

    Attributes:
      added: new models.
      removed: models that are not in the new file.
      replaced: models with another source or shape, which are reloaded.
      changed: models with another expected load, floor, SLO, pin or timeout.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    replaced: tuple[str, ...]
    changed: tuple[str, ...]


def diff_fleet(
    before: FleetConfig, entries: Mapping[str, ModelEntry], after: FleetConfig
) -> FleetChanges:
    """Returns the changes from a running fleet to a new fleet file.

    Args:
      before: the file that was applied last.
      entries: the fleet's present models, by name.
      after: the new file.

    Raises:
      FleetConfigError: keys differ that need a restart; the message lists them.
    """
    fixed = [
        key
        for key in FleetConfig.model_fields
        if key not in _RELOADABLE and getattr(before, key) != getattr(after, key)
    ]
    if fixed:
        raise FleetConfigError("\n".join(f"{key}: restart to change it" for key in fixed))
    wanted = {entry.name: entry for entry in after.models}
    common = [name for name in wanted if name in entries]
    differing = {name: _differing_keys(entries[name], wanted[name]) for name in common}
    return FleetChanges(
        added=tuple(name for name in wanted if name not in entries),
        removed=tuple(name for name in entries if name not in wanted),
        replaced=tuple(name for name in common if differing[name] - _CHANGEABLE),
        changed=tuple(n for n in common if differing[n] and not differing[n] - _CHANGEABLE),
    )


def check_changes(
    changes: FleetChanges, wanted: Mapping[str, ModelEntry], units: Sequence[LocalUnit]
) -> dict[str, ModelBuildSpec]:
    """Checks changes before any is applied: opens new checkpoints, lays out the pools.

    Args:
      changes: from `diff_fleet`.
      wanted: entries of the new file, by name.
      units: of the fleet.

    Returns:
      The specs of the replaced models, by name.

    Raises:
      FleetConfigError: a new model does not fit the pool's layout, or models of a fleet with
        several units would be added, removed or replaced.
      PoolTooSmall: a pool cannot hold a request of each model.
      CheckpointError, DownloadError: a new checkpoint cannot be opened.
    """
    if len(units) > 1 and (changes.added or changes.removed or changes.replaced):
        names = ", ".join((*changes.added, *changes.removed, *changes.replaced))
        raise FleetConfigError(
            f"models: {names}: a fleet with a plan serves the models of its plan; change the plan, "
            "and restart"
        )
    specs: dict[str, ModelBuildSpec] = {}
    for unit in units:
        unit_spec = unit.spec
        for name, model_spec in unit.spec.model_specs.items():
            if name in changes.changed:
                unit_spec = unit_spec.add_model(model_spec.update_expectations(wanted[name]))
        for name in changes.removed:
            unit_spec = unit_spec.remove_model(name)
        for name in (*changes.replaced, *changes.added):
            specs[name] = build_added_model_spec(unit_spec, wanted[name])
            unit_spec = unit_spec.add_model(specs[name])
        unit_spec.build_scheduler()  # raises PoolTooSmall
    return {name: specs[name] for name in changes.replaced}


def _differing_keys(before: ModelEntry, after: ModelEntry) -> set[str]:
    return {key for key in ModelEntry.model_fields if getattr(before, key) != getattr(after, key)}
