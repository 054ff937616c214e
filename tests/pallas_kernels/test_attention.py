"""The suite that every implementation runs, against whole matrices in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muxjax.pallas_kernels import IMPLEMENTATIONS, KVLayout, api, paged_attention
from muxjax.pallas_kernels.api import AttentionRequest, Implementation, choose_implementation
from muxjax.pallas_kernels.target import KernelTarget
from tests.pallas_kernels.cases import GEOMETRIES, Case, dense, make_case
from tests.pallas_kernels.interpreting import interpretable, interpreted, sized

NAMES = [
    pytest.param(
        implementation.name,
        marks=pytest.mark.skipif(
            not interpretable(implementation.name), reason="this JAX cannot run it here"
        ),
    )
    for implementation in IMPLEMENTATIONS
]
# Rows of queries that are not there are NaN, and the GPU's interpreter multiplies them with numpy.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
OPTIONS = [(None, None), (40, None), (None, 20.0), (7, 5.0)]
# Every geometry, and every option; not every pair, as interpreting takes seconds.
CASES = [
    *((geometry, *OPTIONS[i % len(OPTIONS)]) for i, geometry in enumerate(GEOMETRIES)),
    *(((9, 3, 64), *options) for options in OPTIONS),
]


def run(case: Case, name: str, *, dtype=jnp.float32, decode=False, window=None, softcap=None):
    def attend(q, kv, *rest):
        return paged_attention(
            q,
            kv,
            *rest,
            layout=case.layout,
            scale=case.layout.head_dim**-0.5,
            window=window,
            softcap=softcap,
            decode=decode,
            implementation=name,
        )

    q, kv, *rest = case.arrays
    with interpreted(name):
        out = jax.jit(attend)(jnp.asarray(q, dtype), jnp.asarray(kv, dtype), *rest, case.layer)
        return np.asarray(out, np.float32)


def check(case: Case, out: np.ndarray, window, softcap, limit: float, queries=None):
    real = case.query_starts[-1] if queries is None else queries
    wanted = dense(case, case.layout.head_dim**-0.5, window, softcap)
    assert np.isfinite(out[:real]).all(), "a row that must not be read was"
    assert np.abs(out[:real] - wanted[:real]).max() < limit


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("geometry", "window", "softcap"), CASES)
def test_decode(name, geometry, window, softcap):
    geometry, layout = sized(name, geometry)
    page = layout.tokens_per_page
    case = make_case(geometry, [1, page - 1, page, page + 1, 97, 301], [1] * 6, layout=layout)
    out = run(case, name, decode=True, window=window, softcap=softcap)
    check(case, out, window, softcap, 2e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("geometry", "window", "softcap"), CASES)
def test_prefill(name, geometry, window, softcap):
    # Whole prompts, chunks after others, single tokens, an empty row, and padding.
    geometry, layout = sized(name, geometry)
    lens, queries = [5, 0, 40, 300, 33, 1], [5, 0, 17, 150, 33, 1]
    case = make_case(geometry, lens, queries, padding=10, layout=layout)
    out = run(case, name, window=window, softcap=softcap)
    check(case, out, window, softcap, 2e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("decode", [True, False])
def test_empty_rows_give_zeros(name, decode):
    geometry, layout = sized(name, (9, 3, 64))
    case = make_case(geometry, [0, 20], [1, 1] if decode else [0, 1], layout=layout)
    out = run(case, name, decode=decode)
    if decode:
        assert (out[0] == 0).all()
    assert np.isfinite(out[-1]).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("geometry", [(9, 3, 64), (32, 8, 128)])
@pytest.mark.parametrize("decode", [True, False])
def test_bfloat16(name, geometry, decode):
    geometry, layout = sized(name, geometry)
    case = make_case(geometry, [200, 31], [1, 1], layout=layout).rounded()
    out = run(case, name, dtype=jnp.bfloat16, decode=decode)
    wanted = dense(case, geometry[2] ** -0.5, None, None)
    assert np.abs(out - wanted).max() / np.abs(wanted).max() < 2e-2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("decode", [True, False])
def test_empty_sequences_first_last_and_between(name, decode):
    lens = [0, 0, 33, 0, 70, 0]
    geometry, layout = sized(name, (9, 3, 64))
    case = make_case(geometry, lens, [1] * 6 if decode else [0, 0, 33, 0, 5, 0], layout=layout)
    out = run(case, name, decode=decode)
    wanted = dense(case, 64**-0.5, None, None)
    real = case.kv_lens > 0 if decode else slice(None)
    assert np.abs(out - wanted)[real].max() < 2e-5
    assert np.isfinite(out).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if "reference" not in name.values])
@pytest.mark.parametrize("decode", [True, False])
def test_long_contexts(name, decode):
    lens = [2304, 1, 511, 512, 513]
    geometry, layout = sized(name, (9, 3, 64))
    queries = [1] * 5 if decode else [36, 1, 24, 8, 65]
    case = make_case(geometry, lens, queries, layout=layout)
    out = run(case, name, decode=decode)
    check(case, out, None, None, 2e-5)


def test_misfits_are_refused():
    case = make_case((9, 3, 64), [5], [1])
    options = {"layout": case.layout, "scale": 1.0}
    q, kv, tables, lens, starts = (jnp.asarray(array) for array in case.arrays)
    with pytest.raises(ValueError, match="do not fit"):
        paged_attention(q[:, :8], kv, tables, lens, starts, 0, **options)
    with pytest.raises(ValueError, match="wants"):
        paged_attention(q, kv[:, :-1], tables, lens, starts, 0, **options)
    two = jnp.concatenate([q, q])
    with pytest.raises(ValueError, match="one query a sequence"):
        paged_attention(two, kv, tables, lens, starts, 0, decode=True, **options)
    with pytest.raises(ValueError, match="window"):
        paged_attention(q, kv, tables, lens, starts, 0, window=0, **options)


def request(platform: str) -> AttentionRequest:
    float32 = jnp.dtype("float32")
    return AttentionRequest(
        KernelTarget(platform, platform), KVLayout(48, 3, 64), 9, float32, float32, False
    )


def test_nothing_is_chosen_silently(monkeypatch):
    monkeypatch.setattr("muxjax.pallas_kernels.cpu.native.unavailable_reason", lambda: None)
    assert choose_implementation(None, request("cpu")).name == "native"
    monkeypatch.setattr(
        "muxjax.pallas_kernels.cpu.native.unavailable_reason", lambda: "no compiler"
    )
    assert choose_implementation(None, request("cpu")).name == "xla"
    with pytest.raises(ValueError, match="native: no compiler"):
        choose_implementation("native", request("cpu"))
    assert choose_implementation("reference", request("cpu")).name == "reference"
    with pytest.raises(ValueError, match=r"there are: .*xla, reference"):
        choose_implementation("abacus", request("cpu"))
    with pytest.raises(ValueError, match=r"not abacus; reference: made for tests"):
        choose_implementation(None, request("abacus"))


def test_what_is_unable_is_refused_with_its_reason(monkeypatch):
    picky = Implementation("picky", ("cpu",), paged_attention, lambda request: "no Tuesdays")
    monkeypatch.setattr(api, "IMPLEMENTATIONS", (picky, *IMPLEMENTATIONS))
    assert choose_implementation(None, request("cpu")).name in ("native", "xla")
    with pytest.raises(ValueError, match="picky: no Tuesdays"):
        choose_implementation("picky", request("cpu"))
    monkeypatch.setattr(api, "IMPLEMENTATIONS", (picky,))
    with pytest.raises(ValueError, match="no paged attention for cpu: picky: no Tuesdays"):
        choose_implementation(None, request("cpu"))
