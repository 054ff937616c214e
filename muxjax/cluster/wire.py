"""Messages between the hosts of one mesh: a JSON header, then the bytes of the arrays.

Nothing received is executed or unpickled: a message names a program and contains its inputs.
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
_MAX_BYTES = 1 << 30
_DTYPES = ("int32", "uint32", "float32", "uint8")


@dataclass(frozen=True)
class WireMessage:
    """A message from one host to another.

    Attributes:
      kind: 'hello', 'launch', 'fleet', 'ready', 'failed' or 'end'.
      fields: JSON values.
      arrays: in order; None for an array that is not sent.
    """

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    arrays: Sequence[np.ndarray | None] = ()

    def encode(self) -> bytes:
        """Returns its bytes for `Link.send`."""
        shapes = [None if a is None else (a.dtype.name, a.shape) for a in self.arrays]
        header = json.dumps([self.kind, self.fields, shapes]).encode()
        data = [np.ascontiguousarray(a).tobytes() for a in self.arrays if a is not None]
        return b"".join((_LENGTH.pack(len(header)), header, *data))


class Link:
    """One end of a connection between two hosts.

    Args:
      connection: a connected socket; closed by `close`.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection

    def send(self, message: bytes) -> None:
        """Sends a message, from `WireMessage.encode`.

        Raises:
          ClusterError: the connection is lost.
        """
        try:
            self._socket.sendall(message)
        except OSError as error:
            raise ClusterError(f"the other host cannot be reached: {error}") from error

    def receive(self) -> WireMessage:
        """Waits for a message.

        Raises:
          ClusterError: the connection is lost, or the data is not a valid message.
        """
        try:
            kind, fields, shapes = json.loads(self._read(_LENGTH.unpack(self._read(4))[0]))
            arrays = [None if shape is None else self._array(*shape) for shape in shapes]
        except OSError as error:
            raise ClusterError(f"the other host cannot be reached: {error}") from error
        except (ValueError, TypeError) as error:
            raise ClusterError(f"the other host sent an invalid message: {error}") from error
        return WireMessage(kind, fields, arrays)

    def close(self) -> None:
        """Closes the connection, which also ends a `receive` in another thread."""
        with contextlib.suppress(OSError):  # the other end has closed it
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _array(self, dtype: str, shape: Sequence[int]) -> np.ndarray:
        if dtype not in _DTYPES:
            raise ValueError(f"unsupported array type {dtype}")
        parsed = np.dtype(dtype)
        return np.frombuffer(self._read(math.prod(shape) * parsed.itemsize), parsed).reshape(shape)

    def _read(self, size: int) -> bytearray:
        if not 0 <= size <= _MAX_BYTES:
            raise ValueError(f"unsupported length of {size} bytes")
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise ConnectionError("the connection has ended")
            view = view[count:]
        return data
