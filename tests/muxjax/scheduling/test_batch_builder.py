"""The contents of steps."""

from __future__ import annotations

from tests.muxjax.scheduling.harness import Loop, isolated_tokens, request, spec


def test_long_prompts_are_prefilled_in_chunks() -> None:
    loop = Loop.create([spec("a", prefill_tokens=16)], 100)
    req = request(0, prompt_tokens=40, max_tokens=1)
    loop.scheduler.add(req)
    loop.run()
    assert loop.shapes == ["P16", "P16", "P8"]
    starts = [chunk.start for step in loop.steps for chunk in step.chunks]
    lasts = [chunk.last for step in loop.steps for chunk in step.chunks]
    assert starts == [0, 16, 32]
    assert lasts == [False, False, True]
    assert [chunk.num_blocks for step in loop.steps for chunk in step.chunks] == [4, 8, 10]
    assert req.output == isolated_tokens(loop.scheduler, req)


def test_prompts_are_packed_and_the_last_is_chunked() -> None:
    loop = Loop.create([spec("a", prefill_tokens=16)], 200)
    for i, length in enumerate((5, 7, 9)):
        loop.scheduler.add(request(i, prompt_tokens=length, max_tokens=1))
    loop.run()
    assert loop.shapes == ["P5,7,4", "P5"]


def test_chunks_of_a_prefill_are_limited() -> None:
    loop = Loop.create([spec("a", prefill_seqs=2)], 200)
    for i in range(3):
        loop.scheduler.add(request(i, prompt_tokens=2, max_tokens=1))
    loop.run()
    assert loop.shapes == ["P2,2", "P2"]


def test_the_tokens_of_a_step_can_be_limited() -> None:
    loop = Loop.create([spec("a")], 200)
    loop.scheduler.add(request(0, prompt_tokens=6, max_tokens=9))
    builder, first = loop.scheduler.batch_builder, loop.scheduler.get_request(0)
    prefill, requests = builder.build_prefill("a", max_tokens=4) or (None, [])
    assert prefill is not None
    assert prefill.num_tokens == 4
    assert requests == [first]
    rest, _ = builder.build_prefill("a") or (None, [])
    assert rest is not None
    assert rest.num_tokens == 2
    assert builder.build_prefill("a") is None
    decode, requests = builder.build_decode("a", max_tokens=0) or (None, [])
    assert decode is not None
    assert decode.num_tokens == 1
    assert requests == [first]


def test_a_sequence_whose_tokens_are_all_in_flight_is_left_out() -> None:
    loop = Loop.create([spec("a", decode_tokens=4)], 200)
    loop.scheduler.add(request(0, max_tokens=3))
    loop.scheduler.add(request(1, max_tokens=9))
    loop.run()
    assert loop.shapes == ["P5,5", "D2,4", "D4"]
