"""Protection against web pages of other origins: CORS and DNS rebinding.

Without it, any web page could call a server on the machine of its visitor. A page of another origin
is refused unless `cors_origins` lists the origin. A page may also use a host name that resolves to
this machine (DNS rebinding). A server on a loopback address without API keys therefore answers only
to `localhost`, IP addresses and `allowed_hosts`.
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
    """Returns the host name of an address without and with its port; '?' if malformed."""
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
