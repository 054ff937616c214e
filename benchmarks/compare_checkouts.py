"""Compares two checkouts with the same benchmark script, in alternating runs.

    python benchmarks/compare_checkouts.py --baseline ../before host.py --rounds 3 -- --turns 300
    python benchmarks/compare_checkouts.py --baseline ../before decode.py --keys tokens_per_s

Each round runs `benchmarks/SCRIPT --json` in the baseline and in this checkout, in alternating
order, so that a change of the machine's speed affects both. The output has the median of every
number that both print under the same path, and the ratio (this checkout over the baseline).
Arguments after `--` are passed to the script. Each checkout needs its environment (`make setup`).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from muxjax.bench.script_output import print_json, print_table

HERE = Path(__file__).resolve().parent.parent


def main() -> None:
    """Runs the script in both checkouts and prints the ratios."""
    parser = argparse.ArgumentParser(description="Compare two checkouts with a benchmark script.")
    parser.add_argument("script", help="a script of benchmarks/, such as host.py")
    parser.add_argument("--baseline", type=Path, required=True, help="folder of the other checkout")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each; medians are shown")
    parser.add_argument("--keys", default="", help="only paths that match this regular expression")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    own_arguments, _, script_arguments = " ".join(sys.argv[1:]).partition(" -- ")
    options = parser.parse_args(own_arguments.split())
    checkouts = {"baseline": options.baseline.resolve(), "this": HERE}
    numbers: dict[str, dict[str, list[float]]] = {name: {} for name in checkouts}
    for index in range(options.rounds):
        order = list(checkouts.items())
        for name, folder in order if index % 2 == 0 else reversed(order):
            output = run_script(folder, options.script, script_arguments.split(), options.timeout)
            for path, number in flatten(output):
                numbers[name].setdefault(path, []).append(number)
    rows = [
        {"path": path, "baseline": before, "this": after, "ratio": after / before}
        for path in numbers["this"]
        if path in numbers["baseline"] and re.search(options.keys, path)
        for before, after in [(median(numbers["baseline"][path]), median(numbers["this"][path]))]
        if before
    ]
    if options.json:
        print_json({"script": options.script, "rounds": options.rounds, "rows": rows})
    else:
        title = f"{options.script}, medians of {options.rounds} rounds"
        print_table(title, ["path", "baseline", "this", "ratio"], rows)


def run_script(folder: Path, script: str, arguments: list[str], timeout: float) -> Any:
    """Runs a benchmark script of a checkout in its environment and returns its JSON output."""
    python = folder / ".venv" / "bin" / "python"
    command = [str(python), f"benchmarks/{script}", "--json", *arguments]
    process = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False
    )
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed in {folder}:\n{process.stderr}")
    return json.loads(process.stdout)


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yields the numbers of a JSON value with their paths.

    The path of a list element contains its index and its texts, to identify the case.
    """
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return
    if isinstance(value, int | float):
        yield path, float(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{path}.{key}" if path else key)
    else:
        for index, item in enumerate(value):
            fields = item.values() if isinstance(item, dict) else ()
            texts = [field for field in fields if isinstance(field, str)]
            yield from flatten(item, f"{path}[{' '.join([str(index), *texts])}]")


if __name__ == "__main__":
    main()
