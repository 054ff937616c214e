"""`muxjax bench http`, against MuxJAX's server with a fake fleet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.muxjax.cli.harness import run_cli
from tests.serve.conftest import running_server
from tests.serve.fake_fleet import FakeFleet

SMALL = ["--num-prompts", "6", "--random-input-len", "12", "--random-output-len", "5"]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_server(FakeFleet(delay=0.001)) as url:
        yield url


class HttpBenchCli:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        return run_cli(self._monkeypatch, self._capsys, "bench", "http", *arguments)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> HttpBenchCli:
    return HttpBenchCli(monkeypatch, capsys)


def test_several_models_in_one_run(run: HttpBenchCli, server: str, tmp_path: Path) -> None:
    files = ["--save-result", "--save-detailed", "--result-dir", tmp_path, "--label", "ours"]
    status, out, err = run(
        server, "--model", "chat", "--model", "plain/base", *SMALL, "--alpha", 1, "--json",
        "--goodput", "ttft:60000", "e2el:60000", "--metric-percentiles", "50,99", *files,
        "--metadata", "machine=loopback", "--max-concurrency", 2,
    )  # fmt: skip
    assert status == 0, err
    report = json.loads(out)
    assert (report["completed"], report["failed"]) == (6, 0)
    assert report["total_input_tokens"] == 72
    assert report["total_output_tokens"] == 30
    assert report["request_goodput"] == report["request_throughput"]
    assert report["slo_attainment"] == 1
    assert report["machine"] == "loopback"
    assert {"median_itl_ms", "p50_ttft_ms", "p99_e2el_ms", "duration"} <= report.keys()
    assert set(report["models"]) == {"chat", "plain/base"}
    assert sum(model["completed"] for model in report["models"].values()) == 6
    assert 0 < report["jain_index"] <= 1
    assert report["max_concurrent_requests"] <= 2
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("ours-infqps-concurrency2-chat+plain_base-")
    saved = json.loads(file.read_text())
    assert len(saved["ttfts"]) == len(saved["request_models"]) == 6
    assert saved["output_lens"] == [5] * 6


def test_all_models_of_the_server_by_default(run: HttpBenchCli, server: str) -> None:
    status, out, err = run(server + "/v1", *SMALL, "--request-rate", 200, "--num-warmups", 2)
    assert status == 0, err
    for name in ("chat", "plain/base", "ids", "latencies in ms", "Jain index"):
        assert name in out


def test_chat_requests(run: HttpBenchCli, server: str) -> None:
    status, out, err = run(server, "--backend", "openai-chat", "--model", "chat", *SMALL, "--json")
    assert status == 0, err
    report = json.loads(out)
    assert report["completed"] == 6
    assert report["prompt_tokens_by"]["chat"] in ("words", "server")


def test_results_are_appended(run: HttpBenchCli, server: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "runs.jsonl"
    for _ in range(2):
        file = ["--result-dir", path.parent, "--result-filename", path.name]
        status, _, err = run(server, "--model", "chat", *SMALL, "--append-result", *file)
        assert status == 0, err
    assert [json.loads(line)["completed"] for line in path.read_text().splitlines()] == [6, 6]


def test_failed_requests_are_reported(run: HttpBenchCli, server: str) -> None:
    long = ["--num-prompts", "3", "--random-input-len", "999", "--random-output-len", "1"]
    status, out, err = run(server, "--model", "chat", *long)
    assert status == 2
    assert "the prompt has 999 tokens" in err
    assert "all requests failed" in err
    assert "failed" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "1"], "is the server running"),
        (["http://127.0.0.1:1", "--port", "1"], "give the server once"),
        (["nonsense"], "http://HOST:PORT"),
        (["--backend", "tgi"], "no backend 'tgi'"),
        (["--lora-modules", "a"], "--lora-modules of vLLM's benchmark is not supported"),
        (["--save-detailed"], "need --save-result"),
        (["--goodput", "speed:1"], "not 'speed'"),
        (["--percentile-metrics", "ttft,speed"], "no metric 'speed'"),
        (["--metric-percentiles", "high"], "--metric-percentiles takes comma-separated numbers"),
        (["--extra-body", "[]"], "a JSON object"),
        (["--extra-body", "{"], "not JSON"),
        (["--custom-output-len", "3"], "is for --dataset-name custom"),
        (["--max-concurrency", "0"], "at least 1"),
        (["--num-warmups", "-1"], "--num-warmups"),
        (["--ramp-up-strategy", "square"], "linear or exponential"),
        (["--tokenizer", "org/name"], "tokenizers are not downloaded"),
        (["--model", "a", "--model", "a"], "given twice"),
        (["--port", "1", "--ready-check-timeout-sec", "0.1"], "did not answer within 0.1 s"),
    ],
)
def test_invalid_options_are_rejected(
    run: HttpBenchCli, arguments: list[str], message: str
) -> None:
    status, _, err = run(*arguments)
    assert status == 2
    assert message in " ".join(err.split())
