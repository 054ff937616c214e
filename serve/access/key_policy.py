"""What an API key makes of a request: how urgent it may be, and with whom it shares prefixes.

Holders of unlike keys share nothing in the prefix cache unless the key file says so: how soon an
answer begins, and `cached_tokens` outright, would tell each of them what the others ask.
"""

from __future__ import annotations

import dataclasses
import hashlib

from muxjax.sampling_params import SamplingParams
from muxjax.serve.access.keys import Key
from muxjax.serve.errors import ApiError


def apply_key_policy(key: Key | None, params: SamplingParams) -> SamplingParams:
    """The parameters of a request by the holder of a key; without keys they stay as they are.

    A request takes its key's priority, or the lower one that it asks for.

    Raises:
      ApiError: 400, it asks for a higher one; only a key with the right `admin` may.
    """
    if key is None:
        return params
    priority = key.priority if params.priority is None else params.priority
    if priority > key.priority and "admin" not in key.rights:
        raise ApiError(
            f"priority is at most {key.priority} with this key, not {priority}", param="priority"
        )
    salt = _salt(key, params.cache_salt)
    return dataclasses.replace(params, priority=priority, cache_salt=salt)


def _salt(key: Key, own: str | None) -> str:
    """Of unlike keys, groups or own salts unlike ones."""
    name = f"key {key.name}" if key.cache_group is None else f"group {key.cache_group}"
    found = hashlib.blake2b(name.encode(), digest_size=32)
    found.update(b"\0" + (own or "").encode("utf-8", "surrogatepass"))
    return found.hexdigest()
