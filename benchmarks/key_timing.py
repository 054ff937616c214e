"""Whether the time to check a wrong API key reveals anything about valid keys.

    python benchmarks/key_timing.py [--samples 20000] [--json]

Looks up keys in a set of 50, in random order: a valid key, wrong keys whose first 0, 8, 16 or all
but one characters are correct, and a key of a different length. If the time depended on the number
of correct characters, an attacker could guess a key one character at a time. The table shows
medians and the difference from the valid key, in standard errors of the median (by bootstrap).
Differences below `--limit` standard errors count as noise.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from statistics import median, pstdev

from rich.console import Console
from rich.table import Table

from muxjax.serve.access.keys import Key, Keys, digest_of, new_secret

KEYS = 50
BATCH = 20
"""Look-ups that are timed together, since one look-up is as short as a clock tick."""


def main() -> None:
    """Measures and prints the result; exits with status 1 if a difference is significant."""
    parser = argparse.ArgumentParser(description="Time look-ups of right and wrong API keys.")
    parser.add_argument(
        "--samples", type=int, default=20_000, help="measurements of each kind of key"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=4.0,
        help="differences below this number of standard errors count as noise",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()

    secrets = [new_secret() for _ in range(KEYS)]
    keys = Keys(
        Key(name=f"k{number}", sha256=digest_of(secret).hex())
        for number, secret in enumerate(secrets)
    )
    right = secrets[KEYS // 2]
    kinds = {"right": right, "another length": "x"}
    for same in (0, 8, 16, len(right) - 1):
        kinds[f"{same} characters right"] = right[:same] + "!" * (len(right) - same)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    order = list(kinds)
    for _ in range(arguments.samples):
        random.shuffle(order)
        for kind in order:
            secret = kinds[kind]
            began = time.perf_counter_ns()
            for _ in range(BATCH):
                keys.find(secret)
            times[kind].append((time.perf_counter_ns() - began) / BATCH)

    base, base_error = median(times["right"]), _error(times["right"])
    rows = []
    for kind, samples in times.items():
        error = (base_error**2 + _error(samples) ** 2) ** 0.5
        difference = median(samples) - base
        rows.append(
            {
                "kind": kind,
                "median_ns": median(samples),
                "difference_ns": difference,
                "standard_errors": difference / error if error else 0.0,
                "ratio": median(samples) / base,
            }
        )
    # A shorter text is hashed faster, which reveals only the length of the guess.
    significant = [
        row
        for row in rows
        if row["kind"] != "another length"
        and abs(float(row["ratio"]) - 1) > 0.02
        and abs(float(row["standard_errors"])) > arguments.limit
    ]
    if arguments.json:
        print(json.dumps({"rows": rows, "passed": not significant}, indent=2))
    else:
        table = Table(title=f"one look-up among {KEYS} keys", box=None)
        for name in ("secret", "median ns", "difference ns", "standard errors", "ratio"):
            table.add_column(name, justify="left" if name == "secret" else "right")
        for row in rows:
            table.add_row(
                str(row["kind"]),
                f"{row['median_ns']:.0f}",
                f"{row['difference_ns']:+.1f}",
                f"{row['standard_errors']:+.1f}",
                f"{row['ratio']:.4f}",
            )
        Console().print(table)
    sys.exit(1 if significant else 0)


def _error(values: list[float]) -> float:
    """Standard error of the median, by bootstrap."""
    medians = [median(random.choices(values, k=len(values))) for _ in range(30)]
    return pstdev(medians)


if __name__ == "__main__":
    main()
