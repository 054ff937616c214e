"""How the hosts of one mesh find each other: `jax.distributed`, and a connection to the first.

Every host runs one process, and every process must run the same programs in the same order. The
first, the leader, schedules and serves; it tells the others, the followers, each program with its
inputs before it launches it itself.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import sys
from typing import NoReturn

import jax
import numpy as np

from muxjax.cluster.host_list import Hosts
from muxjax.cluster.wire import Link, WireMessage
from muxjax.config.fleet_file import FleetConfig
from muxjax.errors import ClusterError
from muxjax.units import build as loading
from muxjax.units.unit_spec import UnitSpec

MEETING_SECONDS = 120
"""Most seconds that the hosts wait for each other."""
_OLDEST = (0, 12)
_SECRET_BYTES = 32


def join(hosts: Hosts) -> None:
    """Makes JAX see the devices of all hosts. Before JAX's first use.

    Raises:
      ClusterError: JAX is too old, or the others did not come.
    """
    if jax.__version_info__ < _OLDEST:
        raise ClusterError(
            f"a mesh over several processes needs JAX 0.12 or later, this is {jax.__version__}: "
            "older ones hang when steps with collectives are queued; use Python 3.12 or later"
        )
    # It would trap SIGTERM, which the server takes itself.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            hosts.coordinator,
            hosts.count,
            hosts.process,
            initialization_timeout=MEETING_SECONDS,
            shutdown_timeout_seconds=10,
        )
    except RuntimeError as error:
        raise ClusterError(f"not all {hosts.count} processes came together: {error}") from error


def meet(hosts: Hosts) -> list[Link]:
    """Connects the followers to the leader: its links to all, in order; or a follower's to it.

    The leader's port, and a secret that a follower must know, go through the devices.

    Raises:
      ClusterError: they did not all come.
    """
    if hosts.process:
        sent = _broadcast(np.zeros(2 + _SECRET_BYTES, np.uint8))
        port = int.from_bytes(sent[:2].tobytes())
        try:
            connected = socket.create_connection((hosts.address, port), timeout=MEETING_SECONDS)
        except OSError as error:
            raise ClusterError(f"process 0 at {hosts.address}:{port}: {error}") from error
        connected.settimeout(None)
        link = Link(connected)
        fields = {"process": hosts.process, "secret": sent[2:].tobytes().hex()}
        link.send(WireMessage("hello", fields).packed())
        return [link]
    secret = secrets.token_bytes(_SECRET_BYTES)
    with socket.create_server((hosts.address, 0)) as server:
        server.settimeout(MEETING_SECONDS)
        port = server.getsockname()[1]
        _broadcast(np.frombuffer(port.to_bytes(2) + secret, np.uint8))
        links: dict[int, Link] = {}
        while len(links) < hosts.count - 1:
            try:
                connected, _ = server.accept()
            except OSError as error:
                raise ClusterError(f"{len(links) + 1} of {hosts.count} processes came") from error
            connected.settimeout(MEETING_SECONDS)
            link = Link(connected)
            told = link.receive().fields
            if hmac.compare_digest(str(told.get("secret")), secret.hex()):
                links[int(told["process"])] = link
                connected.settimeout(None)
            else:
                link.close()
    return [links[process] for process in sorted(links)]


def build_shared_unit_spec(config: FleetConfig, hosts: Hosts) -> UnitSpec:
    """The plan of the whole mesh; all hosts make the same.

    Raises:
      ClusterError: the models are not cut for all devices.
      MuxError: as `loading.make_plan`.
    """
    count = jax.device_count()
    if config.tensor_parallel != count:
        raise ClusterError(
            f"tensor_parallel is {config.tensor_parallel}; the {hosts.count} processes have "
            f"{count} devices together: it must be that"
        )
    plan = loading.build_unit_spec(config, progress=False)
    copied = [name for name, part in plan.parts.items() if part.mesh.replicas > 1]
    if copied:
        raise ClusterError(
            f"tensor_parallel of {', '.join(copied)}: on a mesh over several processes every model "
            f"must be cut for all {count} devices; remove the key"
        )
    return plan


def give_up(reason: str) -> NoReturn:
    """Ends the process at once: the device may wait for ever for the host that is gone."""
    print(f"muxjax: the mesh cannot go on: {reason}", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(1)


def _broadcast(array: np.ndarray) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(array)).astype(np.uint8)
