from __future__ import annotations

from pathlib import Path

import pytest

from muxjax.errors import WorkloadError
from muxjax.placement.workload.trace import TraceRequest
from muxjax.placement.workload.trace_files import open_trace
from muxjax.placement.workload.trace_writer import write_trace


@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_a_written_trace_can_be_read(tmp_path: Path, name: str) -> None:
    hashes = (7, 8) if name == "t.jsonl" else ()
    requests = [
        TraceRequest(0.1, "a", 3, 4, hashes),
        TraceRequest(1 / 3, "b", 5, 6),
    ]
    assert write_trace(requests, tmp_path / name) == 2
    loaded = list(open_trace(tmp_path / name))
    assert [request.arrival for request in loaded] == pytest.approx([0.1, 1 / 3], abs=1e-12)
    assert [(r.model, r.prompt_tokens, r.output_tokens, r.hash_ids) for r in loaded] == [
        ("a", 3, 4, hashes),
        ("b", 5, 6, ()),
    ]


def test_an_unknown_suffix_raises(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="written as"):
        write_trace([], tmp_path / "t.csv")
