"""A program that serves the fake fleet, for tests that send it signals: `serve_fake.py DELAY`."""

from __future__ import annotations

import sys

from muxjax.serve.server import bind, serve, sigterm_interrupts
from tests.serve.fake_fleet import FakeFleet

if __name__ == "__main__":
    with sigterm_interrupts(), bind("127.0.0.1", 0) as bound:
        with FakeFleet(delay=float(sys.argv[1])) as fleet:
            serve(fleet, bound, say=lambda text: print(text, flush=True))
        print("closed" if fleet.closed else "open", flush=True)
