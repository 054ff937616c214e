"""The host of a mesh that schedules: it tells the others each program before it launches it.

A mesh that has lost a host cannot go on, nor be started anew by the rest of it: its process ends,
with all the others, for whatever supervises them to start them again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from muxjax.cluster.fixed_models import check_fixed
from muxjax.cluster.host_list import Hosts
from muxjax.cluster.hosts import build_shared_unit_spec, give_up, join, meet
from muxjax.cluster.wire import Link, WireMessage
from muxjax.config.fleet_file import FleetConfig, load_fleet_config
from muxjax.errors import ClusterError
from muxjax.executor.jax_executor import JaxExecutor
from muxjax.executor.programs import ModelPrograms
from muxjax.executor.step_functions import StepOutput
from muxjax.fleet import Fleet
from muxjax.units import build as loading
from muxjax.units.local_unit import LocalUnit


class LeadingExecutor(JaxExecutor):
    """A `JaxExecutor` whose every launch is told to the followers first.

    Args:
      links: to them.
      lost: called when one cannot be told.
    """

    def __init__(
        self,
        devices: tuple[jax.Device, ...],
        models: Mapping[str, ModelPrograms],
        kv: jax.ShapeDtypeStruct,
        *,
        dummy_pages: int,
        links: Sequence[Link],
        lost: Callable[[str], None],
    ) -> None:
        super().__init__(devices, models, kv, dummy_pages=dummy_pages)
        self._links = links
        self._lost = lost

    def launch(
        self, name: str, kind: str, size: int, inputs: Sequence[np.ndarray | None]
    ) -> StepOutput:
        """See `JaxExecutor.launch`."""
        packed = WireMessage("launch", {"model": name, "kind": kind, "size": size}, inputs).packed()
        try:
            for link in self._links:
                link.send(packed)
        except ClusterError as error:
            self._lost(str(error))
        return super().launch(name, kind, size, inputs)


@contextmanager
def leading(source: FleetConfig | Mapping[str, Any] | str, hosts: Hosts) -> Iterator[Fleet]:
    """Loads a fleet on the devices of all hosts; ends the followers afterwards.

    Args:
      source: the fleet file, as for `Fleet.load`. `tensor_parallel` must be the number of devices
        of all hosts. Sources of models must be readable on every host.
      hosts: of which this is the first.

    Raises:
      ClusterError: JAX is too old, or the others did not come or cannot load the fleet.
      MuxError: as `Fleet.load`.
    """
    config = load_fleet_config(source)
    check_fixed(config)
    join(hosts)
    links = meet(hosts)
    loading.enable_compilation_cache()
    plan = build_shared_unit_spec(config, hosts)
    # What the pool takes is worked out here, from the memory of this host's devices.
    pool = config.pool.model_copy(update={"memory": plan.pool_bytes * len(plan.devices)})
    told = WireMessage(
        "fleet", {"config": config.model_copy(update={"pool": pool}).model_dump_json()}
    )
    for link in links:
        link.send(told.packed())
    programs = loading.make_programs(plan)
    loading.load_and_compile(
        plan.parts, programs, loaded=lambda name, size: None, compiled=lambda program: None
    )
    ending = threading.Event()
    for process, link in enumerate(links, start=1):
        _await_ready(process, link)
        threading.Thread(
            target=_watch, args=(process, link, ending), name=f"muxjax-host-{process}", daemon=True
        ).start()
    started = False

    def make_executor() -> LeadingExecutor:
        nonlocal started
        if started:
            give_up("its loop has ended")
        started = True
        return LeadingExecutor(
            plan.devices, programs, plan.kv, dummy_pages=plan.dummy_pages, links=links, lost=give_up
        )

    with Fleet([LocalUnit("0", plan, programs, make_executor=make_executor)]) as fleet:
        yield fleet
    ending.set()
    for link in links:
        link.send(WireMessage("end").packed())
    jax.distributed.shutdown()


def _await_ready(process: int, link: Link) -> None:
    message = link.receive()
    if message.what != "ready":
        raise ClusterError(f"process {process}: {message.fields.get('why', message.what)}")


def _watch(process: int, link: Link, ending: threading.Event) -> None:
    """Followers say nothing while they serve: what comes is their end."""
    with contextlib.suppress(ClusterError):
        link.receive()
    if not ending.is_set():
        give_up(f"process {process} has ended")
