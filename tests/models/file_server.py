"""A web server for download tests: serves bytes, with or without ranges, and can break off."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Served:
    """What the server gives, and what it was asked.

    Attributes:
      files: path -> contents.
      ranges: whether it honors Range.
      break_after: for each coming request, how many bytes it sends before it hangs up.
      statuses: for each coming request, an error status to answer with (0: none).
      asked: the Range header of each request so far ("" where there was none).
      authorizations: the Authorization header of each request so far.
      address: where it listens, with the scheme.
    """

    files: dict[str, bytes]
    ranges: bool = True
    break_after: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)
    address: str = ""


@contextmanager
def serve(served: Served) -> Iterator[Served]:
    """Serves on a free local port until the block ends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range", "")
            served.asked.append(wanted)
            served.authorizations.append(self.headers.get("Authorization", ""))
            status = served.statuses.pop(0) if served.statuses else 0
            data = served.files.get(self.path)
            if status or data is None:
                self.send_error(status or 404)
                return
            start = 0
            if wanted and served.ranges:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
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
            self.wfile.write(data[start : start + count])

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
