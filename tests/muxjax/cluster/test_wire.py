import json
import socket
import struct

import numpy as np
import pytest

from muxjax.cluster.wire import Link, WireMessage
from muxjax.errors import ClusterError


@pytest.fixture
def ends():
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        links = Link(client), Link(server.accept()[0])
    yield links
    for link in links:
        link.close()


def test_messages_are_received_unchanged(ends):
    arrays = (np.arange(6, dtype=np.int32).reshape(2, 3), None, np.array(7, np.int32))
    sent = [WireMessage("launch", {"model": "ä", "size": 4}, arrays), WireMessage("end")]
    for message in sent:
        ends[0].send(message.encode())
    for message in sent:
        received = ends[1].receive()
        assert (received.kind, received.fields) == (message.kind, message.fields)
        for array, expected in zip(received.arrays, message.arrays, strict=True):
            np.testing.assert_equal(array, expected)
            assert array is None or array.dtype == expected.dtype


@pytest.mark.parametrize(
    "header", [b"{", b"[1]", json.dumps(["x", {}, [["object", [1]]]]).encode(), b'["x", {}, [[1]]]']
)
def test_invalid_messages_are_rejected(ends, header: bytes):
    ends[0].send(struct.pack(">I", len(header)) + header)
    with pytest.raises(ClusterError, match="invalid message"):
        ends[1].receive()


def test_a_closed_connection_raises_an_error(ends):
    ends[0].send(WireMessage("launch").encode()[:5])
    ends[0].close()
    with pytest.raises(ClusterError, match="cannot be reached"):
        ends[1].receive()
