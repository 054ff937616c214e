from __future__ import annotations

import pytest

from muxjax.errors import Overloaded
from muxjax.scheduling.specs import LatencySlo
from tests.muxjax.scheduling.harness import Loop, request, spec


def loop_with(targets: LatencySlo, *, refuse_late: bool = True) -> Loop:
    model = spec("a", 2, 4, 64, max_seqs=4, output_tokens=8.0, prompt_tokens=5.0, targets=targets)
    return Loop.create([model], 400, "slo", refuse_late=refuse_late)


def test_a_late_request_is_refused_with_the_reason() -> None:
    loop = loop_with(LatencySlo(ttft=0.05))
    for number in range(100):
        try:
            loop.scheduler.add(request(number))
        except Overloaded as error:
            refused = error
            break
    assert "its first token is expected after" in str(refused)
    assert "its target is 0.05 s" in str(refused)
    assert refused.retry_after > 0
    loop.run()
    loop.assert_empty()
    loop.scheduler.add(request(1000))  # there is room again


def test_nothing_is_refused_by_default() -> None:
    loop = loop_with(LatencySlo(ttft=0.001), refuse_late=False)
    requests = [request(number) for number in range(100)]
    for late in requests:
        loop.scheduler.add(late)
    loop.run()
    assert all(late.finish_reason == "length" for late in requests)


def test_a_target_for_the_request_counts_all_tokens() -> None:
    loop = loop_with(LatencySlo(scale=1.0, isolated_ttft=1e-6, isolated_tpot=1e-6))
    with pytest.raises(Overloaded, match="its last token is expected"):
        loop.scheduler.add(request(0))
