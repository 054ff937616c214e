"""The argument checks of `muxjax serve`, and `muxjax key`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from muxjax.serve.access.keys import load_keys
from tests.muxjax.cli.harness import CliFleet, run

pytestmark = pytest.mark.usefixtures("fake_fleet")


def test_serve_checks_its_arguments_before_it_loads(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    single_model: str,
) -> None:
    missing = str(tmp_path / "missing")
    for arguments, message in (
        (("--host", "0.0.0.0", "--port", "0"), "no API key is set"),
        (("--keys", missing), f"{missing}: No such file"),
        (("--tls-cert", missing), "--tls-cert and --tls-key must be given together"),
        (("--tls-cert", missing, "--tls-key", missing), "cannot be used"),
        (("--log-format", "xml"), "'xml' is not one of"),
    ):
        monkeypatch.delenv("MUXJAX_API_KEY", raising=False)
        assert run(monkeypatch, "serve", single_model, *arguments) == 2
        # Messages about options are wrapped to the width of the terminal.
        assert message in " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
        assert not CliFleet.calls


def test_key_prints_an_entry_for_the_key_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "key", "alice") == 0
    printed = capsys.readouterr().out
    (secret,) = re.findall(r"mux-\S+", printed)
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys:\n{printed}")
    api_key = load_keys(path, ["chat"], {}).find(secret)
    assert api_key is not None
    assert api_key.name == "alice"
    assert run(monkeypatch, "key", "no spaces") == 2
    assert "is not a valid key name" in capsys.readouterr().err
