from __future__ import annotations

import asyncio
import threading
import time

import pytest

from muxjax.engine.detokenizer import Delta, Detokenizer
from muxjax.engine.stream import Stream
from muxjax.errors import EngineDead
from muxjax.models.tokenizers.byte_tokenizer import byte_tokenizer
from muxjax.scheduling.requests import FinishReason, Request, RequestUpdate

TOKENIZER = byte_tokenizer(260)
WAIT = 20.0


def make(*stop: str) -> tuple[Stream, list[int]]:
    cancelled: list[int] = []
    return Stream(7, 3, Detokenizer(TOKENIZER, stop), cancelled.append), cancelled


def update(text: str, reason: FinishReason | None = None) -> RequestUpdate:
    return RequestUpdate(Request(7, "m", [1]), list(text.encode()), None, reason)


def in_thread(stream: Stream) -> tuple[threading.Thread, list[Delta], list[BaseException]]:
    found: list[Delta] = []
    errors: list[BaseException] = []

    def read() -> None:
        try:
            found.extend(stream)
        except EngineDead as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    return thread, found, errors


def test_a_reader_that_comes_late_gets_everything_in_order() -> None:
    stream, cancelled = make()
    assert not stream.update(update("ab"))
    assert not stream.update(update("c", "length"))
    assert [(delta.text, delta.finish_reason) for delta in stream] == [
        ("ab", None),
        ("c", "length"),
    ]
    stream.cancel()
    assert cancelled == []


def test_a_reader_that_waits_is_woken() -> None:
    stream, _ = make()
    thread, found, _ = in_thread(stream)
    stream.update(update("a"))
    stream.update(update("b", "length"))
    thread.join(WAIT)
    assert [delta.text for delta in found] == ["a", "b"]


def test_a_stop_string_is_seen_at_once_and_by_the_engine() -> None:
    stream, _ = make("END")
    assert not stream.update(update("one EN"))
    assert stream.update(update("D two"))
    assert "".join(delta.text for delta in stream) == "one "


def test_text_is_left_to_the_reader_unless_a_stop_string_may_end_it() -> None:
    made: list[str] = []

    class Noting(Detokenizer):
        def push(self, update: RequestUpdate) -> Delta:
            made.append(threading.current_thread().name)
            return super().push(update)

    for stop in ((), ("END",)):
        made.clear()
        stream = Stream(0, 1, Noting(TOKENIZER, stop), lambda _: None)
        stream.update(update("a", "length"))
        assert len(made) == len(stop)
        assert [delta.text for delta in stream] == ["a"]
        assert len(made) == 1


def test_cancelled_and_failed_reach_readers() -> None:
    stream, cancelled = make()
    with stream:
        stream.update(update("a"))
    assert cancelled == [7]
    stream.cancelled()
    assert [delta.finish_reason for delta in stream] == [None, "cancelled"]

    stream, _ = make()
    thread, found, errors = in_thread(stream)
    stream.update(update("a"))
    stream.failed(EngineDead("it is gone"))
    thread.join(WAIT)
    assert [delta.text for delta in found] == ["a"]
    assert [str(error) for error in errors] == ["it is gone"]


def test_tasks_of_one_loop_are_woken_from_another_thread() -> None:
    streams = [make()[0] for _ in range(20)]

    def engine() -> None:
        for step in range(5):
            for stream in streams:
                stream.update(update("x", "length" if step == 4 else None))
            time.sleep(0.001)

    async def read(stream: Stream) -> str:
        return "".join([delta.text async for delta in stream])

    async def together() -> list[str]:
        return await asyncio.wait_for(asyncio.gather(*map(read, streams)), WAIT)

    thread = threading.Thread(target=engine)
    thread.start()
    assert asyncio.run(together()) == ["xxxxx"] * 20
    thread.join(WAIT)


def test_a_task_gets_the_engine_s_error() -> None:
    stream, _ = make()

    async def read() -> None:
        async for _ in stream:
            pass

    stream.failed(EngineDead("it is gone"))
    with pytest.raises(EngineDead, match="it is gone"):
        asyncio.run(read())
