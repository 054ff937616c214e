"""Writes traces of requests in Mooncake's or MuxServe's format (see `trace_files.py`)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from muxjax.errors import WorkloadError
from muxjax.placement.workload.trace import TraceRequest


def write_trace(requests: Iterable[TraceRequest], path: Path) -> int:
    """Writes a trace: `.jsonl` in Mooncake's format with models, `.json` in MuxServe's format.

    Returns:
      The number of requests.

    Raises:
      WorkloadError: the suffix is neither of these.
    """
    if path.suffix == ".jsonl":
        return _write_mooncake(requests, path)
    if path.suffix == ".json":
        return _write_muxserve(requests, path)
    raise WorkloadError(f"{path}: a trace must be written as .jsonl (Mooncake) or .json (MuxServe)")


def _write_mooncake(requests: Iterable[TraceRequest], path: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for request in requests:
            row: dict[str, Any] = {
                "timestamp": request.arrival * 1000,
                "input_length": request.prompt_tokens,
                "output_length": request.output_tokens,
                "hash_ids": list(request.hash_ids),
            }
            if request.model:
                row["model"] = request.model
            file.write(json.dumps(row) + "\n")
            count += 1
    return count


def _write_muxserve(requests: Iterable[TraceRequest], path: Path) -> int:
    arrivals: list[float] = []
    entries: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    for index, request in enumerate(requests):
        arrivals.append(request.arrival)
        counts[request.model] = counts.get(request.model, 0) + 1
        lengths = ["", request.prompt_tokens, request.output_tokens]
        entries.append({"model_name": request.model, "data": lengths, "slo": None, "idx": index})
    seconds = arrivals[-1] if arrivals else 0.0
    info = {
        "rates": [[name, count / seconds if seconds else 0.0] for name, count in counts.items()],
        "start": 0,
        "duration": seconds,
        "num_requests": list(counts.values()),
    }
    data = {"info": info, "arrivals": arrivals, "requests": entries}
    path.write_text(json.dumps(data), encoding="utf-8")
    return len(arrivals)
