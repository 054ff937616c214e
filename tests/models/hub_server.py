"""A Hugging Face Hub with one repository, for tests with the real `huggingface_hub`."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.models.http_server import QuietRequests, running

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubRepository:
    """The repository `org/tiny`.

    Attributes:
      files: name -> contents; `.safetensors` files are stored in Git LFS.
      damaged: name -> contents that are sent instead, of the same size.
      hold_after: bytes of each LFS file after which the server waits for `release`.
      release: set to let the server continue.
      downloads: names of the files that were requested with GET so far.
      address: URL of the Hub.
    """

    files: dict[str, bytes]
    damaged: dict[str, bytes] = field(default_factory=dict)
    hold_after: int | None = None
    release: threading.Event = field(default_factory=threading.Event)
    downloads: list[str] = field(default_factory=list)
    address: str = ""

    def etag(self, name: str) -> str:
        """SHA-256 of an LFS file, Git's blob id of another file."""
        data = self.files[name]
        if name.endswith(".safetensors"):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()

    def tree(self) -> list[dict[str, object]]:
        """The listing of the repository, as the Hub's API returns it."""
        entries = []
        for name, data in self.files.items():
            etag = self.etag(name)
            entry: dict[str, object] = {"type": "file", "path": name, "size": len(data)}
            entry["oid"] = etag[:40]
            if len(etag) == 64:
                entry["lfs"] = {"oid": etag, "size": len(data), "pointerSize": 130}
            entries.append(entry)
        return entries


@contextmanager
def serve_hub(hub: HubRepository) -> Iterator[HubRepository]:
    """Serves a repository on a free local port until the block ends."""

    class Handler(QuietRequests, http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith("/api/models/org/tiny/tree/"):
                self._send(json.dumps(hub.tree()).encode(), {})
            elif path.startswith("/api/models/org/tiny"):
                siblings = [{"rfilename": name} for name in hub.files]
                info = {"id": "org/tiny", "sha": COMMIT, "siblings": siblings}
                self._send(json.dumps(info).encode(), {})
            else:
                self._send_file(path.removeprefix("/org/tiny/resolve/").partition("/")[2])

        def do_HEAD(self) -> None:
            self.do_GET()

        def _send_file(self, name: str) -> None:
            if name not in hub.files:
                self.send_error(404)
                return
            headers = {"ETag": f'"{hub.etag(name)}"', "X-Repo-Commit": COMMIT}
            if self.command == "GET":
                hub.downloads.append(name)
            self._send(hub.damaged.get(name, hub.files[name]), headers)

        def _send(self, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(200)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "HEAD":
                return
            try:
                if hub.hold_after is not None and len(data) > hub.hold_after:
                    self.wfile.write(data[: hub.hold_after])
                    hub.release.wait(300)
                    data = data[hub.hold_after :]
                self.wfile.write(data)
            except ConnectionError:
                pass  # the client was killed

    with running(Handler) as address:
        hub.address = address
        try:
            yield hub
        finally:
            hub.release.set()
