"""Runs the command line on a fake fleet."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from muxjax.cli import main as cli
from muxjax.models.checkpoints.hf_config import from_family
from muxjax.models.nn.config import ModelConfig
from muxjax.pallas_kernels.layout import KVLayout
from tests.serve.fake_fleet import TEMPLATE, fake_tokenizer

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def run_cli(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: object
) -> tuple[int, str, str]:
    """Returns exit status, standard output and standard error of `muxjax ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["muxjax", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as ending:
        status = int(ending.code or 0)
    else:
        status = 0
    out, err = capsys.readouterr()
    return status, out, err


@dataclass
class FakeCompletion:
    text: str
    token_ids: list[int]
    finish_reason: str | None
    num_prompt_tokens: int = 0


@dataclass
class FakeLoadedModel:
    config: ModelConfig
    tokenizer: Any
    layout: KVLayout
    param_bytes: int = 1_234_567
    precision: str = "float32"
    max_model_len: int = 512
    origin: str = "/somewhere/model.gguf"


class CliFleet:
    """A fleet with fixed outputs that records its calls."""

    calls: list[tuple[Any, ...]] = []  # noqa: RUF012 (each test replaces it)
    fault: Exception | None = None

    def __init__(self, names: list[str]) -> None:
        layout = KVLayout(rows=16, num_kv_heads=2, head_dim=16)
        tokenizer = fake_tokenizer(TEMPLATE)
        config = from_family("llama", SHAPE)
        self.models = {name: FakeLoadedModel(config, tokenizer, layout) for name in names}

    @classmethod
    def load(cls, config: Any, **options: Any) -> CliFleet:
        if cls.fault:
            raise cls.fault
        names = [entry.name for entry in config.models]
        cls.calls.append(("load", names, options))
        return cls(names)

    def __enter__(self) -> CliFleet:
        return self

    def __exit__(self, *error: object) -> None:
        self.calls.append(("close",))

    def generate(self, model: str, prompts: list[Any], params: Any) -> list[FakeCompletion]:
        self.calls.append(("generate", model, prompts, params))
        return [FakeCompletion("né", [1, 2], "stop", 7) for _ in prompts]

    def stream(self, model: str, prompt: Any, params: Any) -> Iterator[FakeCompletion]:
        self.calls.append(("stream", model, prompt, params))
        for text in ("Once ", "upon"):
            yield FakeCompletion(text, [1], None)

    def stats(self) -> dict[str, Any]:
        return {"models": {name: {"kv_pages_quota": 40} for name in self.models}}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Returns the exit status of `muxjax ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["muxjax", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    code = exit_info.value.code
    assert code is None or isinstance(code, int)
    return code or 0
