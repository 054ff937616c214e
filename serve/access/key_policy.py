"""Policy of an API key on request parameters: priority limit and prefix cache isolation.

Keys do not share entries of the prefix cache unless the key file puts them into one `cache_group`.
Otherwise the time to first token, and `cached_tokens` directly, would reveal which prompts the
holders of other keys send.
"""

from __future__ import annotations

import dataclasses
import hashlib

from muxjax.sampling_params import SamplingParams
from muxjax.serve.access.keys import Key
from muxjax.serve.errors import ApiError


def apply_key_policy(key: Key | None, params: SamplingParams) -> SamplingParams:
    """Returns the parameters with the priority and the cache salt that the key prescribes.

    A request has the priority of its key by default and may set a lower one. Without a key the
    parameters are unchanged.

    Raises:
      ApiError: 400, the request sets a higher priority and the key lacks the right `admin`.
    """
    if key is None:
        return params
    priority = key.priority if params.priority is None else params.priority
    if priority > key.priority and "admin" not in key.rights:
        raise ApiError(
            f"priority must be at most {key.priority} with this key, not {priority}",
            param="priority",
        )
    salt = _cache_salt(key, params.cache_salt)
    return dataclasses.replace(params, priority=priority, cache_salt=salt)


def _cache_salt(key: Key, request_salt: str | None) -> str:
    """Returns a digest of the key (or its cache group) and the salt of the request."""
    name = f"key {key.name}" if key.cache_group is None else f"group {key.cache_group}"
    digest = hashlib.blake2b(name.encode(), digest_size=32)
    digest.update(b"\0" + (request_salt or "").encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
