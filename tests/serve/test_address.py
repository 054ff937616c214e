"""Addresses of the server: in use, shared, not permitted, or not an address."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from muxjax.serve.address import AddressInUse, bind, is_local, listen, url_of

pytestmark = pytest.mark.faults


def leave_time_wait() -> int:
    """Closes a connection from a server's side, which leaves its port in TIME_WAIT; returns it."""
    with bind("127.0.0.1", 0) as server:
        listen(server)
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            accepted, _ = server.accept()
            accepted.close()
            assert client.recv(1) == b""
    return port


@pytest.mark.parametrize("time_wait", [False, True])
def test_a_bound_address_cannot_be_bound_before_it_listens(time_wait: bool) -> None:
    with bind("127.0.0.1", leave_time_wait() if time_wait else 0) as bound:
        port = bound.getsockname()[1]
        for host in ("127.0.0.1", "0.0.0.0"):
            with pytest.raises(AddressInUse, match=f"{host}:{port}: Address already in use"):
                bind(host, port)
        with socket.socket() as other:  # as most servers bind
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError, match="Address already in use"):
                other.bind(("127.0.0.1", port))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        listen(bound)
        with pytest.raises(AddressInUse):
            bind("127.0.0.1", port)
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            bound.accept()[0].close()


def test_the_same_port_of_another_address_is_free() -> None:
    with bind("127.0.0.1", 0) as bound, bind("127.0.0.2", bound.getsockname()[1]) as other:
        assert is_local(other)


@pytest.mark.parametrize("host", ["nowhere.invalid", "a..b", "x" * 70, "", "192.0.2.1", "a\0b"])
def test_a_bad_host_is_one_line(host: str) -> None:
    with pytest.raises(AddressInUse, match="cannot serve on ") as raised:
        bind(host, 0)
    assert "\n" not in str(raised.value)


def test_a_port_without_permission_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces `bind`, since root and many containers may bind every port."""

    class Denied(socket.socket):
        def bind(self, address: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(socket, "socket", Denied)
    with pytest.raises(AddressInUse, match=r"^cannot serve on 127.0.0.1:80: Permission denied$"):
        bind("127.0.0.1", 80)


def test_a_name_with_several_addresses_uses_one_that_exists(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def addresses(host: str, port: int, **options: object) -> list[tuple[object, ...]]:
        kinds = (socket.AF_INET, socket.SOCK_STREAM, 0, "")
        return [(*kinds, ("192.0.2.1", port)), (*kinds, ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", addresses)
    with bind("both", 0) as bound:
        assert bound.getsockname()[0] == "127.0.0.1"


def test_url_of_all_interfaces_is_local() -> None:
    with bind("0.0.0.0", 0) as bound:
        assert url_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_brackets_of_ipv6_addresses_are_removed() -> None:
    with bind("[::1]", 0) as bound:
        assert url_of(bound) == f"http://[::1]:{bound.getsockname()[1]}"
