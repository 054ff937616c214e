"""The live page: files over HTTP, and the page in headless Chromium (marker `browser`)."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from muxjax import Fleet
from muxjax.serve.access.keys import Key, Keys, digest_of
from muxjax.serve.live.page import FOLDER
from muxjax.serve.settings import ServerSettings
from tests.muxjax.tiny_fleets import fleet as tiny_fleet
from tests.serve.conftest import running_server, wait_until
from tests.serve.fake_fleet import FakeFleet


def test_every_file_is_served_and_nothing_comes_from_other_servers(server: str) -> None:
    page = httpx2.get(f"{server}/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in page.headers["content-security-policy"]
    expected = {"/page/icon.svg", "/page/live.css", "/page/live.js"}
    assert expected <= set(re.findall(r'(?:href|src)="([^"#]+)"', page.text))
    for path in FOLDER.iterdir():
        if path.suffix in (".py", ""):
            continue
        name = "" if path.name == "index.html" else f"page/{path.name}"
        answer = httpx2.get(f"{server}/{name}")
        assert answer.status_code == 200
        assert answer.content == path.read_bytes()
        text = path.read_text()
        for imported in re.findall(r'from "([^"]+)"', text):
            assert httpx2.get(f"{server}{imported}").status_code == 200
        addresses = set(re.findall(r"https?://[^\"' )]+", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}
    assert httpx2.get(f"{server}/page/../app.py").status_code == 404
    assert httpx2.get(f"{server}/page/none.js").status_code == 404


# In Chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert chromium, "no chromium on the path; apt-get install chromium, or set CHROMIUM"
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()


@contextlib.contextmanager
def opened(browser: Any, url: str, **context: Any) -> Iterator[Any]:
    """Opens the page in a new window. An error on the console fails the test."""
    window = browser.new_context(**context)
    page = window.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("requestfailed", lambda request: faults.append(request.url))
    page.on(
        "console",
        lambda line: faults.append(line.text) if line.type == "error" else None,
    )
    page.goto(url)
    try:
        yield page
    finally:
        # Closing the window ends the stream, and one test sends an invalid request.
        expected = ("/stats/stream", "completions", "the server responded with a status of 400")
        faults[:] = [fault for fault in faults if not any(part in fault for part in expected)]
        window.close()
    assert not faults


def length(page: Any, side: str) -> int:
    """Returns the number of characters of an output."""
    return len(page.locator(f"#text-{side}").text_content())


@contextlib.contextmanager
def load(url: str, *models: str) -> Iterator[None]:
    """Sends requests to the models until the context ends."""
    stop = threading.Event()

    def ask(model: str) -> None:
        with httpx2.Client(base_url=url, timeout=60) as client:
            while not stop.is_set():
                body = {"model": model, "prompt": "hello", "max_tokens": 60, "ignore_eos": True}
                client.post("/v1/completions", json=body)

    threads = [threading.Thread(target=ask, args=(model,)) for model in models for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


@pytest.mark.browser
def test_the_page_shows_models_under_load(browser: Any) -> None:
    from playwright.sync_api import expect

    with (
        Fleet.load(tiny_fleet()) as fleet,
        running_server(fleet) as url,
        opened(browser, url) as page,
    ):
        expect(page.locator("#status .words")).to_have_text("live", timeout=20_000)
        rows = page.locator("#models tbody tr")
        expect(rows).to_have_count(3)
        expect(rows.nth(0)).to_contain_text("llama")
        expect(rows.nth(0)).to_contain_text("loaded")
        expect(page.locator("#total-rate")).to_have_text("0.0")
        idle_path = page.locator("#rate-chart path").nth(0).get_attribute("d")
        with load(url, "llama", "qwen3"):
            expect(page.locator("#total-rate")).not_to_have_text("0.0", timeout=20_000)
            # A loaded model has a latency, a bar and a chart; an idle model has none.
            expect(rows.nth(0)).to_contain_text(re.compile(r"\d ms"), timeout=20_000)
            bars = "#pool-bar i"
            wait_until(lambda: page.locator(bars).nth(0).bounding_box()["width"] > 1, 20)
            expect(page.locator("#time-now")).not_to_have_text("0 % busy", timeout=20_000)
            assert page.locator("#rate-chart path").nth(0).get_attribute("d") != idle_path
            assert page.locator(bars).nth(2).bounding_box()["width"] == 0
        expect(page.locator("#total-rate")).to_have_text("0.0", timeout=20_000)
        label = page.locator("#pool-chart svg").get_attribute("aria-label")
        assert label.endswith("now 0 %")


@pytest.mark.browser
def test_the_playground_streams_from_two_models(browser: Any) -> None:
    from playwright.sync_api import expect

    fleet = FakeFleet(delay=0.02)
    with running_server(fleet) as url, opened(browser, url) as page:
        expect(page.locator("#model-a option")).to_have_count(2)  # "ids" has no text
        assert page.locator("#model-a").input_value() == "chat"
        assert page.locator("#model-b").input_value() == "plain/base"
        page.fill("#prompt", "abc")
        page.fill("#max-tokens", "100")
        page.focus("#prompt")
        page.keyboard.press("Control+Enter")
        # Both outputs grow while they are generated.
        wait_until(lambda: all(3 < length(page, side) < 90 for side in "ab"), 20)
        expect(page.locator("#stop")).to_be_enabled()
        expect(page.locator("#text-b")).to_have_text("abc" * 33 + "a", timeout=20_000)
        expect(page.locator("#speed-b")).to_contain_text("100 tokens")
        expect(page.locator("#stop")).to_be_disabled(timeout=20_000)
        # The first model is a chat model, so the template is part of its prompt.
        assert page.locator("#text-a").text_content().startswith("<user>abc")
        page.click("#send")
        wait_until(lambda: length(page, "a") > 3, 20)
        page.click("#stop")
        expect(page.locator("#speed-a")).to_have_text("stopped")
        wait_until(lambda: not fleet.active)
        page.fill("#max-tokens", "0")
        page.eval_on_selector("#max-tokens", "(input) => input.removeAttribute('min')")
        page.click("#send")
        expect(page.locator("#text-a")).to_contain_text("max_tokens")
        page.wait_for_timeout(50)


@pytest.mark.browser
def test_keys_themes_and_the_keyboard(browser: Any) -> None:
    from playwright.sync_api import expect

    key = Key(name="a", sha256=digest_of("the only secret").hex(), models=("chat",))
    with (
        running_server(FakeFleet(), ServerSettings(keys=Keys([key]))) as url,
        contextlib.ExitStack() as stack,
    ):
        window = browser.new_context(color_scheme="dark")
        stack.callback(window.close)
        page = window.new_page()
        page.goto(url)
        expect(page.locator("#ask-key")).to_be_visible()
        page.fill("#key-text", "a wrong secret")
        page.keyboard.press("Enter")
        expect(page.locator("#ask-why")).to_contain_text("rejected")
        page.fill("#key-text", "the only secret")
        page.keyboard.press("Enter")
        expect(page.locator("#status .words")).to_have_text("live", timeout=20_000)
        expect(page.locator("#models tbody tr")).to_have_count(1)
        # The theme of the system by default; the T key switches it.
        html = page.locator("html")
        expect(html).to_have_attribute("data-theme", "dark")
        page.locator("body").press("t")
        expect(html).to_have_attribute("data-theme", "light")
        page.reload()
        expect(html).to_have_attribute("data-theme", "light")
        expect(page.locator("#status .words")).to_have_text("live", timeout=20_000)
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        unnamed = page.evaluate(
            "[...document.querySelectorAll('button, input, select, textarea')]"
            ".filter((e) => !(e.labels?.length || e.textContent.trim() || e.title)).length"
        )
        assert unnamed == 0
