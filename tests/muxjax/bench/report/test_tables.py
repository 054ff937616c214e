"""Tables of saved results."""

from __future__ import annotations

from muxjax.bench.report.tables import http_grids, number, percentage, steps_grids


def test_numbers_are_short() -> None:
    assert (number(1234.5), number(None), number("inf")) == ("1.23e+03", "-", "inf")
    assert (percentage(0.5), percentage(None)) == ("50.0%", "-")


def test_steps_show_chunks_or_tokens() -> None:
    step = {"model": "m", "bucket": 8, "context": 16, "median_ms": 2.0}
    step |= {"lowest_ms": 1.0, "highest_ms": 2.0}
    prefill = {**step, "phase": "prefill", "samples": False, "chunks": 2}
    decode = {**step, "phase": "decode", "samples": True, "tokens": 4}
    (grid,) = steps_grids({"steps": [prefill, decode]})
    assert [row[1] for row in grid.rows] == ["prefill, no sampling", "decode"]
    assert [row[3] for row in grid.rows] == ["2 chunks", "4 tokens"]
    assert grid.rows[0][-1] == "50.0%"


def test_http_notes_list_approximations_and_interrupts() -> None:
    report = {"duration": 2.0, "prompt_tokens_by": {"m": "words"}, "interrupted": 3}
    report |= {"models": {"m": {"mean_ttft_ms": 5.0}}, "mean_ttft_ms": 5.0}
    summary, latencies = http_grids(report)
    assert "prompt lengths are approximate" in summary.note
    assert "interrupted: 3 requests left out" in summary.note
    assert latencies.rows == [("mean_ttft", "5", "5")]
