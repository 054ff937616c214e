"""A unit's process as a Ray actor. Only this module and `ray_fleet` import Ray.

The router restarts lost processes and resumes their requests. Ray must not (`max_restarts=0`).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from muxjax.cluster.messages import AddRequest, PollResult
from muxjax.cluster.unit_host import UnitHost
from muxjax.cluster.unit_process import configure_devices, load_unit_host
from muxjax.config.fleet_file import FleetConfig
from muxjax.engine.loaded_model import LoadedModel
from muxjax.errors import EngineDead, MuxError
from muxjax.placement.planner.plan import PlacementPlan

START_TIMEOUT = 600.0
"""Maximum seconds to start a process and load its unit, including the wait for a node."""
STATS_TIMEOUT = 10.0
"""Maximum seconds for a unit to return its counters."""
_RETRY_SECONDS = 1.0


class UnitActor:
    """The actor with a `UnitHost`. Requests and cancellations are processed in order.

    Args:
      platform: of its devices: 'cpu', 'gpu' or 'tpu'.
      devices: number of devices.
    """

    def __init__(self, platform: str, devices: int) -> None:
        configure_devices(platform, devices)
        self._host: UnitHost | None = None

    @ray.method(concurrency_group="poll")
    def load(
        self, config: FleetConfig, plan: PlacementPlan | None, name: str
    ) -> dict[str, LoadedModel]:
        """Loads the unit, and returns its models."""
        self._host = load_unit_host(config, plan, name)
        return self._host.models

    def submit(self, message: AddRequest) -> None:
        """See `UnitHost`."""
        self._loaded_host.submit(message)

    def cancel(self, request_id: int) -> None:
        """See `UnitHost`."""
        self._loaded_host.cancel(request_id)

    @ray.method(concurrency_group="poll")
    def poll(self, seconds: float) -> PollResult:
        """See `UnitHost`."""
        return self._loaded_host.poll(seconds)

    @ray.method(concurrency_group="stats")
    def stats(self) -> dict[str, Any]:
        """See `Peer`."""
        node = ray.get_runtime_context().get_node_id()
        return {**self._loaded_host.stats(), "node": node, "pid": os.getpid()}

    @property
    def _loaded_host(self) -> UnitHost:
        assert self._host is not None, "an actor is used only after `load`"
        return self._host


@dataclass(frozen=True)
class ActorPlacement:
    """Where a unit's process runs.

    Attributes:
      platform: of its devices: 'cpu', 'gpu' or 'tpu'.
      devices: number of devices.
      group: of all reserved devices.
      bundle: index of its devices' bundle in the group.
    """

    platform: str
    devices: int
    group: PlacementGroup
    bundle: int

    def options(self) -> Mapping[str, Any]:
        """Returns the options of the actor."""
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
      actor: handle of a loaded `UnitActor`.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def submit(self, message: AddRequest) -> None:
        """See `Peer`."""
        _call(self._actor.submit, message)

    def cancel(self, request_id: int) -> None:
        """See `Peer`."""
        _call(self._actor.cancel, request_id)

    def poll(self, seconds: float) -> PollResult:
        """See `Peer`."""
        return _get(_call(self._actor.poll, seconds))

    def stats(self) -> dict[str, Any]:
        """See `Peer`."""
        return _get(_call(self._actor.stats), STATS_TIMEOUT)

    def end(self) -> None:
        """See `Peer`."""
        # Ray may have been shut down, and the actor may have ended.
        with contextlib.suppress(RayError, ValueError, RuntimeError):
            ray.kill(self._actor)


def connect(
    placement: ActorPlacement,
    config: FleetConfig,
    plan: PlacementPlan | None,
    name: str,
    closing: threading.Event,
) -> tuple[RayPeer, dict[str, LoadedModel]]:
    """Starts the process of a unit and waits until it serves; see `remote_unit.Connect`.

    A process that ends earlier is started again, until `START_TIMEOUT`: Ray may have selected a
    machine whose loss it has not yet detected.

    Args:
      placement: of the process.
      config: of the fleet.
      plan: None if the fleet is one unit.
      name: of the unit.
      closing: set when the fleet is closed.

    Raises:
      MuxError: the unit cannot be loaded.
      EngineDead: the process did not start within `START_TIMEOUT`, or the fleet is closed.
    """
    groups: dict[str, Any] = {"concurrency_groups": {"poll": 1, "stats": 1}}
    remote: Any = ray.remote(**groups)(UnitActor)
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        actor = remote.options(**placement.options()).remote(placement.platform, placement.devices)
        peer = RayPeer(actor)
        try:
            models = _wait_loaded(actor.load.remote(config, plan, name), deadline, closing)
        except EngineDead:
            peer.end()
            if closing.wait(_RETRY_SECONDS) or time.monotonic() > deadline:
                raise
        except BaseException:
            peer.end()
            raise
        else:
            return peer, models


def _wait_loaded(ref: Any, deadline: float, closing: threading.Event) -> Any:
    while time.monotonic() < deadline:
        if closing.is_set():
            raise EngineDead("the engine is closed")
        if ray.wait([ref], timeout=_RETRY_SECONDS)[0]:
            return _get(ref)
    raise EngineDead(f"no process with the unit's devices was ready within {START_TIMEOUT:.0f} s")


def _call(method: Any, *arguments: Any) -> Any:
    try:
        return method.remote(*arguments)
    except RayError as error:
        raise EngineDead(f"its process cannot be reached: {_first_line(error)}") from error


def _get(ref: Any, seconds: float | None = None) -> Any:
    """Waits for the result of a call.

    Raises:
      MuxError: raised by the call.
      EngineDead: the process has ended, or does not answer in time.
    """
    try:
        return ray.get(ref, timeout=seconds)
    except GetTimeoutError as error:
        raise EngineDead(f"its process did not answer within {seconds} s") from error
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
