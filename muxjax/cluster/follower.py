"""A host of a mesh that does as the leader says: the same programs, in the same order."""

from __future__ import annotations

import logging
from collections import deque

import jax

from muxjax.cluster.host_list import Hosts
from muxjax.cluster.hosts import build_shared_unit_spec, give_up, join, meet
from muxjax.cluster.wire import Link, WireMessage
from muxjax.config.fleet_file import FleetConfig
from muxjax.errors import ClusterError, MuxError
from muxjax.executor.jax_executor import JaxExecutor
from muxjax.scheduling.steps import STEPS_AHEAD
from muxjax.units import build as loading

log = logging.getLogger("muxjax")


def follow(hosts: Hosts) -> None:
    """Serves under a leader until it ends.

    Ends the process with status 1 when the leader is gone.

    Raises:
      MuxError: the fleet cannot be loaded here; the leader has been told.
    """
    join(hosts)
    (link,) = meet(hosts)
    try:
        executor = _loaded(link, hosts)
    except MuxError as error:
        link.send(WireMessage("failed", {"why": str(error)}).packed())
        raise
    link.send(WireMessage("ready").packed())
    log.info("process %d of %d is ready", hosts.process, hosts.count)
    running: deque[jax.Array] = deque()
    while (message := _received(link)).what != "end":
        fields = message.fields
        emitted = executor.launch(fields["model"], fields["kind"], fields["size"], message.arrays)
        running.append(emitted.tokens)
        if len(running) > STEPS_AHEAD:
            running.popleft().block_until_ready()
    executor.close()
    link.close()
    jax.distributed.shutdown()


def _loaded(link: Link, hosts: Hosts) -> JaxExecutor:
    config = FleetConfig.model_validate_json(_received(link).fields["config"])
    plan = build_shared_unit_spec(config, hosts)
    programs = loading.make_programs(plan)
    loading.load_and_compile(
        plan.parts, programs, loaded=lambda name, size: None, compiled=lambda program: None
    )
    return JaxExecutor(plan.devices, programs, plan.kv, dummy_pages=plan.dummy_pages)


def _received(link: Link) -> WireMessage:
    """What the leader says. Without it there is nothing to wait for, as JAX would at its exit."""
    try:
        return link.receive()
    except ClusterError as error:
        give_up(f"process 0 has ended: {error}")
