import pytest

from muxjax.pallas_kernels import KVLayout


@pytest.mark.parametrize(
    ("num_kv_heads", "head_dim", "padded", "rows"),
    [
        (8, 128, 128, 16),
        (3, 64, 64, 3),
        (1, 256, 256, 4),
        (6, 48, 64, 6),  # 576 elements do not fill whole rows
        (1, 64, 64, 1),
        (1, 16, 64, 1),
        (3, 80, 128, 6),
    ],
)
def test_heads_are_padded_to_whole_rows(num_kv_heads, head_dim, padded, rows):
    layout = KVLayout(96, num_kv_heads, head_dim)
    assert layout.padded_head_dim == padded
    assert layout.rows_per_token == rows
    assert layout.tokens_per_page == 96 // rows


def test_tokens_per_page_rounds_down():
    assert KVLayout(100, 3, 64).tokens_per_page == 33


@pytest.mark.parametrize("args", [(0, 1, 64), (96, 0, 64), (96, 1, 0), (15, 8, 128)])
def test_invalid_layout_is_rejected(args):
    with pytest.raises(ValueError, match="KVLayout"):
        KVLayout(*args)
