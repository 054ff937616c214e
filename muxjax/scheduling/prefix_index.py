"""Full blocks by what they hold: all tokens of their sequence up to their end.

The key of a block is the BLAKE2b digest, of 256 bits, of the key of the block before it and of its
own tokens; before the first stands the request's salt. A digest, because a key of the tokens
themselves would grow with the position; a cryptographic one of this length, because clients choose
the tokens: whoever could make two prefixes collide would be answered with somebody else's.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
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
    data = memoryview(array("i", tokens)).cast("B")
    size = tokens_per_block * _TOKEN_BYTES
    for start in range(0, len(data), size):
        key = blake2b(data[start : start + size], key=key, digest_size=_DIGEST_BYTES).digest()
        keys.append(key)
    return keys


def _root(salt: str | None) -> bytes:
    # A request without a salt shares with all that have none; an empty salt cannot be given.
    return blake2b((salt or "").encode("utf-8", "surrogatepass"), digest_size=32).digest()


class PrefixIndex:
    """The blocks of one model that can be found; those of each copy apart.

    A copy of a model writes to its own part of the pool, so a block holds something for the copy
    whose slot wrote it, and nothing for the others.
    """

    def __init__(self, copies: int) -> None:
        self._blocks: list[dict[bytes, int]] = [{} for _ in range(copies)]
        self._keys: dict[int, tuple[int, bytes]] = {}

    def __contains__(self, block: object) -> bool:
        return block in self._keys

    def __iter__(self) -> Iterator[int]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, copy: int, keys: Iterable[bytes]) -> list[int]:
        """The blocks of a copy with these keys, as far as there are any without a gap."""
        known = self._blocks[copy]
        found: list[int] = []
        for key in keys:
            block = known.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def add(self, copy: int, key: bytes, block: int) -> None:
        """Makes a block findable, unless another one is under that key."""
        if self._blocks[copy].setdefault(key, block) == block:
            self._keys[block] = (copy, key)

    def remove(self, block: int) -> None:
        """Forgets a block, which must be known."""
        self.remove_all([block])

    def remove_all(self, blocks: Iterable[int]) -> None:
        """Forgets blocks, which must be known."""
        pop, known = self._keys.pop, self._blocks
        for block in blocks:
            copy, key = pop(block)
            del known[copy][key]
