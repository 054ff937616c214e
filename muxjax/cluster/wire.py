"""Messages between the hosts of one mesh: a header in JSON, then the arrays' bytes.

Nothing that is received is run or unpickled: a message names a program and brings its inputs.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from muxjax.errors import ClusterError

_LENGTH = struct.Struct(">I")
_MOST_BYTES = 1 << 30
_DTYPES = ("int32", "uint32", "float32", "uint8")


@dataclass(frozen=True)
class WireMessage:
    """What one host tells another.

    Attributes:
      what: 'launch', 'fleet', 'ready', 'failed' or 'end'.
      fields: whatever JSON can hold.
      arrays: in order; None stays None.
    """

    what: str
    fields: dict[str, Any] = field(default_factory=dict)
    arrays: Sequence[np.ndarray | None] = ()

    def packed(self) -> bytes:
        """As it goes over the wire."""
        shapes = [None if a is None else (a.dtype.name, a.shape) for a in self.arrays]
        header = json.dumps([self.what, self.fields, shapes]).encode()
        parts = [np.ascontiguousarray(a).tobytes() for a in self.arrays if a is not None]
        return b"".join((_LENGTH.pack(len(header)), header, *parts))


class Link:
    """One end of a connection between two hosts.

    Args:
      connected: closed by `close`.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connected

    def send(self, packed: bytes) -> None:
        """Sends a packed message.

        Raises:
          ClusterError: the other end is gone.
        """
        try:
            self._socket.sendall(packed)
        except OSError as error:
            raise ClusterError(f"the other host cannot be reached: {error}") from error

    def receive(self) -> WireMessage:
        """Waits for a message.

        Raises:
          ClusterError: the other end is gone, or what it sent is no message.
        """
        try:
            what, fields, shapes = json.loads(self._read(_LENGTH.unpack(self._read(4))[0]))
            arrays = [None if shape is None else self._array(*shape) for shape in shapes]
        except OSError as error:
            raise ClusterError(f"the other host cannot be reached: {error}") from error
        except (ValueError, TypeError) as error:
            raise ClusterError(f"the other host sent no message: {error}") from error
        return WireMessage(what, fields, arrays)

    def close(self) -> None:
        """Ends the connection; a `receive` that waits in another thread ends too."""
        with contextlib.suppress(OSError):  # the other end was quicker
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _array(self, dtype: str, shape: Sequence[int]) -> np.ndarray:
        if dtype not in _DTYPES:
            raise ValueError(f"arrays of {dtype}")
        found = np.dtype(dtype)
        return np.frombuffer(self._read(math.prod(shape) * found.itemsize), found).reshape(shape)

    def _read(self, size: int) -> bytearray:
        if not 0 <= size <= _MOST_BYTES:
            raise ValueError(f"{size} bytes")
        found = bytearray(size)
        view = memoryview(found)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise ConnectionError("the connection has ended")
            view = view[count:]
        return found
