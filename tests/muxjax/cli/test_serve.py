"""`muxjax serve` and `muxjax key`, up to where models are loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from muxjax.serve.access.keys import load_keys
from tests.muxjax.cli.harness import CliFleet, run

pytestmark = pytest.mark.usefixtures("fake_fleet")


def test_serve_tells_mistakes_before_it_loads(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    one: str,
) -> None:
    none = str(tmp_path / "none")
    for arguments, message in (
        (("--host", "0.0.0.0", "--port", "0"), "no API key is set"),
        (("--keys", none), f"{none}: No such file"),
        (("--tls-cert", none), "--tls-cert and --tls-key must be given together"),
        (("--tls-cert", none, "--tls-key", none), "cannot be used"),
        (("--log-format", "xml"), "'xml' is not one of"),
    ):
        monkeypatch.delenv("MUXJAX_API_KEY", raising=False)
        assert run(monkeypatch, "serve", one, *arguments) == 2
        # The options' messages are wrapped to the terminal's width.
        assert message in " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
        assert not CliFleet.calls


def test_key_makes_an_entry_for_the_key_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "key", "alice") == 0
    printed = capsys.readouterr().out
    (secret,) = re.findall(r"mux-\S+", printed)
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys:\n{printed}")
    found = load_keys(path, ["chat"], {}).find(secret)
    assert found is not None
    assert found.name == "alice"
    assert run(monkeypatch, "key", "no spaces") == 2
    assert "is not a valid key name" in capsys.readouterr().err
