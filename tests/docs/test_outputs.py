"""Outputs that differ only in figures are equal."""

import pytest

from tests.docs.outputs import difference


@pytest.mark.parametrize(
    ("shown", "actual"),
    [
        ("found in 0.45 s", "found in 12 s"),
        ("TTFT 19 ms", "TTFT 1.2 s"),
        ("pool 512 MB", "pool 1.1 GB"),
        ("|AAAB░░··| 80 GB  A chat", "|AB░░░···| 8 GB  A chat"),
        ("#  mux-eJ1n4...\n  sha256: 7bd6a3...", "# mux-a_b-c9\nsha256: 00ffa312"),
        ("a long line\nwrapped by hand", "a long line wrapped by hand"),
        ("... in the middle ...", "text in the middle of text"),
    ],
)
def test_figures_may_differ(shown, actual):
    assert difference(shown, actual) is None


@pytest.mark.parametrize(
    ("shown", "actual"),
    [
        ("model chat", "model base"),
        ("unit use model", "unit model"),
        ("serves 5 of 5 requests/s", "serves 5 of 5 requests/s\nand more"),
        ("status: sleeping", ""),
    ],
)
def test_words_may_not(shown, actual):
    message = difference(shown, actual)
    assert message is not None
    assert shown.splitlines()[0] in message


def test_exact_keeps_all_figures_but_the_time_of_a_search():
    assert difference("82 of 82, found in 0.4 s", "82 of 82, found in 2 s", exact=True) is None
    assert difference("82 of 82", "81 of 82", exact=True) is not None
