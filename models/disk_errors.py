"""Space on a disk, and reasons why a file could not be written, in one line."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

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
    return " ".join(str(error).split()) or type(error).__name__


def check_space(folder: Path, needed: int) -> None:
    """Checks that files fit on a disk, before minutes are spent on writing them.

    Args:
      folder: of the files.
      needed: the least number of bytes that will be written.

    Raises:
      OSError: they do not fit.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        reason = f"{os.strerror(errno.ENOSPC)}: {needed / 1e6:,.0f} MB are needed"
        raise OSError(errno.ENOSPC, f"{reason}, {free / 1e6:,.0f} MB are free")
