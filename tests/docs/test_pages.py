"""Every block says what is done with it; commands, options and files that pages name exist."""

import pytest

from tests.docs.names import (
    inline_commands,
    missing_checkout_files,
    missing_files,
    shell_commands,
    unknown_parts,
)
from tests.docs.pages import ROOT, documented_pages, parse_blocks, split_session

PAGES = documented_pages()


def blocks_of(page):
    return parse_blocks(page, (ROOT / page).read_text())


@pytest.mark.parametrize("page", PAGES)
def test_every_shell_block_has_a_directive(page):
    # Diagrams and outputs without a command are marked as `text`.
    unmarked = [block.place for block in blocks_of(page) if block.is_shell and not block.verb]
    assert not unmarked, "write <!-- docs: run --> or <!-- docs: skip REASON --> before the block"


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_have_a_directive(page):
    unmarked = [b.place for b in blocks_of(page) if b.language == "python" and not b.verb]
    assert not unmarked


@pytest.mark.parametrize("page", PAGES)
def test_a_skipped_block_says_why(page):
    for block in blocks_of(page):
        if block.verb == "skip":
            assert len(block.argument.split()) >= 3, block.place


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_exist(page):
    unknown = []
    for block in blocks_of(page):
        if block.is_shell:
            for command, _ in split_session(block.text):
                for words in shell_commands(command):
                    unknown += [(block.place, part) for part in unknown_parts(words)]
    for words in inline_commands((ROOT / page).read_text()):
        unknown += [(" ".join(words), part) for part in unknown_parts(words)]
    assert not unknown


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page):
    assert not [(block.place, name) for block, name in missing_files(blocks_of(page))]
    assert not missing_checkout_files((ROOT / page).read_text())


@pytest.mark.parametrize(
    ("block", "unknown"),
    [
        ("muxjax plan fleet.yaml --cluster 1x1:cpu", []),
        ("muxjax plann fleet.yaml", ["plann"]),
        ("X=1 muxjax bench serve a.yaml --no-such --seed 1", ["--no-such"]),
        ("ls --no-such", []),
        ("muxjax serve a.yaml   # muxjax nothing", []),
        ("$ muxjax key alice", []),
    ],
)
def test_unknown_parts_of_commands(block, unknown):
    found = [part for words in shell_commands(block) for part in unknown_parts(words)]
    assert found == unknown


def test_a_file_must_exist_or_be_written_before():
    text = (
        "<!-- docs: run -->\n```\nmuxjax plan examples/small.yaml -o p.json\n"
        "muxjax simulate p.json\nmuxjax simulate q.json\n```\n"
    )
    assert [name for _, name in missing_files(parse_blocks("page.md", text))] == ["q.json"]


def test_an_unknown_directive_is_an_error():
    with pytest.raises(ValueError, match=r"page\.md:2: unknown directive 'rum'"):
        parse_blocks("page.md", "<!-- docs: rum -->\n```\nls\n```\n")


def test_directives_of_blocks():
    text = (
        "<!-- docs: run timeout=90 exact -->\n```sh\n$ echo 1\n1\n```\n\n"
        "- item\n\n  <!-- docs: skip it needs a TPU -->\n  ```\n  ls\n  ```\n\n```text\n-->\n```\n"
    )
    first, second, third = parse_blocks("page.md", text)
    assert (first.verb, first.timeout, first.line) == ("run", 90.0, 2)
    assert split_session(first.text) == [("echo 1\n", "1\n")]
    assert (second.verb, second.argument, second.text) == ("skip", "it needs a TPU", "ls\n")
    assert (third.verb, third.is_shell) == ("", False)


def test_a_page_can_be_skipped_as_a_whole():
    text = "<!-- docs: page skip it takes hours -->\n\n```\nls\n```\n"
    (block,) = parse_blocks("page.md", text)
    assert (block.verb, block.argument) == ("skip", "it takes hours")
