"""From one fleet file to the next: what differs, and what of it a running fleet can take.

The new file is checked as a whole before anything is done: all its checkpoints are opened, and the
pool is divided as it would be. Then models leave, expectations change, others are replaced, and new
ones come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from muxjax.config.fleet_file import FleetConfig, ModelEntry
from muxjax.errors import FleetConfigError, MuxError
from muxjax.units import build as loading
from muxjax.units.local_unit import LocalUnit
from muxjax.units.registry import ModelRegistry
from muxjax.units.unit_spec import ModelBuildSpec

_AT_ONCE = frozenset(
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
"""Keys of a model that a running one can take; others need its weights or programs anew."""
_OF_FLEET = frozenset({"models", "idle_timeout", "cluster"})
"""Keys of the file that need no restart."""


@dataclass(frozen=True)
class Changes:
    """What is to be done to models, by name.

    Attributes:
      added, removed: come and go.
      replaced: have another source or another shape.
      changed: are expected to do something else.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    replaced: tuple[str, ...]
    changed: tuple[str, ...]


def differences(
    before: FleetConfig, entries: Mapping[str, ModelEntry], after: FleetConfig
) -> Changes:
    """What has to be done.

    Args:
      before: the file that the fleet was started from.
      entries: what it serves now.
      after: the new file.

    Raises:
      FleetConfigError: something differs that needs a restart; all of it is named.
    """
    fixed = [
        key
        for key in FleetConfig.model_fields
        if key not in _OF_FLEET and getattr(before, key) != getattr(after, key)
    ]
    if fixed:
        raise FleetConfigError("\n".join(f"{key}: restart to change it" for key in fixed))
    wanted = {entry.name: entry for entry in after.models}
    both = [name for name in wanted if name in entries]
    differing = {name: _differing(entries[name], wanted[name]) for name in both}
    return Changes(
        added=tuple(name for name in wanted if name not in entries),
        removed=tuple(name for name in entries if name not in wanted),
        replaced=tuple(name for name in both if differing[name] - _AT_ONCE),
        changed=tuple(n for n in both if differing[n] and not differing[n] - _AT_ONCE),
    )


def _differing(one: ModelEntry, other: ModelEntry) -> set[str]:
    return {key for key in ModelEntry.model_fields if getattr(one, key) != getattr(other, key)}


def apply(
    changes: Changes, config: FleetConfig, units: Sequence[LocalUnit], membership: ModelRegistry
) -> dict[str, str]:
    """Does it.

    Args:
      changes: from `differences`.
      config: the new file.
      units: of the fleet.
      membership: who belongs to it.

    Returns:
      For each model that could not be brought to what the file says, why.

    Raises:
      MuxError: the new file cannot be had; nothing was done.
    """
    wanted = {entry.name: entry for entry in config.models}
    parts = _planned(changes, wanted, units, membership)
    faults: dict[str, str] = {}

    def attempt(action: Callable[..., None], names: Sequence[str], *arguments: object) -> None:
        try:
            action(*arguments)
        except MuxError as error:
            faults.update(dict.fromkeys(names, str(error)))

    def add() -> None:
        for name in changes.added:
            attempt(membership.load, [name], wanted[name])

    nobody_stays = not set(membership.entries()) - set(changes.removed)
    if nobody_stays:  # a pool is cut for some model
        add()
    for name in changes.removed:
        attempt(membership.unload, [name], name)
    if changes.changed:
        changed = {name: wanted[name] for name in changes.changed}
        attempt(membership.expect, changes.changed, changed)
    for name in changes.replaced:
        attempt(membership.replace, [name], parts[name])
    if not nobody_stays:
        add()
    return faults


def _planned(
    changes: Changes,
    wanted: Mapping[str, ModelEntry],
    units: Sequence[LocalUnit],
    membership: ModelRegistry,
) -> dict[str, ModelBuildSpec]:
    """Opens all new checkpoints, and sees whether the pools hold what there will be.

    Returns:
      The models that are replaced.
    """
    if len(units) > 1 and (changes.added or changes.removed or changes.replaced):
        names = ", ".join((*changes.added, *changes.removed, *changes.replaced))
        raise FleetConfigError(
            f"models: {names}: a fleet with a plan serves the models of its plan; plan again, and "
            "restart"
        )
    found = {}
    for unit in units:
        plan = unit.plan
        for name in plan.parts:
            if name in changes.changed:
                plan = plan.having(plan.parts[name].expecting(wanted[name]))
        for name in changes.removed:
            plan = plan.without(name)
        for name in (*changes.replaced, *changes.added):
            found[name] = loading.spec_added_model(plan, wanted[name])
            plan = plan.having(found[name])
        plan.make_unit()
    return {name: found[name] for name in changes.replaced}
