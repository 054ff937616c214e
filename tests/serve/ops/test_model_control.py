"""Admin endpoints: changes of models, and reloads of the fleet file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from muxjax.engine.health import ModelHealth
from muxjax.errors import ModelUnavailable, WrongState
from muxjax.serve.access.keys import Key, Keys, digest_of
from muxjax.serve.settings import ServerSettings
from tests.serve.conftest import running_server
from tests.serve.fake_fleet import FakeFleet

FLEET = FakeFleet()
FILE = "models: [{name: chat, source: 'demo:smollm2-135m', slo: {ttft: 0.5}}]"
KEYS = Keys(
    [
        Key(name="root", sha256=digest_of("root-secret").hex(), rights=("admin", "metrics")),
        Key(
            name="some",
            sha256=digest_of("some-secret").hex(),
            rights=("admin",),
            models=("chat",),
        ),
        Key(name="user", sha256=digest_of("user-secret").hex()),
    ]
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fleet") / "fleet.yaml"


@pytest.fixture(scope="module")
def http(file: Path) -> Iterator[httpx2.Client]:
    settings = ServerSettings(keys=KEYS, fleet_file=file)
    with (
        running_server(FLEET, settings) as url,
        httpx2.Client(base_url=url, timeout=20, headers=key("root")) as client,
    ):
        yield client


@pytest.fixture(autouse=True)
def reset(file: Path) -> None:
    FLEET.__init__()  # type: ignore[misc]
    file.write_text(FILE)


def key(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {name}-secret"}


def error(answer: httpx2.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def test_sleep_and_wake_change_the_model_status(http: httpx2.Client) -> None:
    for action, status in (("sleep", "sleeping"), ("wake", "loaded"), ("load", "loaded")):
        done = http.post(f"/models/{action}", json={"model": "chat"})
        assert done.status_code == 200
        assert (done.json()["model"], done.json()["status"]) == ("chat", status)
        assert http.get("/v1/models/chat").json()["status"] == status
        assert http.get("/health/chat").json()["status"] == status
    text = http.get("/metrics").text
    assert 'muxjax:model_state{model_name="chat",state="loaded"} 1.0' in text
    assert 'muxjax:model_state{model_name="chat",state="sleeping"} 0.0' in text
    assert FLEET.changed == [("sleep", "chat"), ("wake", "chat"), ("load", "chat")]


def test_an_unloaded_model_is_unknown(http: httpx2.Client) -> None:
    assert http.post("/models/unload", json={"model": "ids"}).json()["status"] == "unloaded"
    assert error(http.get("/v1/models/ids"), 404)["code"] == "model_not_found"
    assert error(http.post("/models/wake", json={"model": "ids"}), 404)["param"] == "model"


def test_invalid_changes_are_refused(http: httpx2.Client) -> None:
    for action in ("unload", "sleep", "wake", "load"):
        path = f"/models/{action}"
        assert error(http.post(path, json={"model": "none"}), 404)["code"] == "model_not_found"
        assert error(http.post(path, json={}), 400)["param"] == "model"
        assert error(http.post(path, json={"model": "chat", "x": 1}), 400)["param"] == "x"
        error(http.post(path, json={"model": "chat"}, headers=key("user")), 403)
        error(http.post(path, json={"model": "chat"}, headers={"authorization": ""}), 401)
    entry = {"model": "new", "entry": {"source": "x"}}
    assert error(http.post("/models/load", json=entry), 400)["code"] == "not_loadable"
    entry["entry"]["name"] = "other"
    assert error(http.post("/models/load", json=entry), 400)["param"] == "entry"
    FLEET.fault = WrongState("chat is pinned: it never sleeps")
    refused = error(http.post("/models/sleep", json={"model": "chat"}), 409)
    assert (refused["code"], refused["type"]) == ("wrong_state", "invalid_request_error")
    FLEET.fault = ModelUnavailable("chat cannot be loaded: out of memory")
    assert (
        "out of memory" in error(http.post("/models/wake", json={"model": "chat"}), 503)["message"]
    )


def test_a_key_changes_only_permitted_models(http: httpx2.Client) -> None:
    assert http.post("/models/sleep", json={"model": "chat"}, headers=key("some")).is_success
    for action in ("sleep", "load"):
        hidden, none = (
            error(http.post(f"/models/{action}", json={"model": model}, headers=key("some")), 404)
            for model in ("ids", "none")
        )
        assert hidden["message"].replace("ids", "none") == none["message"]


def test_a_failed_model_reports_its_error(http: httpx2.Client) -> None:
    FLEET.states["chat"] = ModelHealth("failed", "the file is gone", False)
    card = http.get("/v1/models/chat").json()
    assert (card["status"], card["error"]) == ("failed", "the file is gone")
    health = http.get("/health/chat")
    assert (health.status_code, health.json()["reason"]) == (
        503,
        "chat has failed: the file is gone",
    )
    assert http.get("/health/ready").status_code == 200


def test_reload_applies_the_fleet_file(http: httpx2.Client, file: Path) -> None:
    assert 'muxjax:slo_hits_total{model_name="chat"' not in http.get("/metrics").text
    assert http.post("/fleet/reload").json()["changed"] == ["chat"]
    assert FLEET.changed == [("reload", "chat")]
    assert 'muxjax:slo_hits_total{model_name="chat",target="ttft"} 0.0' in http.get("/metrics").text
    file.write_text("models: [{name: chat}]")
    refused = error(http.post("/fleet/reload"), 400)
    assert refused["code"] == "fleet_file"
    assert "models[0].source: missing" in refused["message"]
    error(http.post("/fleet/reload", headers=key("user")), 403)
    assert len(FLEET.changed) == 1


def test_reload_without_a_fleet_file_is_refused() -> None:
    with running_server(FLEET) as url:
        assert error(httpx2.post(f"{url}/fleet/reload"), 409)["code"] == "wrong_state"
