"""`/docs` shows the OpenAPI document, with files of this server only."""

import re
from collections.abc import Iterator

import httpx2
import pytest

from muxjax.serve.access.keys import Key, Keys
from muxjax.serve.app import create_app
from muxjax.serve.settings import ServerSettings
from tests.serve.fake_fleet import FakeFleet


@pytest.fixture
def http(shared: tuple[FakeFleet, str]) -> Iterator[httpx2.Client]:
    _, url = shared
    with httpx2.Client(base_url=url) as client:
        yield client


def test_all_files_of_the_page_are_served_here(http: httpx2.Client) -> None:
    page = http.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(links) == 4
    for link in links:
        assert link.startswith("/")
        answer = http.get(link)
        assert answer.status_code == 200, link
        assert answer.content, link
    assert "SwaggerUIBundle" in http.get("/docs/start.js").text


def test_no_file_of_the_page_may_load_from_elsewhere(http: httpx2.Client) -> None:
    policy = http.get("/docs").headers["content-security-policy"]
    assert policy.startswith("default-src 'self'")
    assert "http" not in policy


def test_the_document_asks_for_a_key_only_if_the_server_has_keys() -> None:
    keys = Keys([Key(name="alice", sha256="0" * 64)])
    document = create_app(FakeFleet(), ServerSettings(keys=keys)).openapi()
    (scheme,) = document["components"]["securitySchemes"].values()
    assert scheme == {"type": "http", "scheme": "bearer"}
    assert document["security"] == [{"key": []}]
    assert "security" not in create_app(FakeFleet()).openapi()
