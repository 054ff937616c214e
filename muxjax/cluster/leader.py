"""The leader: the host of a mesh that schedules, and sends each program to the followers.

A mesh that has lost a host cannot continue, and the other hosts cannot restart it. All processes
exit, and the service manager must start them again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from muxjax.cluster.fixed_models import check_models_stay_awake
from muxjax.cluster.host_list import Hosts
from muxjax.cluster.hosts import build_shared_unit_spec, connect_hosts, exit_process, join
from muxjax.cluster.wire import Link, WireMessage
from muxjax.config.fleet_file import FleetConfig, load_fleet_config
from muxjax.errors import ClusterError, WrongState
from muxjax.executor.compilation_cache import enable_compilation_cache
from muxjax.executor.jax_executor import JaxExecutor
from muxjax.executor.model_slots import ModelSlots
from muxjax.executor.programs import ModelPrograms
from muxjax.executor.step_functions import StepOutput
from muxjax.fleet import Fleet
from muxjax.units.build import build_unit
from muxjax.units.local_unit import LocalUnit
from muxjax.units.unit_spec import UnitSpec


class LeadingExecutor(JaxExecutor):
    """A `JaxExecutor` that first sends every launch to the followers. Its models are fixed.

    Args:
      spec: of the unit.
      programs: of its models, compiled and with weights.
      links: to the followers.
      on_lost: called with the reason when a follower cannot be reached.
    """

    def __init__(
        self,
        spec: UnitSpec,
        programs: Mapping[str, ModelPrograms],
        *,
        links: Sequence[Link],
        on_lost: Callable[[str], None],
    ) -> None:
        super().__init__(spec.devices, programs, spec.kv, dummy_pages=spec.dummy_pages)
        self._links = links
        self._on_lost = on_lost

    def launch(
        self, name: str, kind: str, size: int, inputs: Sequence[np.ndarray | None]
    ) -> StepOutput:
        """See `JaxExecutor.launch`."""
        fields = {"model": name, "kind": kind, "size": size}
        message = WireMessage("launch", fields, inputs).encode()
        try:
            for link in self._links:
                link.send(message)
        except ClusterError as error:
            self._on_lost(str(error))
        return super().launch(name, kind, size, inputs)

    def add_model(self, name: str, model: ModelSlots) -> None:
        """Raises `WrongState`: the followers would not have the model."""
        raise WrongState(f"{name} cannot be added: the models of a mesh over hosts are fixed")

    def remove_model(self, name: str) -> None:
        """Raises `WrongState`: the followers would keep the model."""
        raise WrongState(f"{name} cannot be removed: the models of a mesh over hosts are fixed")


@contextmanager
def lead_fleet(source: FleetConfig | Mapping[str, Any] | str, hosts: Hosts) -> Iterator[Fleet]:
    """Loads a fleet on the devices of all hosts; ends the followers on exit.

    Args:
      source: the fleet file, as for `Fleet.load`. `tensor_parallel` must be the number of devices
        of all hosts. Every host must be able to read the models' sources.
      hosts: of the mesh; this process is the first.

    Raises:
      ClusterError: JAX is too old, or another process did not connect or cannot load the fleet.
      MuxError: as `Fleet.load`.
    """
    config = load_fleet_config(source)
    check_models_stay_awake(config)
    join(hosts)
    links = connect_hosts(hosts)
    enable_compilation_cache()
    spec = build_shared_unit_spec(config, hosts)
    # The pool's size depends on the memory of this host's devices, so it is sent to the followers.
    pool = config.pool.model_copy(update={"memory": spec.pool_bytes * len(spec.devices)})
    shared = config.model_copy(update={"pool": pool}).model_dump_json()
    for link in links:
        link.send(WireMessage("fleet", {"config": shared}).encode())
    ending = threading.Event()
    with Fleet([_build_leading_unit(spec, links, ending)]) as fleet:
        yield fleet
    ending.set()
    for link in links:
        link.send(WireMessage("end").encode())
    jax.distributed.shutdown()


def _build_leading_unit(
    spec: UnitSpec, links: Sequence[Link], ending: threading.Event
) -> LocalUnit:
    """Builds the unit; its engine starts when all followers are ready."""
    started = False

    def build_executor(programs: Mapping[str, ModelPrograms]) -> LeadingExecutor:
        nonlocal started
        if started:
            exit_process("the leader's engine has ended")
        started = True
        for process, link in enumerate(links, start=1):
            _await_ready(process, link)
            threading.Thread(
                target=_watch,
                args=(process, link, ending),
                name=f"muxjax-host-{process}",
                daemon=True,
            ).start()
        return LeadingExecutor(spec, programs, links=links, on_lost=exit_process)

    return build_unit(spec, executor_factory=build_executor)


def _await_ready(process: int, link: Link) -> None:
    message = link.receive()
    if message.kind != "ready":
        raise ClusterError(f"process {process}: {message.fields.get('reason', message.kind)}")


def _watch(process: int, link: Link, ending: threading.Event) -> None:
    """Exits this process when a follower ends. While it runs, a follower sends no messages."""
    with contextlib.suppress(ClusterError):
        link.receive()
    if not ending.is_set():
        exit_process(f"process {process} has ended")
