"""Serves the fake fleet as a process, for tests with signals.

`serve_fake.py DELAY DRAIN_TIMEOUT [CERTIFICATE KEY]`
"""

from __future__ import annotations

import sys
from pathlib import Path

from muxjax.config.server import ServerConfig
from muxjax.serve.address import bind
from muxjax.serve.server import Tls, serve
from muxjax.serve.settings import ServerSettings
from muxjax.stop_signals import interrupted_by_stop_signals
from tests.serve.fake_fleet import FakeFleet

if __name__ == "__main__":
    delay, drain_timeout, *files = sys.argv[1:]
    settings = ServerSettings(ServerConfig(drain_timeout=float(drain_timeout)), local_only=True)
    tls = Tls(*map(Path, files)) if files else None
    with interrupted_by_stop_signals(), bind("127.0.0.1", 0) as bound:
        with FakeFleet(delay=float(delay)) as fleet:
            say = lambda text: print(text, flush=True)  # noqa: E731
            serve(fleet, bound, say=say, settings=settings, tls=tls)
        print("closed" if fleet.closed else "open", flush=True)
