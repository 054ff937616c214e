"""Runs the blocks of the pages in order."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.docs.outputs import difference
from tests.docs.pages import ROOT, Block, parse_blocks, split_session
from tests.docs.server import Server, ServerFailed
from tests.docs.workspace import Completed, Workspace


class BlockFailed(Exception):
    """A block's command failed, or its output is not the one that the page shows."""


class PageRunner:
    """Runs blocks in a copy of the checkout. Python blocks of a page share one program."""

    def __init__(self, folder: Path) -> None:
        self._workspace = Workspace(folder)
        self._server = Server(self._workspace, folder)
        self._last = Completed(0, "", "")

    def close(self) -> None:
        """Stops the server."""
        self._server.stop()

    def run_page(
        self, blocks: list[Block], say: Callable[[str], None], write: bool = False
    ) -> list[str]:
        """Runs the blocks of one page.

        Args:
          blocks: the page's blocks.
          say: gets a line for each block.
          write: puts the actual outputs into the page instead of comparing them.

        Returns:
          The failures: place and message.
        """
        failures = []
        programs = [block for block in blocks if block.language == "python" and block.verb == "run"]
        for block in blocks:
            if block.verb in ("", "skip") or (block in programs and block != programs[-1]):
                continue
            started = time.monotonic()
            try:
                if block in programs:
                    self._run_python(programs)
                else:
                    self._run_block(block, write)
                outcome = "passed"
            except (BlockFailed, ServerFailed) as error:
                failures.append(f"{block.place}: {error}")
                outcome = "FAILED"
            say(f"{outcome} {time.monotonic() - started:6.1f} s  {block.place} {block.verb}")
        return failures

    def _run_block(self, block: Block, write: bool) -> None:
        if block.verb == "save":
            (self._workspace.root / block.argument).write_text(block.text)
            return
        if block.verb == "output":
            if block.argument:
                script = block.argument.removeprefix("of:").strip()
                self._last = self._workspace.run(script, block.timeout)
            self._compare(block, block.text, self._last, write)
            return
        if block.verb == "serve":
            self._serve(re.sub(r"\s+#.*", "", block.text).strip())
            return
        if block.verb == "server":
            self._server.serve_fleet(block.argument.split()[0])
        if block.language == "python":
            self._run_python([block])
            return
        for command, shown in split_session(block.text):
            self._last = self._workspace.run(command, block.timeout)
            self._require_success(self._last)
            if shown:
                self._compare(block, shown, self._last, write)

    def _serve(self, command: str) -> None:
        """Starts a server; one of a fleet file alone stays for the blocks that follow."""
        plain = re.fullmatch(r"muxjax serve (\S+)", command)
        if plain:
            self._server.serve_fleet(plain[1])
            return
        self._server.start(f"{command} --port {self._workspace.port}")
        self._server.stop()

    def _run_python(self, blocks: list[Block]) -> None:
        program = self._workspace.root / "page.py"
        program.write_text("\n".join(block.text for block in blocks))
        timeout = max(block.timeout for block in blocks)
        self._last = self._workspace.run("python page.py", timeout)
        self._require_success(self._last)

    def _require_success(self, completed: Completed) -> None:
        if completed.status is None:
            raise BlockFailed(f"it did not end in time\n{_tail(completed)}")
        if completed.status != 0:
            raise BlockFailed(f"it ended with status {completed.status}\n{_tail(completed)}")

    def _compare(self, block: Block, shown: str, completed: Completed, write: bool) -> None:
        actual = completed.out or completed.err
        if write:
            _replace_output(block, shown, actual)
            return
        message = difference(shown, actual, exact="exact" in block.argument.split())
        if message is not None:
            raise BlockFailed(message)


def run_pages(pages: list[str], say: Callable[[str], None], write: bool = False) -> list[str]:
    """Runs pages in a new copy of the checkout and returns the failures."""
    folder = Path(tempfile.mkdtemp(prefix="muxjax-docs-"))
    failures = []
    runner = PageRunner(folder)
    try:
        for page in pages:
            blocks = parse_blocks(page, (ROOT / page).read_text())
            failures += runner.run_page(blocks, say, write)
    finally:
        try:
            runner.close()
        except ServerFailed as error:
            failures.append(str(error))
        shutil.rmtree(folder, ignore_errors=True)
    return failures


def _replace_output(block: Block, shown: str, actual: str) -> None:
    path = ROOT / block.page
    text = path.read_text()
    before, after = text[: block.start], text[block.start :]
    if shown not in after:
        raise BlockFailed("an indented output cannot be replaced; edit it by hand")
    path.write_text(before + after.replace(shown, actual.rstrip("\n") + "\n", 1))


def _tail(completed: Completed) -> str:
    lines = (completed.out + completed.err).splitlines()[-20:]
    return "\n".join(f"  | {line}" for line in lines)
