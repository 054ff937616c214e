from __future__ import annotations

import json
from pathlib import Path

import pytest

from muxjax.errors import WorkloadError
from muxjax.placement.workload.trace import TraceRequest
from muxjax.placement.workload.trace_files import open_trace, trace_format


def write_file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


MOONCAKE = """\
{"timestamp": 0, "input_length": 6755, "output_length": 500, "hash_ids": [0, 1, 2]}
{"timestamp": 27482, "input_length": 7322, "output_length": 490, "hash_ids": [0, 14]}
"""
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:05.9799600,10,0
"""
BURSTGPT = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,GPT-4,1087,230,1317,Conversation log
45.5,ChatGPT,417,0,417,Conversation log
"""


def test_mooncake_format(tmp_path: Path) -> None:
    requests = list(open_trace(write_file(tmp_path, "t.jsonl", MOONCAKE)))
    assert requests == [
        TraceRequest(0.0, "", 6755, 500, (0, 1, 2)),
        TraceRequest(27.482, "", 7322, 490, (0, 14)),
    ]


def test_azure_format_starts_at_zero_and_counts_failures(tmp_path: Path) -> None:
    trace = open_trace(write_file(tmp_path, "t.csv", AZURE))
    requests = list(trace)
    assert [request.arrival for request in requests] == pytest.approx([0.0, 0.052])
    assert [(r.prompt_tokens, r.output_tokens) for r in requests] == [(4808, 10), (3180, 8)]
    assert trace.left_out == 1


def test_burstgpt_format_skips_and_counts_failures(tmp_path: Path) -> None:
    trace = open_trace(write_file(tmp_path, "t.csv", BURSTGPT))
    assert list(trace) == [
        TraceRequest(0.0, "ChatGPT", 472, 18),
        TraceRequest(40.0, "GPT-4", 1087, 230),
    ]
    assert trace.left_out == 1
    assert list(trace) == list(trace)


def test_muxserve_format(tmp_path: Path) -> None:
    requests = [
        {"model_name": "llm-0", "data": ["text", 12, 34], "slo": None, "idx": 0},
        {"model_name": "llm-1", "data": [[1, 2], 2, 5], "slo": None, "idx": 1},
    ]
    text = json.dumps({"info": {}, "arrivals": [0.5, 1.5], "requests": requests})
    assert list(open_trace(write_file(tmp_path, "t.json", text))) == [
        TraceRequest(0.5, "llm-0", 12, 34),
        TraceRequest(1.5, "llm-1", 2, 5),
    ]


def test_a_sharegpt_file_raises(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="has lengths but no times"):
        trace_format(write_file(tmp_path, "s.json", "[]"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.jsonl", '{"timestamp": 5, "input_length": 1}', "t.jsonl:1: output_length is missing"),
        ("t.jsonl", "nonsense", "t.jsonl:1: not JSON"),
        ("t.jsonl", "[1]", "t.jsonl:1: a line must be a JSON object"),
        (
            "t.jsonl",
            MOONCAKE + '{"timestamp": 1, "input_length": 1, "output_length": 1}',
            "t.jsonl:3: out of order",
        ),
        (
            "t.jsonl",
            '{"timestamp": "x", "input_length": 1, "output_length": 1}',
            "timestamp must be a number, not 'x'",
        ),
        (
            "t.jsonl",
            '{"timestamp": 1, "input_length": 1.5, "output_length": 1}',
            "input_length must be an integer",
        ),
        (
            "t.jsonl",
            '{"timestamp": 1, "input_length": NaN, "output_length": 1}',
            "input_length must be an integer",
        ),
        ("t.jsonl", "", "no requests"),
        ("t.csv", "a,b\n1,2\n", "neither Azure's"),
        ("t.csv", AZURE + "yesterday,1,1\n", "t.csv:5: TIMESTAMP is not a date"),
        ("t.csv", AZURE + "2023-11-17 00:00:00\n", "t.csv:5: too few columns"),
        ("t.csv", BURSTGPT + "50,GPT-4,-3,1,1,x\n", "must be 0 or more"),
        ("t.csv", BURSTGPT + "44,GPT-4,3,1,1,x\n", "t.csv:5: out of order"),
        ("t.json", "{}", "not a MuxServe workload"),
        ("t.json", '{"arrivals": [1], "requests": []}', "1 arrivals and 0 requests"),
        ("t.json", '{"arrivals": [1], "requests": [{}]}', r"requests\[0\]: must have model_name"),
        ("t.txt", "x", "a trace must be .jsonl"),
    ],
)
def test_an_invalid_file_raises_with_its_position(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(WorkloadError, match=message):
        list(open_trace(write_file(tmp_path, name, text)))


def test_a_missing_file_raises(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="No such file"):
        open_trace(tmp_path / "none.csv")
