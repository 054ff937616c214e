"""Memory sizes in common notations."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from muxjax.config.memory_size import parse_memory


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GB", 10**9),
        ("1GiB", 2**30),
        ("512MiB", 512 * 2**20),
        ("1.5 gb", 1_500_000_000),
        ("100 kB", 100_000),
        ("17", 17),
        (4096, 4096),
        (" 2 TiB ", 2 * 2**40),
    ],
)
def test_size_is_parsed_to_bytes(text, size):
    assert parse_memory(text) == size


@given(st.one_of(st.text(max_size=12), st.integers(max_value=0), st.booleans(), st.floats()))
def test_invalid_size_is_rejected(value):
    assume(not (isinstance(value, str) and value[:1].isspace() | value[:1].isdigit()))
    with pytest.raises(ValueError, match="must be a size such as 1GB"):
        parse_memory(value)
