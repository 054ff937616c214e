"""`muxjax plan` and `muxjax import-muxserve`, on model configs without weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from muxjax.cli import main as cli
from muxjax.config.fleet_file import load_fleet_config
from muxjax.placement.planner.plan import load_plan
from tests.placement.data import a100_profile, shared_data

ROOT = Path(__file__).parents[3]
FLEET = """
cluster: 1x2:h100
models:
- name: small
  source: config:llama
  config: {hidden_size: 2048, intermediate_size: 5632, num_hidden_layers: 22}
  rate: 3
- name: large
  source: config:llama
  config: {num_key_value_heads: 8}
  rate: 1
  slo: {ttft: 0.5, tpot: 0.05}
"""
MUXSERVE = """
cluster: {nnodes: 1, ngpus_per_node: 4}
models:
- {name: llm-1, model: /ckpt/huggyllama/llama-7b, rate: 2.5}
- {name: llm-2, model: llama-30b, rate: 1}
avg_prompt_len: 100
avg_output_len: 200
"""


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    sys.argv = ["muxjax", *map(str, arguments)]
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    code = exit_info.value.code
    out, err = capsys.readouterr()
    return (code if isinstance(code, int) else 0), out, err


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text(FLEET)
    return path


@pytest.fixture
def muxserve(tmp_path: Path) -> Path:
    path = tmp_path / "models.yaml"
    path.write_text(MUXSERVE)
    return path


def test_plan_prints_a_table_and_a_picture(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", fleet)
    assert code == 0
    assert "serves 4 of 4 requests/s" in out
    assert "A large" in out or "A small" in out
    assert "░" in out
    assert "in time" in out
    assert max(map(len, out.splitlines())) <= 80
    _, wide, _ = run(capsys, "plan", fleet, "--wide")
    assert "KV quota" in wide


def test_plan_prints_json_and_writes_a_file(
    fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "plan.json"
    code, out, _ = run(capsys, "plan", fleet, "--json", "--seed", 3, "-o", target)
    assert code == 0
    plan = json.loads(out)
    assert plan["seed"] == 3
    assert plan["score"] <= plan["bound"]
    assert plan["simulation"]["slo_attainment"] == plan["slo_attainment"]
    assert set(plan["targets"]) == {"small", "large"}
    assert plan["upstream_score"] is None
    assert plan["slo_attainment"] == 1.0
    assert load_plan(target).to_json() == plan
    names = [model["name"] for unit in plan["units"] for model in unit["models"]]
    assert set(names) == {"small", "large"}


def test_simulating_a_plan_gives_its_promise(
    fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "plan.json"
    run(capsys, "plan", fleet, "-o", target, "--seed", 5)
    _, out, _ = run(capsys, "simulate", target, "--rate-scales", 1, "--json")
    (result,) = json.loads(out)["policies"][0]["runs"]
    promise = load_plan(target).simulation
    assert promise is not None
    assert promise.slo_attainment == result["slo_attainment"]
    assert promise.ttft_p99 == result["ttft_s"]["p99"]


def test_the_cluster_option_overrides_the_fleet_file(
    fleet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run(capsys, "plan", fleet, "--cluster", "2x4:v5e", "--json")
    assert json.loads(out)["cluster"] == [{"nodes": 2, "devices": 4, "device": "v5e"}]


def test_the_demo_fleet_is_planned_for_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", ROOT / "examples" / "demo.yaml", "--json")
    assert code == 0
    plan = json.loads(out)
    assert plan["devices"][0]["name"] == "cpu"
    assert {model["name"] for model in plan["units"][0]["models"]} == {"chat", "base"}


def test_planning_imports_no_jax(fleet: Path) -> None:
    script = (
        "import sys; sys.argv = ['muxjax', 'plan', sys.argv[1]]\n"
        "from muxjax.cli import main as cli\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'jax' not in sys.modules, 'jax'\n"
    )
    completed = subprocess.run(
        [sys.executable, "-c", script, str(fleet)], capture_output=True, text=True, check=False
    )
    assert completed.returncode == 0, completed.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either a fleet file or --muxserve FILE"),
        (("FLEET", "--muxserve", "FLEET"), "give either"),
        (("FLEET", "--cluster", "8"), "NODESxDEVICES:DEVICE"),
        (("FLEET", "--cluster", "1x1:h1000"), "did you mean h100"),
        (("FLEET", "--profile", "none.json"), "none.json: No such file"),
        (("FLEET", "--upstream-compatible"), "needs MuxServe's profile"),
        (("none.yaml",), "none.yaml: No such file"),
    ],
)
def test_errors_are_one_line(
    fleet: Path,
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [str(fleet) if argument == "FLEET" else argument for argument in arguments]
    code, _, err = run(capsys, "plan", *filled)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_plan_reads_the_models_file_of_muxserve(
    muxserve: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "plan", "--muxserve", muxserve, "--json")
    assert code == 0
    plan = json.loads(out)
    assert plan["cluster"] == [{"nodes": 1, "devices": 4, "device": "a100-80gb"}]
    model = plan["units"][0]["models"][0]
    assert (model["prompt_tokens"], model["output_tokens"]) == (100.0, 200.0)


def test_plan_reads_the_profile_of_muxserve(capsys: pytest.CaptureFixture[str]) -> None:
    file = shared_data() / "chatlmsys" / "condense500.yaml"
    arguments = ("plan", "--muxserve", file, "--profile", a100_profile(), "--json")
    arguments += ("--objective", "throughput")
    _, out, _ = run(capsys, *arguments)
    plan = json.loads(out)
    assert plan["execution"] == "concurrent"
    assert plan["upstream_score"] >= 5.2096
    _, out, _ = run(capsys, *arguments, "--upstream-compatible")
    upstream = json.loads(out)
    assert round(upstream["upstream_score"], 4) == 5.2096
    assert plan["score"] > upstream["score"]


def test_import_muxserve_writes_a_valid_fleet_file(
    muxserve: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "import-muxserve", muxserve)
    assert code == 0
    target = tmp_path / "imported.yaml"
    run(capsys, "import-muxserve", muxserve, "-o", target)
    assert target.read_text() == out
    config = load_fleet_config(target)
    assert config.cluster == "1x4:a100-80gb"
    assert [model.profile for model in config.models] == ["llama-7b", "llama-30b"]
    assert config.models[1].config is not None
    assert config.models[1].config["hidden_size"] == 6656
    assert run(capsys, "plan", target)[0] == 0


def edited(change: dict[str, Any]) -> str:
    data = yaml.safe_load(MUXSERVE)
    data["models"][0] |= change
    return yaml.safe_dump(data, sort_keys=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (edited({"rate": -1}), "models[0].rate: must be a finite number above 0; got -1"),
        (edited({"rate": float("nan")}), "models[0].rate: must be a finite number above 0"),
        (edited({"rate": "fast"}), "models[0].rate: must be a number; got 'fast'"),
        (edited({"name": 3}), "models[0].name: must be text"),
        (edited({"name": "llm-2"}), "already the name"),
        ("models: []", "models: must not be empty"),
        ("rates: 3", "a list of models is needed"),
        ("models: [{name: a, model: llama-7b}]", "missing: a needs its requests per second"),
        ("cluster: 4\nmodels: [{name: a, model: llama-7b, rate: 1}]", "cluster: must be a mapping"),
        (
            "cluster: {nnodes: 0, ngpus_per_node: 1}\nmodels: [{name: a, model: x, rate: 1}]",
            "cluster.nnodes: must be a whole number of at least 1; got 0",
        ),
    ],
)
def test_errors_of_the_models_file_of_muxserve(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(text)
    for command in (("import-muxserve", path), ("plan", "--muxserve", path)):
        code, _, err = run(capsys, *command)
        assert code == 2
        assert message in err
        assert str(path) in err
