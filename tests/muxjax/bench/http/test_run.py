"""Settings of a benchmark over HTTP, and its result file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from muxjax.bench.http.client import RequestInput, RequestResult, Server
from muxjax.bench.http.load import LoadResult
from muxjax.bench.http.run import HttpBench, parse_backend, result_path, write_result
from muxjax.errors import BenchError

SERVER = Server("http://127.0.0.1:1", "openai")
RESULT = {
    "label": "openai",
    "model_id": "org/chat,base",
    "max_concurrency": None,
    "request_rate": 2.0,
    "date": "20261130-120000",
}


def test_backends_have_the_names_of_vllm() -> None:
    assert parse_backend("vllm") == parse_backend("openai") == "openai"
    assert parse_backend("openai-chat") == "openai-chat"
    with pytest.raises(BenchError, match="no backend 'tgi'; there are openai, vllm, openai-chat"):
        parse_backend("tgi")


def test_limits_must_be_positive() -> None:
    with pytest.raises(BenchError):
        HttpBench(SERVER, max_concurrency=0)


def test_an_unreachable_server_is_an_error() -> None:
    with pytest.raises(BenchError, match=r"127\.0\.0\.1:1/v1/models did not answer within 0\.1 s"):
        HttpBench(SERVER, ["chat"], wait_seconds=0.1).run(progress=False)


def test_the_default_file_name_is_that_of_vllm(tmp_path: Path) -> None:
    path = result_path(RESULT, tmp_path, None)
    assert path == tmp_path / "openai-2.0qps-org_chat+base-20261130-120000.json"
    limited = result_path({**RESULT, "max_concurrency": 8}, None, None)
    assert limited.name == "openai-2.0qps-concurrency8-org_chat+base-20261130-120000.json"
    assert result_path(RESULT, None, "mine.json") == Path("mine.json")


def test_results_replace_the_file_or_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write_result(RESULT, None, path, append=False)
    write_result({**RESULT, "label": "second"}, None, path, append=True)
    labels = [json.loads(line)["label"] for line in path.read_text("utf-8").splitlines()]
    assert labels == ["openai", "second"]
    request = RequestInput("chat", "x", 10, 2)
    measured = RequestResult(
        request, 0.0, 1.0, 2.0, itl=[1.0], prompt_tokens=10, output_tokens=2, counted=True
    )
    write_result(RESULT, LoadResult([measured], 2.0), path, append=False)
    (line,) = path.read_text("utf-8").splitlines()
    assert json.loads(line)["errors"] == [""]
    with pytest.raises(BenchError, match="cannot be written"):
        write_result(RESULT, None, path / "below-a-file.json", append=False)
