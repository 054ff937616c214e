"""A web server for download tests: serves bytes, with or without ranges, and can disconnect."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.models.http_server import QuietRequests, running


@dataclass
class Served:
    """The state of a server: its files, planned failures, and recorded requests.

    Attributes:
      files: path -> contents.
      ranges: whether it supports Range.
      break_after: for each future request, the bytes sent before the connection is closed.
      statuses: for each future request, an error status to respond with (0: none).
      hold_after: bytes of each file after which the server waits for `release`; None: it does not.
      release: set to let the server continue.
      requested_ranges: the Range header of each request so far ("" without one).
      authorizations: the Authorization header of each request so far.
      address: URL of the server, without a path.
    """

    files: dict[str, bytes]
    ranges: bool = True
    break_after: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    hold_after: int | None = None
    release: threading.Event = field(default_factory=threading.Event)
    requested_ranges: list[str] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)
    address: str = ""


@contextmanager
def serve(served: Served) -> Iterator[Served]:
    """Serves on a free local port until the block ends."""

    class Handler(QuietRequests, http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested = self.headers.get("Range", "")
            served.requested_ranges.append(requested)
            served.authorizations.append(self.headers.get("Authorization", ""))
            status = served.statuses.pop(0) if served.statuses else 0
            data = served.files.get(self.path)
            if status or data is None:
                self.send_error(status or 404)
                return
            start = 0
            if requested and served.ranges:
                start = int(requested.removeprefix("bytes=").removesuffix("-"))
                if start >= len(data):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            else:
                self.send_response(200)
            kind = "text/html" if self.path.endswith("/") else "application/octet-stream"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            count = served.break_after.pop(0) if served.break_after else len(data)
            sent = data[start : start + count]
            try:
                if served.hold_after is not None:
                    self.wfile.write(sent[: served.hold_after])
                    served.release.wait(300)
                    sent = sent[served.hold_after :]
                self.wfile.write(sent)
            except ConnectionError:
                pass  # the client was killed

    with running(Handler) as address:
        served.address = address
        yield served
