"""The commands, options and files that a page names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import typer

from muxjax.cli.main import app
from tests.docs.pages import ROOT, Block, split_session

_INLINE = re.compile(r"`([^`\n]+)`")
_FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_FOLDERS = "benchmarks|docs|examples|models|muxjax|pallas_kernels|placement|scripts|serve|tests"
_CHECKOUT_FILE = re.compile(rf"(?:{_FOLDERS})/[\w./-]*\w|Makefile|\w+\.md")
_USER_FILE = re.compile(r"\.?/?[\w./-]+\.(?:ya?ml|jsonl?|csv|gguf|pem|txt|toml|svg)")
# Options and operators after which a file is written.
_WRITES = ("-o", "--output", "--trace", "--plot", "-keyout", "-out", ">")
# Made by examples/train_tiny.py.
_GENERATED = ("examples/tiny", "build/")


def shell_commands(text: str) -> Iterator[list[str]]:
    """Yields the words of each command of a shell block, without prompts and comments."""
    joined = re.sub(r"\\\n", " ", text)
    for line in re.sub(r"(?m)^\$ ", "", joined).splitlines():
        try:
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&>")
            lexer.whitespace_split = True
            lexer.commenters = "#"
            words = list(lexer)
        except ValueError:  # an output, or the body of a JSON argument over several lines
            words = line.split()
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set(";|&"):
                if command:
                    yield command
                command = []
            else:
                command.append(word)


def inline_commands(text: str) -> Iterator[list[str]]:
    """Yields the commands in back quotes outside of blocks, such as `muxjax plan FLEET`."""
    for found in _INLINE.finditer(_FENCED.sub("", text)):
        if found[1].startswith("muxjax "):
            yield from shell_commands(found[1])


def unknown_parts(words: list[str]) -> list[str]:
    """Returns the subcommands and options of a `muxjax` command line that do not exist."""
    if "muxjax" not in words[:3]:
        return []
    words = words[words.index("muxjax") + 1 :]
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words and re.fullmatch(r"[a-z][a-z-]*", words[0]):
        if words[0] not in command.commands:
            return [words[0]]
        command, words = command.commands[words[0]], words[1:]
    known = {"--help"}
    for parameter in command.params:
        known.update((*parameter.opts, *parameter.secondary_opts))
    options = [word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)]
    return [option for option in options if option not in known]


def missing_checkout_files(text: str) -> list[str]:
    """Returns the files of the checkout that a page names in back quotes and that do not exist."""
    names = [
        word
        for found in _INLINE.finditer(_FENCED.sub("", text))
        for word in found[1].split()
        if "/" in word and _CHECKOUT_FILE.fullmatch(word)
    ]
    return [name for name in names if not _exists(name)]


def missing_files(blocks: list[Block]) -> list[tuple[Block, str]]:
    """Returns the files that commands read and that neither exist nor were written before."""
    written: set[str] = set()
    missing = []
    for block in blocks:
        if block.verb == "save":
            written.add(block.argument)
        if not block.is_shell:
            continue
        commands = "".join(command for command, _ in split_session(block.text))
        for words in shell_commands(commands):
            read = []
            for before, name in zip(["", *words], words, strict=False):
                if not _USER_FILE.fullmatch(name):
                    continue
                if before in _WRITES:
                    written.add(name)
                else:
                    read.append(name)
            unwritten = [name for name in read if name not in written]
            missing += [(block, name) for name in unwritten if not _exists(name)]
    return missing


def _exists(name: str) -> bool:
    return name.startswith(_GENERATED) or (ROOT / name).exists()
