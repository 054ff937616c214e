"""The XLA implementation, in addition to the shared suite in `test_attention`."""

from __future__ import annotations

import numpy as np
import pytest

from tests.pallas_kernels.cases import build_case, build_layout, compute_dense
from tests.pallas_kernels.harness import run

GEOMETRY = (4, 2, 64)


@pytest.mark.parametrize("decode", [True, False])
def test_contexts_at_page_boundaries(decode: bool) -> None:
    layout = build_layout(GEOMETRY)
    tokens = layout.tokens_per_page
    assert tokens > 2
    lengths = [1, tokens - 1, tokens, tokens + 1, 2 * tokens]
    counts = [1] * len(lengths) if decode else [1, 2, tokens, 3, 1]
    case = build_case(GEOMETRY, lengths, counts, decode=decode)
    out = run(case, "xla", decode=decode)
    expected = compute_dense(case, layout.head_dim**-0.5, None, None)
    queries = case.query_starts[-1]
    np.testing.assert_allclose(out[:queries], expected[:queries], atol=2e-5)
