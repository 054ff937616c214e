"""The address of the server: a socket that belongs to this process before it accepts connections.

Imports little, so that an address in use is reported before JAX is imported.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
from collections.abc import Sequence
from typing import Any

from muxjax.errors import MuxError

_BACKLOG = 2048
"""Connections that may wait to be accepted."""
_UNUSABLE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""Errors of one address of a host name after which the next address is tried."""


class AddressInUse(MuxError):
    """The address of the server is in use or not available."""


def bind(host: str, port: int) -> socket.socket:
    """Binds a socket without listening, so that no other process can bind its address.

    Connections are refused until `listen`.

    Args:
      host: address or host name.
      port: 0 for any free port.

    Raises:
      AddressInUse: the address is in use, is not permitted, or does not belong to this machine.
    """
    try:
        candidates = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise AddressInUse(f"cannot serve on {host}:{port}: {error.strerror}") from error
    except ValueError as error:  # a host name that cannot be encoded
        raise AddressInUse(f"cannot serve on {host!r}: not a host name") from error
    try:
        return _bind_first(candidates)
    except OSError as error:
        raise AddressInUse(f"cannot serve on {host}:{port}: {error.strerror}") from error


def listen(bound: socket.socket) -> None:
    """Starts to queue connections on a socket from `bind`.

    Raises:
      AddressInUse: another process took the address; only possible on systems where `bind` is not
        exclusive.
    """
    # The next server can then bind the address while connections of this one are in TIME_WAIT.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.listen(_BACKLOG)
    except OSError as error:
        address = ":".join(map(str, bound.getsockname()[:2]))
        raise AddressInUse(f"cannot serve on {address}: {error.strerror}") from error


def url_of(bound: socket.socket) -> str:
    """Returns the URL for clients on this machine."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local(bound: socket.socket) -> bool:
    """Whether the socket is bound to a loopback address."""
    return ipaddress.ip_address(bound.getsockname()[0].split("%")[0]).is_loopback


def _bind_first(candidates: Sequence[tuple[Any, ...]]) -> socket.socket:
    """Binds the first address that this machine has."""
    for index, (family, kind, protocol, _, address) in enumerate(candidates):
        try:
            bound = socket.socket(family, kind, protocol)
            try:
                _bind_exclusively(bound, address)
            except BaseException:
                bound.close()
                raise
            return bound
        except OSError as error:
            if error.errno not in _UNUSABLE or index == len(candidates) - 1:
                raise
    raise OSError(errno.EADDRNOTAVAIL, "no address")


def _bind_exclusively(bound: socket.socket, address: Any) -> None:
    """Binds a socket so that no other socket can be bound to its address, even before it listens.

    On Linux, sockets with SO_REUSEADDR can share an address while none of them listens. Without the
    option, connections in TIME_WAIT of an earlier server block the address for a minute.
    """
    try:
        bound.bind(address)
        return
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
    if sys.platform == "linux":
        # Only one socket can listen. Ending that state keeps the address, and without the option
        # it is not shared.
        bound.listen(1)
        bound.shutdown(socket.SHUT_RD)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
