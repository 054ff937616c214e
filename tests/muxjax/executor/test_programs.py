import pytest

from muxjax.executor.programs import Buckets, bucket


def test_bucket_returns_the_smallest_sufficient_size():
    assert [bucket(size, (1, 8, 16)) for size in (1, 2, 8, 9, 16)] == [1, 8, 8, 16, 16]
    with pytest.raises(ValueError, match="17 exceeds the largest bucket, 16"):
        bucket(17, (1, 8, 16))


@pytest.mark.parametrize("sizes", [(), (8, 1), (0, 4), (4, 4)])
def test_buckets_that_do_not_ascend_are_rejected(sizes):
    with pytest.raises(ValueError, match="ascend"):
        Buckets(sizes, 4, (1, 8), 10)
    with pytest.raises(ValueError, match="ascend"):
        Buckets((16,), 4, sizes, 10)
