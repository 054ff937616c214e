"""Authentication of callers by API key, and the right that each path requires."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.datastructures import Headers

from muxjax.serve.access.keys import Key, Keys, Right
from muxjax.serve.access.limits import KeyLimits
from muxjax.serve.errors import ApiError

_PUBLIC = frozenset({"/", "/docs", "/health", "/health/ready", "/openapi.json", "/favicon.ico"})
_PUBLIC_PREFIXES = ("/page/", "/docs/")
_ADMIN_PREFIXES = ("/models/", "/fleet/")


@dataclass(frozen=True)
class Caller:
    """The authenticated caller. Without configured API keys, `key` is None and nothing is refused.

    Attributes:
      key: the API key.
      limits: usage of the key, shared by all its calls.
    """

    key: Key | None
    limits: KeyLimits | None

    def has_right(self, right: Right) -> bool:
        """Whether the caller has a right."""
        return self.key is None or right in self.key.rights

    def require(self, right: Right) -> None:
        """Refuses a caller that lacks a right.

        Raises:
          ApiError: 403.
        """
        if not self.has_right(right):
            raise ApiError(f"this API key lacks the right {right!r}", status=403)


ANONYMOUS = Caller(None, None)
"""The caller of a server without API keys, or of a public path."""


class Authenticator:
    """Identifies the caller of a request by the `Authorization` header.

    Args:
      keys: the server's API keys; with none, every caller is anonymous.
    """

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._limits = {key.name: KeyLimits(key) for key in keys}

    def authenticate(self, headers: Headers) -> Caller:
        """Returns the caller.

        Raises:
          ApiError: 401, the key is missing or unknown.
        """
        if not len(self._keys):
            return ANONYMOUS
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        # A missing key is looked up too, so that all refusals take the same time.
        key = self._keys.find(secret.strip())
        if scheme.lower() != "bearer" or key is None:
            raise ApiError(
                "this server requires an API key: send it as `Authorization: Bearer KEY`"
                if not secret
                else "unknown API key",
                status=401,
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return Caller(key, self._limits[key.name])


def is_public(path: str) -> bool:
    """Whether a path needs no API key: the response reveals nothing about models or users."""
    return path in _PUBLIC or path.startswith(_PUBLIC_PREFIXES)


def required_right(method: str, path: str) -> Right | None:
    """Returns the right that a call requires besides a key, if any."""
    if path.startswith(_ADMIN_PREFIXES):
        return "admin"
    if path == "/metrics":
        return "metrics"
    return "generate" if method == "POST" else None
