import ml_dtypes
import numpy as np
import pytest

from muxjax.models.checkpoints.buffers import ALIGNMENT, aligned_empty


@pytest.mark.parametrize("shape", [(3,), (5, 7), (2, 64, 3)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_memory_is_aligned(shape, dtype) -> None:
    for _ in range(8):
        array = aligned_empty(shape, dtype)
        assert array.ctypes.data % ALIGNMENT == 0
        assert (array.shape, array.dtype) == (shape, dtype)
        array[...] = 1
        assert array.astype(np.float32).sum() == array.size
