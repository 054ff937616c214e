"""A mesh over two processes."""

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import jax
import pytest

from muxjax import Fleet, SamplingParams
from muxjax.cluster.host_list import Hosts
from muxjax.cluster.hosts import join
from muxjax.errors import ClusterError
from tests.muxjax.cluster.two_hosts import fleet_file, serving
from tests.muxjax.on_eight_devices import PROMPTS, fleet

SUPPORTED_JAX = jax.__version_info__ >= (0, 12)


def test_jax_before_0_12_is_rejected(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    with pytest.raises(ClusterError, match=r"needs JAX 0\.12 or later"):
        join(Hosts("127.0.0.1:1", 0, 2))


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        (("nowhere", 0, 2), "must be HOST:PORT"),
        (("host:x", 0, 2), "must be HOST:PORT"),
        (("host:1", 2, 2), "is 2 of 2"),
    ],
)
def test_invalid_hosts_are_rejected(hosts, message):
    with pytest.raises(ClusterError, match=message):
        Hosts(*hosts)


REQUESTS = [
    (prompt, settings)
    for prompt in PROMPTS
    for settings in (
        {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True},
        {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True, "seed": 7, "top_p": 0.9},
        {"temperature": 0.5, "max_tokens": 12, "seed": 3, "logit_bias": {65: 5.0}},
    )
]


def complete(url: str, prompt: list[int], settings: dict) -> str:
    body = {"model": "llama3", "prompt": prompt, **settings}
    response = httpx2.post(f"{url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


@pytest.fixture(scope="module")
def expected_texts() -> list[str]:
    """The output of one process with one device."""
    with Fleet.load(fleet(1, {"llama3": 1}), progress=False) as loaded:
        return [
            loaded.generate("llama3", [prompt], SamplingParams(**settings))[0].text
            for prompt, settings in REQUESTS
        ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.mark.slow
@pytest.mark.skipif(not SUPPORTED_JAX, reason="needs JAX 0.12")
def test_two_processes_serve_one_model_and_end_together(
    tmp_path: Path, cache: Path, expected_texts: list[str]
):
    with serving(fleet_file(tmp_path), tmp_path, cache) as (processes, url):
        with ThreadPoolExecutor(len(REQUESTS)) as clients:
            texts = list(clients.map(lambda request: complete(url, *request), REQUESTS))
        assert texts == expected_texts
        processes[0].send_signal(signal.SIGTERM)
        assert [process.wait(60) for process in processes] == [0, 0]


@pytest.mark.slow
@pytest.mark.skipif(not SUPPORTED_JAX, reason="needs JAX 0.12")
@pytest.mark.parametrize(("killed", "message"), [(1, "process 1 has ended"), (0, "process 0")])
def test_a_killed_process_ends_the_other(tmp_path: Path, cache: Path, killed: int, message: str):
    with serving(fleet_file(tmp_path), tmp_path, cache) as (processes, url):
        assert len(complete(url, *REQUESTS[0])) > 0
        processes[killed].kill()
        assert processes[1 - killed].wait(60) not in (0, None)
        assert message in (tmp_path / f"stderr-{1 - killed}").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not SUPPORTED_JAX, reason="needs JAX 0.12")
def test_a_fleet_that_is_not_sharded_over_all_devices_is_rejected(tmp_path: Path, cache: Path):
    path = fleet_file(tmp_path)
    path.write_text(path.read_text().replace("tensor_parallel: 4", "tensor_parallel: 2"))
    with pytest.raises(AssertionError, match="set it to 4"), serving(path, tmp_path, cache):
        pass
