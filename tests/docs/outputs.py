"""Comparison of a shown output with the actual one."""

from __future__ import annotations

import re

# Secrets, digests and request ids.
_ID = re.compile(r"\bmux-[\w-]+|\b(?=[a-f]*\d)[0-9a-f]{6,}\b")
# A figure with its unit, which changes with the figure's size.
_FIGURE = re.compile(r"-?\d+(?:[.,:]\d+)*(?:e[+-]?\d+)?(?:\s?(?:[kMGT]i?B|B|µs|ms|s)\b)?")
# Bars, rules and the lines of tables, whose lengths depend on the figures.
_REPEATED = re.compile(r"([░·─━═=-])\1+|(?<=\|)[A-Z░·]+(?=\|)")
_SEARCH_TIME = re.compile(r"\d+(?:\.\d+)?(?= s$)", re.MULTILINE)


def masked(text: str, exact: bool = False) -> str:
    """Returns the text without white space and without what differs between runs.

    Args:
      exact: keeps all figures except a duration in seconds at the end of a line.
    """
    if exact:
        text = _SEARCH_TIME.sub("#", text)
    else:
        text = _REPEATED.sub("~", _FIGURE.sub("#", _ID.sub("#", text)))
    return "".join(text.split())


def difference(shown: str, actual: str, exact: bool = False) -> str | None:
    """Returns how an actual output differs from the shown one; None if it does not.

    `...` in the shown output stands for any text.
    """
    pattern = ".*".join(re.escape(masked(part, exact)) for part in shown.split("..."))
    if re.fullmatch(pattern, masked(actual, exact)):
        return None
    return f"the page shows\n{_indented(shown)}\nthe command prints\n{_indented(actual)}"


def _indented(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.rstrip("\n").splitlines())
