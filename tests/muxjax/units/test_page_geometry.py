import pytest

from muxjax.pallas_kernels import KVLayout
from muxjax.units.page_geometry import (
    DEFAULT_MAX_MODEL_LEN,
    GPU_TOKEN_GROUP,
    KVShape,
    choose_page_rows,
    default_max_model_len,
    page_count,
)


def test_pages_of_the_demo_models_have_no_unused_rows():
    shapes = [
        KVShape("smollm2", 30, 3, 64, 499),
        KVShape("gemma3", 18, 1, 256, 499),
        KVShape("stories", 6, 6, 48, 499),
    ]
    rows = choose_page_rows(shapes)
    for shape in shapes:
        layout = KVLayout(rows, shape.num_kv_heads, shape.head_dim)
        assert layout.tokens_per_page * layout.rows_per_token == rows
        assert layout.tokens_per_page >= 8


@pytest.mark.parametrize("widest", [1, 4, 16, 64])
def test_page_holds_at_least_eight_tokens_of_each_model(widest):
    rows = choose_page_rows([KVShape("a", 2, widest, 128, 500), KVShape("b", 2, 1, 64, 500)])
    assert rows % 16 == 0
    assert KVLayout(rows, widest, 128).tokens_per_page >= 8


def test_short_requests_have_short_pages():
    long, short = (choose_page_rows([KVShape("a", 2, 1, 64, mean)]) for mean in (5000, 40))
    assert short < long


def test_gpu_pages_are_multiples_of_the_token_group():
    # Llama 3 8B, SmolLM2 135M, Gemma 3 4B.
    geometries = [(32, 8, 128), (30, 3, 64), (34, 4, 256)]
    shapes = [KVShape(str(g), *g, 256) for g in geometries]
    rows = choose_page_rows(shapes, token_group=GPU_TOKEN_GROUP)
    for _, num_kv, head_dim in geometries:
        layout = KVLayout(rows, num_kv, head_dim)
        assert layout.tokens_per_page % GPU_TOKEN_GROUP == 0
        assert layout.tokens_per_page * layout.rows_per_token == rows


def test_page_count():
    assert page_count(1_000_000_000, 96, 4) == 20345


def test_default_max_model_len():
    layout = KVLayout(96, 3, 64)  # 32 tokens per page
    assert default_max_model_len(2048, layout, 30, 20_000, 1.0) == 2048
    assert default_max_model_len(10**6, layout, 30, 10**6, 1.0) == DEFAULT_MAX_MODEL_LEN
    assert default_max_model_len(2048, layout, 30, 600, 1.0) == 10 * 32
    assert default_max_model_len(2048, layout, 30, 600, 0.2) == 3 * 32
    assert default_max_model_len(2048, layout, 30, 1, 1.0) == 2
