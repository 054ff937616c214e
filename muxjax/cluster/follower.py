"""A follower: a host of a mesh that runs the leader's programs in the leader's order."""

from __future__ import annotations

import logging
from collections import deque

import jax

from muxjax.cluster.host_list import Hosts
from muxjax.cluster.hosts import build_shared_unit_spec, connect_hosts, exit_process, join
from muxjax.cluster.wire import Link, WireMessage
from muxjax.config.fleet_file import FleetConfig
from muxjax.errors import ClusterError, MuxError
from muxjax.executor.jax_executor import JaxExecutor
from muxjax.scheduling.steps import STEPS_AHEAD
from muxjax.units.build import load_programs

log = logging.getLogger("muxjax")


def follow(hosts: Hosts) -> None:
    """Runs the programs of the leader until it ends.

    Exits the process with status 1 when the connection to the leader is lost.

    Raises:
      MuxError: the fleet cannot be loaded on this host; the leader is informed.
    """
    join(hosts)
    (link,) = connect_hosts(hosts)
    try:
        executor = _load_executor(link, hosts)
    except MuxError as error:
        link.send(WireMessage("failed", {"reason": str(error)}).encode())
        raise
    link.send(WireMessage("ready").encode())
    log.info("process %d of %d is ready", hosts.process, hosts.count)
    in_flight: deque[jax.Array] = deque()
    while (message := _receive(link)).kind != "end":
        fields = message.fields
        output = executor.launch(fields["model"], fields["kind"], fields["size"], message.arrays)
        in_flight.append(output.tokens)
        if len(in_flight) > STEPS_AHEAD:
            in_flight.popleft().block_until_ready()
    executor.close()
    link.close()
    jax.distributed.shutdown()


def _load_executor(link: Link, hosts: Hosts) -> JaxExecutor:
    """Loads the fleet that the leader sends."""
    config = FleetConfig.model_validate_json(_receive(link).fields["config"])
    spec = build_shared_unit_spec(config, hosts)
    return spec.build_executor(load_programs(spec))


def _receive(link: Link) -> WireMessage:
    """Waits for the leader's next message; exits the process if the connection is lost.

    Raising an error would not end the process: at exit, JAX would wait for the leader.
    """
    try:
        return link.receive()
    except ClusterError as error:
        exit_process(f"process 0 has ended: {error}")
