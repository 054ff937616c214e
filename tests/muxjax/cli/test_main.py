"""The command line, with a fake fleet."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from muxjax.errors import CheckpointError
from muxjax.models.digests import sha256_of, write_sums
from tests.muxjax.cli.harness import run

pytestmark = pytest.mark.usefixtures("fake_fleet")

ROOT = Path(__file__).parents[3]


def test_generate_streams_the_text(monkeypatch, capsys, single_model, fake_fleet):
    assert (
        run(monkeypatch, "generate", single_model, "--prompt", "hi", "--seed", "3", "--stop", "x")
        == 0
    )
    assert capsys.readouterr().out == "Once upon\n"
    load, (_, model, prompt, params), close = fake_fleet.calls
    assert load[1] == ["chat"]
    assert (model, prompt) == ("chat", "hi")
    assert (params.max_tokens, params.temperature, params.seed) == (128, 0.0, 3)
    assert params.stop == ("x",)
    assert close == ("close",)


def test_generate_prints_json(monkeypatch, capsys, single_model):
    assert run(monkeypatch, "generate", single_model, "-p", "hi", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "model": "chat",
        "text": "né",
        "token_ids": [1, 2],
        "finish_reason": "stop",
        "num_prompt_tokens": 7,
    }


def test_generate_uses_the_chat_template(monkeypatch, single_model, fake_fleet):
    assert run(monkeypatch, "generate", single_model, "-p", "hi", "--chat") == 0
    assert bytes(fake_fleet.calls[1][2]) == b"<user>hi\n<assistant>"


def test_generate_loads_only_the_selected_model(monkeypatch, two_models, fake_fleet):
    assert run(monkeypatch, "generate", two_models, "-p", "hi", "-m", "base") == 0
    assert fake_fleet.calls[0][1] == ["base"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "choose a model with --model: chat, base"),
        (("--model", "gpt"), "no model 'gpt' in the fleet; there are chat, base"),
        (("--model", "chat", "--temperature", "-1"), "temperature must be a number from 0.0 to"),
        (("--model", "chat", "--max-tokens", "0"), "max_tokens must be a whole number from 1 to"),
    ],
)
def test_argument_errors_are_one_line(
    monkeypatch, capsys, two_models, fake_fleet, arguments, message
):
    assert run(monkeypatch, "generate", two_models, "-p", "hi", *arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"muxjax: {message}")
    assert output.err.count("\n") == 1
    assert not fake_fleet.calls


def test_errors_of_the_fleet_file_are_printed_one_per_line(monkeypatch, capsys, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("models:\n- {name: a, source: org/a, dtype: fp8}\npolcy: adbs\n")
    for command in (("generate", "-p", "x"), ("serve",), ("models",)):
        assert run(monkeypatch, command[0], str(path), *command[1:]) == 2
        dtype = "models[0].dtype: unknown value; got 'fp8', choose auto, float32 or bfloat16"
        assert capsys.readouterr().err.splitlines() == [
            f"muxjax: {path}:2: {dtype}",
            f"muxjax: {path}:3: polcy: unknown key; did you mean policy?",
        ]


def test_load_errors_have_no_traceback(monkeypatch, capsys, single_model, fake_fleet):
    monkeypatch.setattr(fake_fleet, "fault", CheckpointError("model.gguf: truncated"))
    assert run(monkeypatch, "models", single_model) == 2
    assert capsys.readouterr().err == "muxjax: model.gguf: truncated\n"


def test_models_prints_the_loaded_models(monkeypatch, capsys, two_models, fake_fleet):
    assert run(monkeypatch, "models", two_models, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert fake_fleet.calls[0][2] == {"warm_up": False}
    assert [row["name"] for row in rows] == ["chat", "base"]
    attention = 64 * (4 + 2 * 2) * 16 + 64 * 64
    layer = 2 * 64 + attention + 3 * 64 * 128
    assert rows[0] == {
        "name": "chat",
        "family": "llama",
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "num_params": 2 * 100 * 64 + 2 * layer + 64,
        "param_bytes": 1_234_567,
        "dtype": "float32",
        "max_model_len": 512,
        "tokens_per_page": 16 // (2 * 2 * 32 // 128),
        "kv_pages_quota": 40,
        "origin": "/somewhere/model.gguf",
    }


def test_models_prints_a_table(monkeypatch, capsys, two_models):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, "models", two_models) == 0
    heading, chat, base = capsys.readouterr().out.splitlines()
    assert heading.split()[0] == "model"
    assert re.search(r"^chat +llama +2 +4 +2 +16 .*1\.2 MB +float32 +512", chat)
    assert base.endswith("/somewhere/model.gguf")


def test_models_verify_names_damaged_files(monkeypatch, capsys, tmp_path, fake_fleet):
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.bin").write_text("the model")
        write_sums(tmp_path / name, {"model.bin": sha256_of(tmp_path / name / "model.bin")})
    (tmp_path / "bad" / "model.bin").write_text("The model")
    fleet_file = tmp_path / "fleet.yaml"
    entries = [f"{{name: {name}, source: {tmp_path / name}}}" for name in ("good", "bad", "none")]
    fleet_file.write_text(f"models: [{', '.join(entries)}]\n")
    assert run(monkeypatch, "models", str(fleet_file), "--verify") == 1
    printed = capsys.readouterr()
    table = [line.split() for line in printed.out.splitlines()]
    assert table[1:] == [
        ["good", "1", "ok"],
        ["bad", "1", "1", "damaged"],
        ["none", "1", "1", "missing"],
    ]
    damaged = f"{tmp_path / 'bad' / 'model.bin'}: damaged, its digest differs from the stored one"
    missing = f"{tmp_path / 'none'}: missing: no such file or folder"
    assert [line.removeprefix("muxjax: ") for line in printed.err.splitlines()] == [
        "checking 18 B",
        missing,
        f"{damaged}: copy or download the file again",
    ]
    assert run(monkeypatch, "models", str(fleet_file), "--verify", "--json") == 1
    rows = json.loads(capsys.readouterr().out)
    assert [(row["model"], row["state"]) for row in rows] == [
        ("good", "ok"),
        ("bad", "damaged"),
        ("none", "missing"),
    ]
    assert not fake_fleet.calls  # nothing was loaded


def test_fetch_rejects_unknown_names(monkeypatch, capsys):
    assert run(monkeypatch, "fetch", "gpt-4") == 2
    assert re.match(r"muxjax: no demo model 'gpt-4'; there are \w+", capsys.readouterr().err)


def test_fetch_prints_the_folders_of_the_models(monkeypatch, capsys):
    from muxjax.models.download import demo

    monkeypatch.setattr(demo, "fetch_demo", lambda name, verify: Path("/cache") / name)
    assert run(monkeypatch, "fetch", "gemma3-270m") == 0
    assert capsys.readouterr().out == "gemma3-270m: /cache/gemma3-270m\n"


def test_schema_is_json(monkeypatch, capsys):
    assert run(monkeypatch, "schema") == 0
    assert json.loads(capsys.readouterr().out)["title"] == "MuxJAX fleet file"


def test_version(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert re.fullmatch(r"muxjax \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_serve_checks_the_port_before_it_loads(monkeypatch, capsys, single_model, fake_fleet):
    from muxjax.serve.address import bind

    with bind("127.0.0.1", 0) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        assert run(monkeypatch, "serve", single_model, "--port", str(port)) == 2
    assert "Address already in use" in capsys.readouterr().err
    assert not fake_fleet.calls


def test_help_imports_no_heavy_modules():
    heavy = ("rich", "jax", "numpy", "fastapi", "uvicorn", "pydantic", "yaml", "tokenizers", "flax")
    program = (
        "import sys; sys.argv = ['muxjax', '--help']\n"
        "import muxjax.cli.main\n"
        "try: muxjax.cli.main.main()\n"
        f"finally: print('loaded:', [name for name in {heavy} if name in sys.modules])\n"
    )
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "generate" in output
    assert output.endswith("loaded: []\n")


def test_python_dash_m():
    command = [sys.executable, "-m", "muxjax", "generate", "/nowhere.yaml", "-p", "x"]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert completed.returncode == 2
    assert completed.stderr == "muxjax: /nowhere.yaml: No such file or directory\n"
