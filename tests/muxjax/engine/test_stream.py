from __future__ import annotations

import asyncio
import gc
import threading
import time

import pytest

from muxjax.engine.detokenizer import Detokenizer
from muxjax.engine.stream import Stream
from muxjax.errors import EngineDead
from muxjax.models.tokenizers.byte_tokenizer import byte_tokenizer
from muxjax.outputs import Delta
from muxjax.scheduling.requests import FinishReason, Request, RequestUpdate

TOKENIZER = byte_tokenizer(260)
WAIT = 20.0


def make_stream(*stop: str) -> tuple[Stream, list[int]]:
    cancelled: list[int] = []
    return Stream(7, [1, 2, 3], Detokenizer(TOKENIZER, stop), cancelled.append), cancelled


def update(text: str, reason: FinishReason | None = None) -> RequestUpdate:
    return RequestUpdate(Request(7, "m", [1]), list(text.encode()), None, reason)


def read_in_thread(stream: Stream) -> tuple[threading.Thread, list[Delta], list[BaseException]]:
    deltas: list[Delta] = []
    errors: list[BaseException] = []

    def read() -> None:
        try:
            deltas.extend(stream)
        except EngineDead as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    return thread, deltas, errors


def test_late_reader_receives_all_deltas_in_order() -> None:
    stream, cancelled = make_stream()
    assert not stream.sink.update(update("ab"))
    assert not stream.sink.update(update("c", "length"))
    assert [(delta.text, delta.finish_reason) for delta in stream] == [
        ("ab", None),
        ("c", "length"),
    ]
    stream.cancel()
    assert cancelled == []


def test_waiting_reader_is_woken() -> None:
    stream, _ = make_stream()
    thread, deltas, _ = read_in_thread(stream)
    stream.sink.update(update("a"))
    stream.sink.update(update("b", "length"))
    thread.join(WAIT)
    assert [delta.text for delta in deltas] == ["a", "b"]


def test_stop_string_ends_the_request_in_the_engine() -> None:
    stream, _ = make_stream("END")
    assert not stream.sink.update(update("one EN"))
    assert stream.sink.update(update("D two"))
    assert "".join(delta.text for delta in stream) == "one "


def test_reader_detokenizes_unless_there_are_stop_strings() -> None:
    threads: list[str] = []

    class Noting(Detokenizer):
        def push(self, update: RequestUpdate) -> Delta:
            threads.append(threading.current_thread().name)
            return super().push(update)

    for stop in ((), ("END",)):
        threads.clear()
        stream = Stream(0, [1], Noting(TOKENIZER, stop), lambda _: None)
        stream.sink.update(update("a", "length"))
        assert len(threads) == len(stop)
        assert [delta.text for delta in stream] == ["a"]
        assert len(threads) == 1


def test_cancelled_and_failed_reach_readers() -> None:
    stream, cancelled = make_stream()
    with stream:
        stream.sink.update(update("a"))
    assert cancelled == [7]
    stream.sink.cancelled()
    assert [delta.finish_reason for delta in stream] == [None, "cancelled"]

    stream, _ = make_stream()
    thread, deltas, errors = read_in_thread(stream)
    stream.sink.update(update("a"))
    stream.sink.failed(EngineDead("it is gone"))
    thread.join(WAIT)
    assert [delta.text for delta in deltas] == ["a"]
    assert [str(error) for error in errors] == ["it is gone"]


def test_tasks_of_one_loop_are_woken_from_another_thread() -> None:
    streams = [make_stream()[0] for _ in range(20)]

    def engine() -> None:
        for step in range(5):
            for stream in streams:
                stream.sink.update(update("x", "length" if step == 4 else None))
            time.sleep(0.001)

    async def read(stream: Stream) -> str:
        return "".join([delta.text async for delta in stream])

    async def together() -> list[str]:
        return await asyncio.wait_for(asyncio.gather(*map(read, streams)), WAIT)

    thread = threading.Thread(target=engine)
    thread.start()
    assert asyncio.run(together()) == ["xxxxx"] * 20
    thread.join(WAIT)


def test_engine_error_is_raised_in_a_task() -> None:
    stream, _ = make_stream()

    async def read() -> None:
        async for _ in stream:
            pass

    stream.sink.failed(EngineDead("it is gone"))
    with pytest.raises(EngineDead, match="it is gone"):
        asyncio.run(read())


def test_a_stream_ends_after_its_last_delta() -> None:
    stream, _ = make_stream()
    stream.sink.update(update("a", "length"))
    assert next(stream).text == "a"
    assert list(stream) == []

    async def read() -> list[Delta]:
        return [delta async for delta in stream]

    assert asyncio.run(read()) == []


def test_stream_is_read_by_a_thread_and_then_by_two_loops() -> None:
    stream, _ = make_stream()
    for text in "abc":
        stream.sink.update(update(text))

    async def read_one() -> str:
        return (await asyncio.wait_for(anext(stream), WAIT)).text

    assert [next(stream).text, asyncio.run(read_one()), asyncio.run(read_one())] == ["a", "b", "c"]
    threading.Timer(0.01, stream.sink.update, [update("d", "length")]).start()
    assert asyncio.run(read_one()) == "d"


def test_cancelled_task_loses_no_delta() -> None:
    stream, _ = make_stream()

    async def read() -> str:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.01)
        stream.sink.update(update("a", "length"))
        return (await asyncio.wait_for(anext(stream), WAIT)).text

    assert asyncio.run(read()) == "a"


@pytest.mark.parametrize("stop", [(), ("END",)])
def test_garbage_collected_stream_ends_its_request(stop: tuple[str, ...]) -> None:
    stream, cancelled = make_stream(*stop)
    sink = stream.sink
    assert not sink.update(update("a"))
    for _ in stream:
        break
    assert not sink.update(update("b"))
    del stream
    gc.collect()
    assert sink.update(update("c"))
    assert cancelled == []


def test_end_raises_its_error_despite_the_cancellation() -> None:
    """The engine may answer the cancellation before `end` returns."""
    stream = Stream(7, [1], Detokenizer(TOKENIZER, ()), lambda _: stream.sink.cancelled())
    stream.end(TimeoutError("too long"))
    with pytest.raises(TimeoutError, match="too long"):
        list(stream)
