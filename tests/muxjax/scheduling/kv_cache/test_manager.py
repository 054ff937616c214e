from __future__ import annotations

from muxjax.scheduling.specs import ModelSpec
from muxjax.scheduling.steps import Decode, Prefill
from tests.muxjax.scheduling.harness import Loop, isolated_tokens, request, spec


def one_layer(name: str, kv_floor: float | None = None, max_model_len: int = 40) -> ModelSpec:
    """Four tokens per page, slabs of one page, decodes of one token."""
    return spec(
        name,
        1,
        4,
        max_model_len,
        kv_floor=kv_floor,
        decode_tokens=1,
        prefill_tokens=64,
        prefill_seqs=8,
        max_seqs=8,
    )


def test_a_request_is_admitted_with_pages_for_its_prefix_and_a_first_burst() -> None:
    loop = Loop.create([spec("a", 1, 4, decode_tokens=4)], 1 + 20)
    req = request(0, prompt_tokens=7, max_tokens=10)
    loop.scheduler.add(req)
    loop.turn()
    assert len(req.blocks) == 3  # 7 tokens, and 4 of the first decode


def test_no_pages_are_allocated_beyond_the_token_limit() -> None:
    loop = Loop.create([spec("a", 1, 4, decode_tokens=4)], 1 + 20)
    req = request(0, prompt_tokens=8, max_tokens=1)
    loop.scheduler.add(req)
    loop.turn()
    assert len(req.blocks) == 2
    loop.run()
    assert len(loop.steps) == 1


def test_admission_leaves_headroom_for_running_sequences() -> None:
    loop = Loop.create([one_layer("a", max_model_len=36)], 1 + 10)
    first, second = request(0, prompt_tokens=20, max_tokens=12), request(1, prompt_tokens=16)
    loop.scheduler.add(first)
    loop.turn()
    assert len(first.blocks) == 6
    loop.scheduler.add(second)
    # 4 pages are free, second needs 5 with its first token.
    assert loop.scheduler.batch_builder.build_prefill("a") is None
    loop.run()
    assert [first.preemptions, second.preemptions] == [0, 0]
    loop.assert_empty()


def test_preempted_request_keeps_its_tokens_and_is_resumed() -> None:
    loop = Loop.create([one_layer("a", max_model_len=36)], 1 + 9)
    requests = [request(i, prompt_tokens=8, max_tokens=20) for i in range(2)]
    for req in requests:
        loop.scheduler.add(req)
    loop.run()
    assert requests[0].preemptions == 0
    assert requests[1].preemptions > 0
    for req in requests:
        assert req.output == isolated_tokens(loop.scheduler, req)
    chunks = [
        chunk
        for step in loop.steps
        if isinstance(step, Prefill)
        for chunk in step.chunks
        if chunk.request_id == 1
    ]
    assert chunks[1].start == 0
    assert chunks[1].num_prompt_tokens == 8
    assert chunks[1].end > 8
    assert chunks[1].tokens[8:] == tuple(requests[1].output[: chunks[1].end - 8])
    loop.assert_empty()


def test_bursts_get_shorter_before_a_request_is_preempted() -> None:
    loop = Loop.create([spec("a", 1, 4, 40, decode_tokens=8)], 1 + 10)
    requests = [request(i, prompt_tokens=6, max_tokens=14) for i in range(2)]
    for req in requests:
        loop.scheduler.add(req)
    loop.run()
    assert sum(req.preemptions for req in requests) == 0
    assert min(step.num_tokens for step in loop.steps if isinstance(step, Decode)) < 8


def test_a_model_under_its_floor_preempts_borrowers() -> None:
    specs = [one_layer("a", 0.0), one_layer("b", 0.0), one_layer("c", 1 / 3)]
    loop = Loop.create(specs, 1 + 24)
    assert loop.scheduler.quotas.quotas == {"a": 8, "b": 8, "c": 8}
    leased = loop.scheduler.allocator.leased_slabs

    borrowers = [request(i, "b", prompt_tokens=11, max_tokens=20) for i in range(5)]
    for req in borrowers:
        loop.scheduler.add(req)
    loop.turn()
    assert leased("b") == 15  # all but c's floor, and headroom
    neighbor = request(5, "a", prompt_tokens=31, max_tokens=5)
    loop.scheduler.add(neighbor)
    loop.turn()
    assert leased("a") == 8  # within its quota, though c's floor is no longer free

    claim = request(6, "c", prompt_tokens=31, max_tokens=5)
    loop.scheduler.add(claim)
    loop.turn()
    assert leased("c") == 8
    assert [req.preemptions for req in borrowers] == [0, 0, 1, 1, 1]
    assert neighbor.preemptions == 0
    loop.run()
    for req in (*borrowers, neighbor, claim):
        assert req.output == isolated_tokens(loop.scheduler, req)
    loop.assert_empty()


def test_blocked_request_is_not_overtaken_by_younger_requests() -> None:
    # One request of a needs nearly the whole pool, so its quota cannot hold it.
    loop = Loop.create([one_layer("a", 0.0, 72), one_layer("b", 0.0)], 1 + 20, "round_robin")
    running = request(0, "b", prompt_tokens=8, max_tokens=8)
    loop.scheduler.add(running)
    loop.turn()
    large = request(1, "a", prompt_tokens=70, max_tokens=2)
    loop.scheduler.add(large)
    younger = [request(2 + i, "b", prompt_tokens=8, max_tokens=8) for i in range(20)]
    for req in younger:
        loop.scheduler.add(req)
    order = []
    loop.on_update = lambda update: order.append(update.request.id)
    loop.run()
    assert order.index(1) < order.index(3)
    for req in (running, large, *younger):
        assert req.output == isolated_tokens(loop.scheduler, req)
    loop.assert_empty()


def test_slots_limit_running_requests() -> None:
    loop = Loop.create([spec("a", max_seqs=2)], 400)
    for i in range(5):
        loop.scheduler.add(request(i))
    loop.turn()
    state = loop.scheduler.models["a"]
    assert len(state.running) == 2
    assert len(state.waiting) == 3
    loop.run()
    loop.assert_empty()
