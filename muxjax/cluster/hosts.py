"""Connects the hosts of a mesh through `jax.distributed`, and each follower to the leader.

Every host runs one process, and all processes must run the same programs in the same order. Process
0, the leader, schedules and serves. It sends each program with its inputs to the other processes,
the followers, before it dispatches the program itself.
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
from muxjax.units.build_unit_spec import build_unit_spec
from muxjax.units.unit_spec import UnitSpec

CONNECT_TIMEOUT = 120
"""Seconds that the hosts wait for each other."""
_MIN_JAX = (0, 12)
_SECRET_BYTES = 32


def join(hosts: Hosts) -> None:
    """Initializes `jax.distributed`, so that JAX sees the devices of all hosts.

    Must be called before JAX's first use.

    Raises:
      ClusterError: JAX is too old, or a process did not connect in time.
    """
    if jax.__version_info__ < _MIN_JAX:
        raise ClusterError(
            f"a mesh over several processes needs JAX 0.12 or later, this is {jax.__version__}: "
            "earlier versions hang when steps with collectives are queued; upgrade JAX"
        )
    # The service would replace the server's handler of SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            hosts.coordinator,
            hosts.count,
            hosts.process,
            initialization_timeout=CONNECT_TIMEOUT,
            shutdown_timeout_seconds=10,
        )
    except RuntimeError as error:
        raise ClusterError(f"not all {hosts.count} processes connected: {error}") from error


def connect_hosts(hosts: Hosts) -> list[Link]:
    """Connects the followers to the leader.

    Through the devices, the leader broadcasts its port and a secret that followers must present.

    Returns:
      In the leader, the links to all followers, in order; in a follower, its link to the leader.

    Raises:
      ClusterError: a process did not connect in time.
    """
    if hosts.process:
        received = _broadcast(np.zeros(2 + _SECRET_BYTES, np.uint8))
        port = int.from_bytes(received[:2].tobytes())
        try:
            connection = socket.create_connection((hosts.address, port), timeout=CONNECT_TIMEOUT)
        except OSError as error:
            raise ClusterError(f"process 0 at {hosts.address}:{port}: {error}") from error
        connection.settimeout(None)
        link = Link(connection)
        fields = {"process": hosts.process, "secret": received[2:].tobytes().hex()}
        link.send(WireMessage("hello", fields).encode())
        return [link]
    secret = secrets.token_bytes(_SECRET_BYTES)
    with socket.create_server((hosts.address, 0)) as server:
        server.settimeout(CONNECT_TIMEOUT)
        port = server.getsockname()[1]
        _broadcast(np.frombuffer(port.to_bytes(2) + secret, np.uint8))
        links: dict[int, Link] = {}
        while len(links) < hosts.count - 1:
            try:
                connection, _ = server.accept()
            except OSError as error:
                raise ClusterError(
                    f"{len(links) + 1} of {hosts.count} processes connected"
                ) from error
            connection.settimeout(CONNECT_TIMEOUT)
            link = Link(connection)
            hello = link.receive().fields
            if hmac.compare_digest(str(hello.get("secret")), secret.hex()):
                links[int(hello["process"])] = link
                connection.settimeout(None)
            else:
                link.close()
    return [links[process] for process in sorted(links)]


def build_shared_unit_spec(config: FleetConfig, hosts: Hosts) -> UnitSpec:
    """Returns the spec of the unit over all hosts; it must be the same on every host.

    Raises:
      ClusterError: a model is not sharded over all devices.
      MuxError: see `build_unit_spec`.
    """
    count = jax.device_count()
    if config.tensor_parallel != count:
        raise ClusterError(
            f"tensor_parallel is {config.tensor_parallel}; the {hosts.count} processes have "
            f"{count} devices together: set it to {count}"
        )
    spec = build_unit_spec(config, progress=False)
    replicated = [name for name, model in spec.model_specs.items() if model.mesh.replicas > 1]
    if replicated:
        raise ClusterError(
            f"tensor_parallel of {', '.join(replicated)}: on a mesh over several processes every "
            f"model must be sharded over all {count} devices; remove the key"
        )
    return spec


def exit_process(reason: str) -> NoReturn:
    """Ends the process with status 1, without cleanup: that may wait forever for a lost host."""
    print(f"muxjax: the mesh has failed: {reason}", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(1)


def _broadcast(array: np.ndarray) -> np.ndarray:
    """Returns the array of process 0, in all processes."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(array)).astype(np.uint8)
