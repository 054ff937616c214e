"""A unit's process as a Ray actor. The one module, with `ray_fleet`, that imports Ray.

Ray starts no actor anew by itself (`max_restarts=0`): the router does, which knows the requests.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from muxjax.cluster.messages import AddRequest, PollResult
from muxjax.cluster.unit_process import load_host, prepare_devices
from muxjax.config.fleet_file import FleetConfig
from muxjax.errors import EngineDead, MuxError
from muxjax.placement.planner.plan import PlacementPlan

if TYPE_CHECKING:
    from muxjax.cluster.unit_host import UnitHost
    from muxjax.units.unit_spec import LoadedModel

START_SECONDS = 600.0
"""Most seconds from asking for a process to a unit that serves, the wait for a node included."""
STATS_SECONDS = 10.0
_PAUSE = 1.0


class UnitActor:
    """The far end: calls of a `UnitHost`. Requests and cancellations come one after the other."""

    def __init__(self, platform: str, devices: int) -> None:
        prepare_devices(platform, devices)
        self._host: UnitHost | None = None

    @ray.method(concurrency_group="report")
    def load(
        self, config: FleetConfig, plan: PlacementPlan | None, name: str
    ) -> dict[str, LoadedModel]:
        """Loads the unit; what it holds."""
        self._host = load_host(config, plan, name)
        return self._host.models

    def submit(self, asked: AddRequest) -> None:
        """See `UnitHost`."""
        self._loaded.submit(asked)

    def cancel(self, request_id: int) -> None:
        """See `UnitHost`."""
        self._loaded.cancel(request_id)

    @ray.method(concurrency_group="report")
    def report(self, seconds: float) -> PollResult:
        """See `UnitHost`."""
        return self._loaded.report(seconds)

    @ray.method(concurrency_group="stats")
    def stats(self) -> dict[str, Any]:
        """See `Peer`."""
        node = ray.get_runtime_context().get_node_id()
        return {**self._loaded.stats(), "node": node, "pid": os.getpid()}

    @property
    def _loaded(self) -> UnitHost:
        assert self._host is not None, "nobody has the actor before it is loaded"
        return self._host


@dataclass(frozen=True)
class ActorPlacement:
    """Where a unit's process runs.

    Attributes:
      platform: of its devices: 'cpu', 'gpu' or 'tpu'.
      devices: how many.
      group, bundle: the reserved devices that they are of.
    """

    platform: str
    devices: int
    group: PlacementGroup
    bundle: int

    def options(self) -> Mapping[str, Any]:
        """Of the actor."""
        kinds: dict[str, dict[str, Any]] = {
            "cpu": {"num_cpus": self.devices},
            "gpu": {"num_cpus": 0, "num_gpus": self.devices},
            "tpu": {"num_cpus": 0, "resources": {"TPU": self.devices}},
        }
        return {
            **kinds[self.platform],
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self.group, placement_group_bundle_index=self.bundle
            ),
            "max_restarts": 0,
            "max_task_retries": 0,
        }


class RayPeer:
    """See `remote_engine.Peer`.

    Args:
      actor: a `UnitActor`, loaded.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def submit(self, asked: AddRequest) -> None:
        """See `Peer`."""
        _called(self._actor.submit, asked)

    def cancel(self, request_id: int) -> None:
        """See `Peer`."""
        _called(self._actor.cancel, request_id)

    def report(self, seconds: float) -> PollResult:
        """See `Peer`."""
        return _got(_called(self._actor.report, seconds))

    def stats(self) -> dict[str, Any]:
        """See `Peer`."""
        return _got(_called(self._actor.stats), STATS_SECONDS)

    def end(self) -> None:
        """See `Peer`."""
        # Ray itself may have been shut down, and the actor be long gone.
        with contextlib.suppress(RayError, ValueError, RuntimeError):
            ray.kill(self._actor)


def connect(
    place: ActorPlacement,
    config: FleetConfig,
    plan: PlacementPlan | None,
    name: str,
    closing: threading.Event,
) -> tuple[RayPeer, dict[str, LoadedModel]]:
    """Starts the process of a unit and waits until it serves; see `remote_unit.Connect`.

    A process that ends before that is started again until `START_SECONDS` are over: Ray notices a
    lost machine late, and may start the process there.

    Raises:
      MuxError: the unit cannot be loaded, or `START_SECONDS` are over.
    """
    groups: dict[str, Any] = {"concurrency_groups": {"report": 1, "stats": 1}}
    remote: Any = ray.remote(**groups)(UnitActor)
    until = time.monotonic() + START_SECONDS
    while True:
        actor = remote.options(**place.options()).remote(place.platform, place.devices)
        peer = RayPeer(actor)
        try:
            models = _loaded(actor.load.remote(config, plan, name), until, closing)
        except EngineDead:
            peer.end()
            if closing.wait(_PAUSE) or time.monotonic() > until:
                raise
        except BaseException:
            peer.end()
            raise
        else:
            return peer, models


def _loaded(ref: Any, until: float, closing: threading.Event) -> Any:
    while time.monotonic() < until:
        if closing.is_set():
            raise EngineDead("the engine is closed")
        if ray.wait([ref], timeout=_PAUSE)[0]:
            return _got(ref)
    raise EngineDead(f"no process with the unit's devices was ready in {START_SECONDS:.0f} s")


def _called(method: Any, *arguments: Any) -> Any:
    try:
        return method.remote(*arguments)
    except RayError as error:
        raise EngineDead(f"its process cannot be reached: {_first_line(error)}") from error


def _got(ref: Any, seconds: float | None = None) -> Any:
    """What a call gave.

    Raises:
      MuxError: what the call raised.
      EngineDead: the process is gone, or does not answer in time.
    """
    try:
        return ray.get(ref, timeout=seconds)
    except GetTimeoutError as error:
        raise EngineDead(f"its process did not answer in {seconds} s") from error
    except RayTaskError as error:
        if isinstance(error.cause, MuxError):
            raise error.cause from error
        raise EngineDead(f"its process failed: {_last_line(error)}") from error
    except RayError as error:
        raise EngineDead(f"its process is gone: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2]
