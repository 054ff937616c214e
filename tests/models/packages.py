"""Builds a wheel and a local index for tests with the real pip."""

from __future__ import annotations

import zipfile
from pathlib import Path

NAME, VERSION = "muxjax-test-data", "1.2.3"
WHEEL = "muxjax_test_data-1.2.3-py3-none-any.whl"


def build_wheel(folder: Path, files: dict[str, bytes]) -> Path:
    """Builds a wheel that pip accepts and that contains these files."""
    info = "muxjax_test_data-1.2.3.dist-info"
    path = folder / WHEEL
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def index_page(link: str) -> bytes:
    """A page of the simple repository API with one link."""
    return f'<!DOCTYPE html><html><body><a href="{link}">{WHEEL}</a></body></html>'.encode()
