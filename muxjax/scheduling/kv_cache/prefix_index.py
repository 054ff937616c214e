"""Full blocks by what they hold: all tokens of their sequence up to their end.

The key of a block is the BLAKE2b digest, of 256 bits, of the key of the block before it and of its
own tokens; before the first stands the request's salt. A digest, because a key of the tokens
themselves would grow with the position; a cryptographic one of this length, because clients choose
the tokens: whoever could make two prefixes collide would be answered with somebody else's.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, KeysView, Sequence
from hashlib import blake2b

from muxjax.scheduling.requests import Request

_DIGEST_BYTES = 32
_TOKEN_BYTES = array("i").itemsize


def extend_keys(request: Request, tokens_per_block: int, count: int) -> Sequence[bytes]:
    """The keys of a request's first `count` blocks, which are full, and maybe of more.

    They are kept with the request, so that each block is hashed once.
    """
    keys = request.block_keys
    known = len(keys)
    if known >= count:
        return keys
    key = keys[-1] if keys else _root(request.params.cache_salt)
    tokens = request.tokens_between(known * tokens_per_block, count * tokens_per_block)
    data = array("i", tokens).tobytes()
    size = tokens_per_block * _TOKEN_BYTES
    for start in range(0, len(data), size):
        # Both parts are of fixed length; a keyed digest says the same and takes half as long again.
        key = blake2b(key + data[start : start + size], digest_size=_DIGEST_BYTES).digest()
        keys.append(key)
    return keys


def _root(salt: str | None) -> bytes:
    # A request without a salt shares with all that have none; an empty salt cannot be given.
    return blake2b((salt or "").encode("utf-8", "surrogatepass"), digest_size=32).digest()


class PrefixIndex:
    """The blocks of one model that can be found; those of each copy apart.

    A copy of a model writes to its own part of the pool, so a block holds something for the copy
    whose slot wrote it, and nothing for the others: but for the first copy, its number is part of
    the key.
    """

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    def __contains__(self, block: object) -> bool:
        return block in self._keys

    def __iter__(self) -> Iterator[int]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def blocks(self) -> KeysView[int]:
        """All of them, quick to ask."""
        return self._keys.keys()

    def find(self, copy: int, keys: Iterable[bytes]) -> list[int]:
        """The blocks of a copy with these keys, as far as there are any without a gap."""
        known = self._blocks
        found: list[int] = []
        for key in _of_copy(copy, keys):
            block = known.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def add(self, copy: int, keys: Iterable[bytes], blocks: Iterable[int]) -> None:
        """Makes blocks findable, each unless another one is under its key."""
        known, own = self._blocks, self._keys
        for key, block in zip(_of_copy(copy, keys), blocks, strict=True):
            if known.setdefault(key, block) == block:
                own[block] = key

    def remove(self, blocks: Iterable[int]) -> None:
        """Forgets blocks, which must be known."""
        known, pop = self._blocks, self._keys.pop
        for block in blocks:
            del known[pop(block)]


def _of_copy(copy: int, keys: Iterable[bytes]) -> Iterable[bytes]:
    return keys if not copy else [b"%d" % copy + key for key in keys]
