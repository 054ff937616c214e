"""The fleet file: defaults, keys, paths, and the messages for invalid files."""

import json
from pathlib import Path

import pytest

from muxjax.config.fleet_file import FleetConfig, fleet_json_schema, load_fleet_config
from muxjax.errors import FleetConfigError

CHAT = {"name": "chat", "source": "demo:smollm2-135m"}


def errors_of(source) -> str:
    with pytest.raises(FleetConfigError) as caught:
        load_fleet_config(source)
    return str(caught.value)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_only_names_and_sources_are_required():
    fleet = load_fleet_config({"models": [CHAT]})
    (model,) = fleet.models
    assert (model.name, model.source) == ("chat", "demo:smollm2-135m")
    assert (model.dtype, model.rate, model.prompt_tokens, model.output_tokens) == (
        "auto",
        1,
        161,
        338,
    )
    assert model.max_model_len is None
    assert model.kv_floor is None
    assert fleet.pool.memory is None
    assert fleet.policy == "adbs"


def test_every_key_is_read(tmp_path):
    path = write(
        tmp_path,
        """
        models:
          - name: chat
            source: org/model
            dtype: bfloat16
            rate: 2
            prompt_tokens: 100
            output_tokens: 50.5
            max_model_len: 1024
            kv_floor: 0.25
          - name: dry
            source: config:llama
            config: {num_hidden_layers: 2}
        pool:
          memory: 512MiB
        policy: round_robin
        engine:
          max_seqs: 4
          prefill_tokens: 128
          decode_tokens: 2
        """,
    )
    fleet = load_fleet_config(path)
    assert [model.name for model in fleet.models] == ["chat", "dry"]
    assert fleet.models[0].source == "org/model"
    assert fleet.models[0].rate == 2.0
    assert fleet.models[1].config == {"num_hidden_layers": 2}
    assert fleet.pool.memory == 512 * 2**20
    assert fleet.policy == "round_robin"
    assert fleet.engine.model_dump() == {
        "max_seqs": 4,
        "prefill_tokens": 128,
        "decode_tokens": 2,
    }
    assert load_fleet_config(fleet) is fleet
    assert load_fleet_config(str(path)) == fleet


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"dtype": "fp8"},
            "models[0].dtype: unknown value; got 'fp8', choose auto, float32 or bfloat16",
        ),
        (
            {"quantization": "int4"},
            "models[0].quantization: unknown value; got 'int4', choose none or int8",
        ),
        ({"dtyp": "auto"}, "models[0].dtyp: unknown key; did you mean dtype?"),
        ({"zzz": 1}, "models[0].zzz: unknown key; known are name, source, config, dtype"),
        (
            {"name": 3},
            "models[0].name: must be text (quote it if it looks like something else); got 3",
        ),
        ({"name": ""}, "models[0].name: must not be empty; got ''"),
        (
            {"name": "a b"},
            "models[0].name: must not contain spaces or control characters; got 'a b'",
        ),
        ({"source": None}, "models[0].source: must be text"),
        ({"rate": True}, "models[0].rate: must be a number; got true"),
        ({"rate": "2"}, "models[0].rate: must be a number; got '2'"),
        ({"rate": 0}, "models[0].rate: must be above 0; got 0"),
        ({"rate": float("nan")}, "models[0].rate: must be a finite number; got nan"),
        ({"rate": float("inf")}, "models[0].rate: must be a finite number; got inf"),
        ({"max_model_len": 1.5}, "models[0].max_model_len: must be a whole number; got 1.5"),
        ({"max_model_len": 1}, "models[0].max_model_len: must be at least 2; got 1"),
        ({"kv_floor": 2}, "models[0].kv_floor: must be at most 1; got 2"),
        ({"kv_floor": -0.1}, "models[0].kv_floor: must be at least 0; got -0.1"),
        ({"source": "config:llama"}, "models[0]: the source config:llama needs a config: mapping"),
        ({"config": {"a": 1}}, "models[0]: config: is only for config:FAMILY sources"),
        ({"source": "config:llama", "config": 3}, "models[0].config: must be a mapping; got 3"),
    ],
)
def test_error_of_a_model_entry_names_the_key(change, message):
    text = errors_of({"models": [{**CHAT, **change}]})
    assert text.startswith(message)
    assert "\n" not in text


@pytest.mark.parametrize(
    ("fleet", "message"),
    [
        ({}, "models: missing"),
        ({"models": []}, "models: must not be empty"),
        ({"models": "chat"}, "models: must be a list; got 'chat'"),
        ({"models": ["chat"]}, "models[0]: must be a mapping; got 'chat'"),
        ({"models": [{"name": "chat"}]}, "models[0].source: missing"),
        ({"models": [CHAT], "polcy": "adbs"}, "polcy: unknown key; did you mean policy?"),
        (
            {"models": [CHAT], "policy": "lifo"},
            "policy: unknown value; got 'lifo', choose slo, adbs, fcfs",
        ),
        ({"models": [CHAT], "pool": 3}, "pool: must be a mapping; got 3"),
        ({"models": [CHAT], "pool": {"memory": "1XB"}}, "pool.memory: must be a size such as 1GB"),
        (
            {"models": [CHAT], "engine": {"max_seq": 1}},
            "engine.max_seq: unknown key; did you mean max",
        ),
        (
            {"models": [CHAT], "engine": {"max_seqs": 0}},
            "engine.max_seqs: must be at least 1; got 0",
        ),
        ({"models": [CHAT, CHAT]}, "models[1].name: 'chat' is already the name of models[0]"),
        (
            {"models": [{**CHAT, "kv_floor": 0.7}, {**CHAT, "name": "b", "kv_floor": 0.6}]},
            "models[*].kv_floor: the floors add up to 1.3 of the pool; the maximum is 1",
        ),
        ({"models": [CHAT], 1: 2}, "[1]: a key must be text; got 1"),
    ],
)
def test_error_of_a_fleet_names_the_key(fleet, message):
    text = errors_of(fleet)
    assert text.startswith(message)
    assert "\n" not in text


def test_floors_that_fill_the_pool_exactly_are_allowed():
    models = [{**CHAT, "name": f"m{i}", "kv_floor": 0.1} for i in range(10)]
    assert len(load_fleet_config({"models": models}).models) == 10


def test_every_error_has_its_line_in_the_file(tmp_path):
    path = write(
        tmp_path,
        "models:\n"
        "  - name: a\n"
        "    source: org/a\n"
        "    dtype: fp8\n"
        "  - name: b\n"
        "pool:\n"
        "  memory: lots\n"
        "engin: {}\n",
    )
    size = "pool.memory: must be a size such as 1GB, 512MiB or a number of bytes"
    assert errors_of(path).splitlines() == [
        f"{path}:4: models[0].dtype: unknown value; got 'fp8', choose auto, float32 or bfloat16",
        f"{path}:5: models[1].source: missing",
        f"{path}:7: {size}; got 'lots'",
        f"{path}:8: engin: unknown key; did you mean engine?",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [", ":1: not valid YAML: "),
        ("policy: adbs\npolicy: fcfs", ":2: not valid YAML: duplicate key 'policy'"),
        ("", ": a fleet file is a mapping with `models:`, not nothing"),
        ("- 1", ": a fleet file is a mapping with `models:`, not a list of 1"),
        ("[" * 5000, ": not valid YAML: nested too deeply"),
        ("models: 2001-99-99", ": not valid YAML: month must be in 1..12"),
        ("models: &a [*a]", ":1: models[0]: must be a mapping"),
        ("a\x00: 1", ": not valid YAML: "),
        ("models: !!python/object/apply:os.getcwd []", ":1: not valid YAML: "),
    ],
)
def test_invalid_yaml_is_rejected(tmp_path, text, message):
    path = write(tmp_path, text)
    assert errors_of(path).startswith(f"{path}{message}")


def test_unreadable_files_are_reported(tmp_path):
    assert errors_of(tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: No such file or directory"
    assert errors_of(tmp_path) == f"{tmp_path}: Is a directory"
    (tmp_path / "latin.yaml").write_bytes(b"models: \xe9")
    assert errors_of(tmp_path / "latin.yaml") == f"{tmp_path}/latin.yaml: not UTF-8 text (byte 8)"


def test_empty_section_has_the_defaults(tmp_path):
    path = write(tmp_path, "models: [{name: a, source: org/a}]\npool:\n# memory: 1GB\nengine:\n")
    assert load_fleet_config(path).pool.memory is None


def test_relative_sources_are_relative_to_the_file(tmp_path, monkeypatch):
    (tmp_path / "folder" / "here").mkdir(parents=True)
    sources = ["here", "org/name", "x/y.gguf", "./z", "../up", "/abs/q", "demo:d"]
    path = tmp_path / "folder" / "fleet.yaml"
    models = [{"name": f"m{i}", "source": source} for i, source in enumerate(sources)]
    path.write_text(json.dumps({"models": models}))
    folder = tmp_path / "folder"
    expected = [
        f"{folder}/here",
        "org/name",
        f"{folder}/x/y.gguf",
        f"{folder}/z",
        f"{tmp_path}/up",
        "/abs/q",
        "demo:d",
    ]
    monkeypatch.chdir("/")
    assert [model.source for model in load_fleet_config(path).models] == expected
    monkeypatch.chdir(folder)
    assert [model.source for model in load_fleet_config("fleet.yaml").models] == expected
    assert [model.source for model in load_fleet_config({"models": models}).models] == expected


def test_schema_describes_every_key():
    schema = fleet_json_schema()
    json.dumps(schema)
    assert set(schema["properties"]) == set(FleetConfig.model_fields)
    entry = schema["$defs"]["ModelEntry"]
    assert entry["additionalProperties"] is False
    assert all("description" in key for key in entry["properties"].values())
    server = schema["$defs"]["ServerConfig"]
    assert all("description" in key for key in server["properties"].values())


def test_server_section_is_validated():
    fleet = load_fleet_config({"models": [CHAT], "server": {"max_queue": 2, "max_body": "1MiB"}})
    assert (fleet.server.max_queue, fleet.server.max_body) == (2, 2**20)
    assert load_fleet_config({"models": [CHAT], "server": None}).server.max_queue == 256
    message = errors_of({"models": [CHAT], "server": {"max_queu": 2, "drain_timeout": 0}})
    assert "server.max_queu: unknown key; did you mean max_queue?" in message
    assert "server.drain_timeout: must be above 0; got 0" in message
