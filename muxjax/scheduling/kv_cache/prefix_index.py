"""Index of full blocks by their content: all tokens of the sequence up to the end of the block.

The key of a block is the 256-bit BLAKE2b digest of the key of the block before it and of the
block's tokens. The first block is preceded by a digest of the request's cache salt. A digest keeps
the length of keys independent of the position. It must resist collisions, because clients choose
the tokens: two prefixes with the same key would let one client read the output of another's prompt.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, KeysView, Sequence
from hashlib import blake2b

from muxjax.scheduling.requests import Request

_DIGEST_BYTES = 32
_TOKEN_BYTES = array("i").itemsize


def extend_keys(request: Request, tokens_per_block: int, count: int) -> Sequence[bytes]:
    """Returns the keys of at least the first `count` blocks of a request, all of them full.

    The keys are stored in `Request.block_keys`, so that each block is hashed once.
    """
    keys = request.block_keys
    known = len(keys)
    if known >= count:
        return keys
    key = keys[-1] if keys else _root_key(request.params.cache_salt)
    tokens = request.tokens_between(known * tokens_per_block, count * tokens_per_block)
    data = array("i", tokens).tobytes()
    size = tokens_per_block * _TOKEN_BYTES
    for start in range(0, len(data), size):
        # Both parts have a fixed length, so their concatenation is unambiguous. BLAKE2b's keyed
        # mode would be equivalent, and slower.
        key = blake2b(key + data[start : start + size], digest_size=_DIGEST_BYTES).digest()
        keys.append(key)
    return keys


def _root_key(salt: str | None) -> bytes:
    # Requests without a salt share blocks with each other. An empty salt is not a valid parameter.
    salt_bytes = (salt or "").encode("utf-8", "surrogatepass")
    return blake2b(salt_bytes, digest_size=_DIGEST_BYTES).digest()


class PrefixIndex:
    """The blocks of one model that requests can find, by replica and key.

    Each replica writes only to its part of the pool, so a block holds the keys and values of its
    replica and nothing for the others. The number of a replica, except the first, is therefore part
    of the key.

    Invariant: each block has one key, and each key has one block.
    """

    def __init__(self) -> None:
        self._block_by_key: dict[bytes, int] = {}
        self._key_by_block: dict[int, bytes] = {}

    def __contains__(self, block: object) -> bool:
        return block in self._key_by_block

    def __iter__(self) -> Iterator[int]:
        return iter(self._key_by_block)

    def __len__(self) -> int:
        return len(self._key_by_block)

    @property
    def blocks(self) -> KeysView[int]:
        """All blocks; membership tests on it are faster than on the index."""
        return self._key_by_block.keys()

    def find(self, replica: int, keys: Iterable[bytes]) -> list[int]:
        """Returns the blocks of a replica for these keys, up to the first key without a block."""
        block_by_key = self._block_by_key
        blocks: list[int] = []
        for key in _replica_keys(replica, keys):
            block = block_by_key.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def add(self, replica: int, keys: Iterable[bytes], blocks: Iterable[int]) -> None:
        """Adds blocks; a block whose key is in the index already is left out."""
        block_by_key, key_by_block = self._block_by_key, self._key_by_block
        for key, block in zip(_replica_keys(replica, keys), blocks, strict=True):
            if block_by_key.setdefault(key, block) == block:
                key_by_block[block] = key

    def remove(self, blocks: Iterable[int]) -> None:
        """Removes blocks, which must be in the index."""
        block_by_key, pop = self._block_by_key, self._key_by_block.pop
        for block in blocks:
            del block_by_key[pop(block)]


def _replica_keys(replica: int, keys: Iterable[bytes]) -> Iterable[bytes]:
    return keys if not replica else [b"%d" % replica + key for key in keys]
