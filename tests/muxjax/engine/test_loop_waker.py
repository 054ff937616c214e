from __future__ import annotations

import asyncio
import threading

from muxjax.engine.loop_waker import LoopWaker


def test_one_call_wakes_all_events_of_one_loop_iteration() -> None:
    async def main() -> int:
        loop = asyncio.get_running_loop()
        waker = LoopWaker.for_loop(loop)
        assert LoopWaker.for_loop(loop) is waker
        events = [asyncio.Event() for _ in range(50)]
        calls = 0
        schedule = loop.call_soon_threadsafe

        def counting(*args: object) -> object:
            nonlocal calls
            calls += 1
            return schedule(*args)

        loop.call_soon_threadsafe = counting  # type: ignore[method-assign]
        thread = threading.Thread(target=lambda: [waker.wake(event) for event in events])
        thread.start()
        thread.join()  # the loop does not run meanwhile
        await asyncio.wait_for(asyncio.gather(*(event.wait() for event in events)), 20)
        waker.wake(events[0])
        return calls

    assert asyncio.run(main()) == 2


def test_wake_on_a_closed_loop_does_nothing() -> None:
    async def main() -> tuple[LoopWaker, asyncio.Event]:
        return LoopWaker.for_loop(asyncio.get_running_loop()), asyncio.Event()

    waker, event = asyncio.run(main())
    waker.wake(event)
    waker.wake(event)
    assert not event.is_set()
