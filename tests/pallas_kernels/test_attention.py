"""The suite that every implementation runs, against whole matrices in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muxjax.pallas_kernels import IMPLEMENTATIONS, paged_attention
from muxjax.pallas_kernels.api import choose
from tests.pallas_kernels.cases import GEOMETRIES, Case, dense, make_case

NAMES = [implementation.name for implementation in IMPLEMENTATIONS]
OPTIONS = [(None, None), (40, None), (None, 20.0), (7, 5.0)]


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
    return np.asarray(
        jax.jit(attend)(jnp.asarray(q, dtype), jnp.asarray(kv, dtype), *rest, case.layer),
        np.float32,
    )


def check(case: Case, out: np.ndarray, window, softcap, limit: float, queries=None):
    real = case.query_starts[-1] if queries is None else queries
    wanted = dense(case, case.layout.head_dim**-0.5, window, softcap)
    assert np.isfinite(out[:real]).all(), "a row that must not be read was"
    assert np.abs(out[:real] - wanted[:real]).max() < limit


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("window", "softcap"), OPTIONS)
def test_decode(name, geometry, window, softcap):
    case = make_case(geometry, [1, 15, 16, 17, 97, 301], [1] * 6)
    out = run(case, name, decode=True, window=window, softcap=softcap)
    check(case, out, window, softcap, 2e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("window", "softcap"), OPTIONS)
def test_prefill(name, geometry, window, softcap):
    # Whole prompts, chunks after others, single tokens, an empty row, and padding.
    case = make_case(geometry, [5, 0, 40, 300, 33, 1], [5, 0, 17, 150, 33, 1], padding=10)
    out = run(case, name, window=window, softcap=softcap)
    check(case, out, window, softcap, 2e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("decode", [True, False])
def test_empty_rows_give_zeros(name, decode):
    case = make_case((9, 3, 64), [0, 20], [1, 1] if decode else [0, 1])
    out = run(case, name, decode=decode)
    if decode:
        assert (out[0] == 0).all()
    assert np.isfinite(out[-1]).all()


@pytest.mark.parametrize("geometry", [(9, 3, 64), (32, 8, 128)])
@pytest.mark.parametrize("decode", [True, False])
def test_bfloat16(geometry, decode):
    case = make_case(geometry, [200, 31], [1, 1])
    out = run(case, "xla", dtype=jnp.bfloat16, decode=decode)
    wanted = dense(case, geometry[2] ** -0.5, None, None)
    assert np.abs(out - wanted).max() / np.abs(wanted).max() < 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("decode", [True, False])
def test_long_contexts(decode):
    lens = [4096, 1, 2047, 2048, 2049]
    case = make_case((9, 3, 64), lens, [1] * 5 if decode else [100, 1, 64, 128, 129])
    out = run(case, "xla", decode=decode)
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


def test_nothing_is_chosen_silently():
    assert choose(None, "cpu").name == "xla"
    assert choose("reference", "cpu").name == "reference"
    with pytest.raises(ValueError, match="there are: xla, reference"):
        choose("mosaic", "cpu")
    with pytest.raises(ValueError, match="not abacus; reference: made for tests"):
        choose(None, "abacus")
