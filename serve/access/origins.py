"""Protection against web pages of other origins: CORS and DNS rebinding.

A web page could otherwise use a server on its reader's own machine. A page of another origin is
refused unless `cors_origins` lists it. A page may also reach the server under a host name of its
own that resolves to this machine (DNS rebinding); a server without API keys on a loopback address
therefore answers only to `localhost`, to IP addresses and to `allowed_hosts`.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from muxjax.config.server import ServerConfig
from muxjax.serve.errors import ApiError


def check_host(headers: Headers, config: ServerConfig) -> None:
    """Refuses a host name that is not local.

    Raises:
      ApiError: 403.
    """
    name = _split_address(f"//{headers.get('host', '')}")[0]
    if not (_is_local_name(name) or name in config.allowed_hosts):
        raise ApiError(
            f"this server answers only to localhost, not to the host name {name!r}; add the name "
            "to `server.allowed_hosts` in the fleet file, or use API keys",
            status=403,
            code="host_not_allowed",
        )


def check_origin(headers: Headers, config: ServerConfig) -> None:
    """Refuses calls from web pages of other origins.

    Raises:
      ApiError: 403.
    """
    origin = headers.get("origin")
    if origin is None or origin in config.cors_origins or "*" in config.cors_origins:
        return
    if _split_address(origin)[1] != headers.get("host", ""):
        raise ApiError(
            f"origin {origin!r} is not allowed to call this server; `server.cors_origins` in the "
            "fleet file lists the allowed origins",
            status=403,
            code="origin_not_allowed",
        )


def _split_address(address: str) -> tuple[str, str]:
    """Host name, and host name with port, of an address; '?' for one that is malformed."""
    try:
        parts = urlsplit(address)
        return (parts.hostname or "").lower(), parts.netloc
    except ValueError:  # unbalanced brackets
        return "?", "?"


def _is_local_name(name: str) -> bool:
    if name in ("", "localhost") or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
