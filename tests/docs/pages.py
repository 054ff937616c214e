"""The fenced blocks of a page and their directives."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHELL = ("", "sh", "bash", "console")
# A page's fence may be indented, within a list.
_FENCE = re.compile(
    r"(?:^[ ]*<!--[ ]docs:[ ](?!page[ ])(?P<directive>(?:(?!-->).)*?)[ ]?-->\n\s*)?"
    r"^(?P<indent>[ ]*)```(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^[ ]*```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_PAGE_SKIP = re.compile(r"<!-- docs: page skip ([^>]+?) ?-->")
VERBS = ("run", "server", "serve", "save", "output", "skip")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
      page: path of the page, relative to the checkout.
      line: line number of the opening fence.
      language: language of the fence; empty if it names none.
      text: the lines between the fences, without the fence's indentation.
      verb: what to do with it, one of `VERBS`; empty without a directive.
      argument: the rest of the directive.
      start: offset of the first line after the fence, in the page.
    """

    page: str
    line: int
    language: str
    text: str
    verb: str
    argument: str
    start: int

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_shell(self) -> bool:
        return self.language in SHELL

    @property
    def timeout(self) -> float:
        """Seconds that the block may run."""
        found = re.search(r"\btimeout=(\d+)", self.argument)
        return float(found[1]) if found else 60.0


def documented_pages() -> list[str]:
    """Returns the paths of all pages for users, relative to the checkout."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
    pages += [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]
    return [page.relative_to(ROOT).as_posix() for page in pages]


def parse_blocks(page: str, text: str) -> list[Block]:
    """Returns the fenced blocks of a page, in order.

    Raises:
      ValueError: a directive is unknown.
    """
    whole_page = _PAGE_SKIP.search(text)
    blocks = []
    for found in _FENCE.finditer(text):
        directive = (found["directive"] or "").strip()
        if not directive and whole_page:
            directive = f"skip {whole_page[1]}"
        verb, _, argument = directive.partition(" ")
        line = text.count("\n", 0, found.start("indent")) + 1
        if verb and verb not in VERBS:
            raise ValueError(f"{page}:{line}: unknown directive {verb!r}")
        if verb in ("skip", "save", "server") and not argument:
            raise ValueError(f"{page}:{line}: {verb} needs an argument")
        lines = found["text"].splitlines(keepends=True)
        body = "".join(entry.removeprefix(found["indent"]) for entry in lines)
        blocks.append(
            Block(page, line, found["language"], body, verb, argument.strip(), found.start("text"))
        )
    return blocks


def split_session(text: str) -> list[tuple[str, str]]:
    """Returns commands and shown outputs of a block with `$ ` prompts; without any, one command."""
    if not text.startswith("$ "):
        return [(text, "")]
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
    session = []
    for part in parts:
        command = re.match(r"(?:[^\n]*\\\n)*[^\n]*\n", part)
        assert command is not None
        session.append((command[0], part[command.end() :]))
    return session
