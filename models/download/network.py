"""Recognizes failures of the network, so that errors of downloads name it as the cause."""

from __future__ import annotations

import errno
import re
import socket

from muxjax.errors import DownloadError

_ERRNOS = frozenset(
    (
        errno.ENETUNREACH,
        errno.ENETDOWN,
        errno.EHOSTUNREACH,
        errno.EHOSTDOWN,
        errno.EADDRNOTAVAIL,
    )
)
_CLIENT_ERRORS = frozenset(("ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError"))
"""Names of the errors of HTTP clients, which do not derive from the system's."""
_PIP = re.compile(
    r"connection broken by|NewConnectionError|NameResolutionError|ProxyError|ConnectTimeoutError"
    r"|ReadTimeoutError|Max retries exceeded|Cannot connect to proxy|connection error",
    re.IGNORECASE,
)
_NPM = re.compile(
    r"\b(ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|EHOSTUNREACH"
    r"|ERR_SOCKET_TIMEOUT|EIDLETIMEOUT)\b"
)
_SYSTEM_REASON = re.compile(r"\[Errno -?\d+\] ([^'\")\]]+)|(timed out)")


class NetworkDown(DownloadError):
    """A download that failed because the network or the proxy did not answer."""

    def __init__(self, wanted: str, reason: str, *, note: str = "") -> None:
        super().__init__(
            f"cannot download {wanted}: the network does not answer ({reason}); check the "
            f"connection and the proxy settings{note}"
        )


def failure_of(error: BaseException) -> str | None:
    """The reason if an error was caused by the network; None for other errors."""
    current: object = error
    while isinstance(current, BaseException):
        if isinstance(current, socket.gaierror | ConnectionError | TimeoutError):
            return _text_of(current)
        if isinstance(current, OSError) and current.errno in _ERRNOS:
            return _text_of(current)
        # `urllib.error.URLError` has its cause as an attribute.
        following = current.__cause__ or getattr(current, "reason", None)
        if not isinstance(following, BaseException):
            following = None if current.__suppress_context__ else current.__context__
        if following is None and type(current).__name__ in _CLIENT_ERRORS:
            return _text_of(current)
        current = following
    return None


def failure_in(output: str) -> str | None:
    """The reason if the errors that pip or npm printed show a failure of the network, or None."""
    if code := _NPM.search(output):
        return code[0]
    if not _PIP.search(output):
        return None
    reason = _SYSTEM_REASON.search(output)
    return "no connection" if reason is None else (reason[1] or reason[2]).strip()


def _text_of(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]
