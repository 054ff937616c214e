"""Blocks are run in a copy of the checkout, and failures name page and line."""

from pathlib import Path

import pytest

from tests.docs.pages import parse_blocks
from tests.docs.run_pages import PageRunner


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    runner = PageRunner(tmp_path_factory.mktemp("docs"))
    yield runner
    runner.close()


def failures(runner, text):
    return runner.run_page(parse_blocks("page.md", text), lambda line: None)


def test_passing_blocks(runner):
    text = (
        "<!-- docs: save notes.txt -->\n```text\none 1\n```\n"
        "<!-- docs: run -->\n```\ncat notes.txt\nls pyproject.toml\n```\n"
        "<!-- docs: output -->\n```text\none 2 pyproject.toml\n```\n"
        "<!-- docs: output of:\necho a > b.txt\ncat b.txt\n-->\n```\na\n```\n"
        "<!-- docs: run -->\n```\n$ echo 1 two\n5 two\n```\n"
        "<!-- docs: run -->\n```python\nx = 1\n```\n"
        "<!-- docs: run -->\n```python\nassert x == 1\n```\n"
        "<!-- docs: skip it would fail here -->\n```\nfalse\n```\n"
    )
    assert failures(runner, text) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- docs: run -->\n```\nfalse\n```\n", "page.md:2: it ended with status 1"),
        ("<!-- docs: run -->\n```\nfalse | cat\n```\n", "it ended with status 1"),
        ("<!-- docs: run -->\n```\nls no.yaml\n```\n", "no.yaml"),
        ("<!-- docs: run timeout=1 -->\n```\nsleep 60\n```\n", "it did not end in time"),
        ("<!-- docs: run -->\n```\n$ echo one\ntwo\n```\n", "the page shows\n  | two\n"),
        ("<!-- docs: run -->\n```python\nassert not 1\n```\n", "AssertionError"),
        ("<!-- docs: serve -->\n```\necho stopped; exit 0\n```\n", "the server did not start"),
    ],
)
def test_failing_blocks(runner, text, message):
    (failure,) = failures(runner, text)
    assert message in failure


def test_muxjax_is_that_of_the_copy(runner):
    text = "<!-- docs: run -->\n```python\nimport muxjax\nprint(muxjax.__file__)\n```\n"
    shown = "<!-- docs: output -->\n```\n.../muxjax-docs-...\n```\n"
    (failure,) = failures(runner, text + shown)
    assert f"{Path('muxjax', 'muxjax', '__init__.py')}" in failure


def test_ports_of_the_pages_are_replaced(runner):
    text = "<!-- docs: run -->\n```\ntest 127.0.0.1:8000 != 127.0.0.1:$((8000))\n```\n"
    assert failures(runner, text) == []
