"""The suite that every implementation runs, against dense attention in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muxjax.pallas_kernels import (
    IMPLEMENTATIONS,
    AttentionOptions,
    KVLayout,
    api,
    paged_attention,
)
from muxjax.pallas_kernels.api import AttentionRequest, Implementation, choose_implementation
from muxjax.pallas_kernels.target import KernelTarget
from tests.pallas_kernels.cases import GEOMETRIES, AttentionCase, build_case, compute_dense
from tests.pallas_kernels.harness import run
from tests.pallas_kernels.interpreting import interpretable, size_case

NAMES = [
    pytest.param(
        implementation.name,
        marks=pytest.mark.skipif(
            not interpretable(implementation.name),
            reason="the machine or JAX cannot run this implementation",
        ),
    )
    for implementation in IMPLEMENTATIONS
]
# Rows past the last query are NaN, and the GPU's interpreter multiplies them with NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
OPTIONS = [(None, None), (40, None), (None, 20.0), (7, 5.0)]
# Every geometry and every option, but not every pair, since the interpreters are slow.
CASES = [
    *((geometry, *OPTIONS[i % len(OPTIONS)]) for i, geometry in enumerate(GEOMETRIES)),
    *(((9, 3, 64), *options) for options in OPTIONS),
]


def check(case: AttentionCase, out: np.ndarray, window, softcap, limit: float):
    valid = case.query_starts[-1]
    expected = compute_dense(case, case.layout.head_dim**-0.5, window, softcap)
    assert np.isfinite(out[:valid]).all(), "a row that must not be read was read"
    assert np.abs(out[:valid] - expected[:valid]).max() < limit


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("geometry", "window", "softcap"), CASES)
def test_decode(name, geometry, window, softcap):
    geometry, layout = size_case(name, geometry)
    page = layout.tokens_per_page
    case = build_case(geometry, [1, page - 1, page, page + 1, 97, 301], [1] * 6, layout=layout)
    out = run(case, name, decode=True, window=window, softcap=softcap)
    check(case, out, window, softcap, 2e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("geometry", "window", "softcap"), CASES)
def test_prefill(name, geometry, window, softcap):
    # Complete prompts, later chunks, single tokens, an empty row, and padding.
    geometry, layout = size_case(name, geometry)
    lens, queries = [5, 0, 40, 300, 33, 1], [5, 0, 17, 150, 33, 1]
    case = build_case(geometry, lens, queries, padding=10, layout=layout)
    out = run(case, name, window=window, softcap=softcap)
    check(case, out, window, softcap, 2e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("decode", [True, False])
def test_empty_rows_give_zeros(name, decode):
    geometry, layout = size_case(name, (9, 3, 64))
    case = build_case(geometry, [0, 20], [1, 1] if decode else [0, 1], layout=layout)
    out = run(case, name, decode=decode)
    if decode:
        assert (out[0] == 0).all()
    assert np.isfinite(out[-1]).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("geometry", [(9, 3, 64), (32, 8, 128)])
@pytest.mark.parametrize("decode", [True, False])
def test_bfloat16(name, geometry, decode):
    geometry, layout = size_case(name, geometry)
    case = build_case(geometry, [200, 31], [1, 1], layout=layout).rounded()
    out = run(case, name, dtype=jnp.bfloat16, decode=decode)
    expected = compute_dense(case, geometry[2] ** -0.5, None, None)
    assert np.abs(out - expected).max() / np.abs(expected).max() < 2e-2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("decode", [True, False])
def test_empty_sequences_at_any_index(name, decode):
    lens = [0, 0, 33, 0, 70, 0]
    geometry, layout = size_case(name, (9, 3, 64))
    case = build_case(geometry, lens, [1] * 6 if decode else [0, 0, 33, 0, 5, 0], layout=layout)
    out = run(case, name, decode=decode)
    expected = compute_dense(case, 64**-0.5, None, None)
    valid = case.kv_lens > 0 if decode else slice(None)
    assert np.abs(out - expected)[valid].max() < 2e-5
    assert np.isfinite(out).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if "reference" not in name.values])
@pytest.mark.parametrize("decode", [True, False])
def test_long_contexts(name, decode):
    lens = [2304, 1, 511, 512, 513]
    geometry, layout = size_case(name, (9, 3, 64))
    queries = [1] * 5 if decode else [36, 1, 24, 8, 65]
    case = build_case(geometry, lens, queries, layout=layout)
    out = run(case, name, decode=decode)
    check(case, out, None, None, 2e-5)


def test_shapes_are_validated():
    case = build_case((9, 3, 64), [5], [1])
    q, kv, metadata = jax.tree.map(jnp.asarray, (case.q, case.kv, case.metadata))
    options = AttentionOptions(1.0)
    with pytest.raises(ValueError, match="do not match"):
        paged_attention(q[:, :8], kv, metadata, options, 0)
    with pytest.raises(ValueError, match=r"needs \[pages, "):
        paged_attention(q, kv[:, :-1], metadata, options, 0)
    with pytest.raises(ValueError, match="1 block tables, but"):
        paged_attention(q, kv, replace(metadata, kv_lens=jnp.ones(2, jnp.int32)), options, 0)
    two_queries = jnp.concatenate([q, q])
    with pytest.raises(ValueError, match="one query per sequence: 2 queries for 1 sequences"):
        paged_attention(two_queries, kv, replace(metadata, decode=True), options, 0)


def request(platform: str) -> AttentionRequest:
    float32 = jnp.dtype("float32")
    return AttentionRequest(
        KernelTarget(platform, platform), KVLayout(48, 3, 64), 9, float32, float32, False
    )


def test_first_supported_implementation_is_selected(monkeypatch):
    monkeypatch.setattr("muxjax.pallas_kernels.cpu.native.unavailable_reason", lambda: None)
    assert choose_implementation(None, request("cpu")).name == "native"
    monkeypatch.setattr(
        "muxjax.pallas_kernels.cpu.native.unavailable_reason", lambda: "no compiler"
    )
    assert choose_implementation(None, request("cpu")).name == "xla"
    with pytest.raises(ValueError, match="native: no compiler"):
        choose_implementation("native", request("cpu"))
    assert choose_implementation("reference", request("cpu")).name == "reference"
    with pytest.raises(ValueError, match=r"known: .*xla, reference"):
        choose_implementation("abacus", request("cpu"))
    with pytest.raises(ValueError, match=r"not abacus; reference: for tests"):
        choose_implementation(None, request("abacus"))


def test_unsupported_request_is_rejected_with_its_reason(monkeypatch):
    picky = Implementation("picky", ("cpu",), paged_attention, lambda request: "no Tuesdays")
    monkeypatch.setattr(api, "IMPLEMENTATIONS", (picky, *IMPLEMENTATIONS))
    assert choose_implementation(None, request("cpu")).name in ("native", "xla")
    with pytest.raises(ValueError, match="picky: no Tuesdays"):
        choose_implementation("picky", request("cpu"))
    monkeypatch.setattr(api, "IMPLEMENTATIONS", (picky,))
    with pytest.raises(ValueError, match="no paged attention for cpu: picky: no Tuesdays"):
        choose_implementation(None, request("cpu"))
