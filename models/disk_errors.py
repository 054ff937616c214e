"""Reasons why a file could not be written, in one line."""

from __future__ import annotations

import os
import re

_OS_ERROR_CODE = re.compile(r"os_error_code='(\d+)'")


def write_failure(error: BaseException) -> str:
    """The reason of a failed write, without the path.

    TensorStore raises a ValueError with the number of the system's error in its text.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = _OS_ERROR_CODE.search(str(error))
    if code is not None:
        return os.strerror(int(code[1]))
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
