"""Keys of blocks: equal if and only if salt and all tokens up to the block's end are equal."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.kv_cache.prefix_index import PrefixIndex, extend_keys
from muxjax.scheduling.requests import Request


def keys(tokens: list[int], salt: str | None = None, size: int = 3, split: int = 0) -> list[bytes]:
    """The keys of a request whose last `split` tokens are output."""
    at = len(tokens) - split
    request = Request(0, "a", tokens[:at], SamplingParams(cache_salt=salt), output=tokens[at:])
    return list(extend_keys(request, size, len(tokens) // size))


@given(
    first=st.lists(st.integers(0, 2), max_size=12),
    second=st.lists(st.integers(0, 2), max_size=12),
    salts=st.tuples(st.sampled_from([None, "x", "y"]), st.sampled_from([None, "x", "y"])),
)
def test_keys_are_equal_if_salts_and_all_tokens_so_far_are(first, second, salts) -> None:
    first_keys, second_keys = keys(first, salts[0]), keys(second, salts[1])
    for at, (first_key, second_key) in enumerate(
        zip(first_keys, second_keys, strict=False), start=1
    ):
        same = first[: 3 * at] == second[: 3 * at] and salts[0] == salts[1]
        assert (first_key == second_key) == same
    assert len(set(first_keys)) == len(first_keys)


@given(tokens=st.lists(st.integers(0, 300_000), max_size=20), split=st.integers(0, 20))
def test_keys_do_not_depend_on_when_they_are_computed(tokens, split) -> None:
    split = min(split, len(tokens))
    assert keys(tokens, split=split) == keys(tokens)
    request = Request(0, "a", tokens)
    for count in range(len(tokens) // 3 + 1):
        extend_keys(request, 3, count)
    assert request.block_keys == keys(tokens)


def test_key_input_is_unambiguous() -> None:
    assert keys([1, 256, 1])[0] != keys([1, 1, 256])[0]
    assert keys([0, 0, 1], size=3) != keys([0, 0, 1], size=1)[:1]


def test_blocks_are_found_up_to_a_gap_and_by_their_replica_only() -> None:
    index = PrefixIndex()
    index.add(0, [b"one", b"three"], [10, 30])
    index.add(1, [b"two"], [20])
    assert index.find(0, [b"one", b"two", b"three"]) == [10]
    assert index.find(1, [b"two", b"one"]) == [20]
    index.add(0, [b"two"], [21])
    assert index.find(0, [b"one", b"two", b"three"]) == [10, 21, 30]
    index.remove([10])
    assert index.find(0, [b"one", b"two", b"three"]) == []
    assert sorted(index) == [20, 21, 30]
    index.remove([21, 20])
    assert list(index.blocks) == [30]
    assert index.find(1, [b"two"]) == []


def test_the_first_block_of_a_key_stays() -> None:
    index = PrefixIndex()
    index.add(0, [b"key", b"key"], [1, 2])
    assert index.find(0, [b"key"]) == [1]
    assert 2 not in index
    assert len(index) == 1
