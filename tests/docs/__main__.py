"""`python -m tests.docs [PAGE ...] [--write]`."""

from __future__ import annotations

import argparse
import signal
import sys
import time

from tests.docs.pages import documented_pages
from tests.docs.run_pages import run_pages


def main() -> int:
    """Runs the pages and prints the failures; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.docs", description=__doc__)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="Pages to run. By default all.")
    parser.add_argument(
        "--write", action="store_true", help="Put the actual outputs into the pages."
    )
    arguments = parser.parse_args()
    # So that a run that is ended also ends its server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.monotonic()
    failures = run_pages(
        arguments.pages or documented_pages(), lambda line: print(line, flush=True), arguments.write
    )
    for failure in failures:
        print(f"\n{failure}")
    print(f"\n{len(failures)} failures, {time.monotonic() - started:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
