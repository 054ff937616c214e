"""llama2.c's model and tokenizer files."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from muxjax.errors import CheckpointError
from muxjax.models.checkpoints.checkpoint import Checkpoint
from muxjax.models.checkpoints.llama2c import open_llama2c, read_tokenizer
from tests import golden
from tests.models.llama2c_files import write_model


@pytest.mark.parametrize("name", ["llama", "smollm2"])
def test_weights_and_config_round_trip(name: str, tmp_path: Path) -> None:
    case = golden.tiny(name)
    write_model(tmp_path / "model.bin", name)
    checkpoint = open_llama2c(tmp_path / "model.bin")
    weights = dict(checkpoint.weights())
    assert list(weights) == list(case.params)
    for canonical, array in weights.items():
        np.testing.assert_array_equal(array, case.params[canonical])
    config = checkpoint.config
    assert config.max_position == 32
    assert config.norm_eps == 1e-5
    assert config.tie_embeddings == case.config.tie_embeddings
    assert (config.num_heads, config.num_kv_heads) == (
        case.config.num_heads,
        case.config.num_kv_heads,
    )
    assert checkpoint.tokenizer is None


def test_invalid_files_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write_model(path, "llama")
    data = path.read_bytes()
    for broken, message in (
        (data[:-1], "truncated: "),
        (data[:20], "truncated: only 20 bytes"),
        (data + b"\0", "not a llama2.c model"),
        (b"GGUF" + data[4:], "model"),
        (b"\0" * 100, "not a llama2.c model"),
        (struct.pack("<I", 0x616B3432) + data[4:], "versioned formats are not supported"),
    ):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=message):
            open_llama2c(path)


def test_stories15m(demo_checkpoint: Callable[[str], Checkpoint]) -> None:
    checkpoint = demo_checkpoint("stories15m")
    config = checkpoint.config
    assert (config.vocab_size, config.num_layers, config.hidden_size) == (32000, 6, 288)
    assert (config.num_heads, config.head_dim, config.max_position) == (6, 48, 256)
    assert config.tie_embeddings
    tokenizer = checkpoint.tokenizer
    assert tokenizer is not None
    # Ids of Llama 2's original tokenizer.
    assert tokenizer.encode("Once upon a time") == [1, 9038, 2501, 263, 931]
    assert tokenizer.encode("Hello, world!") == [1, 15043, 29892, 3186, 29991]
    assert tokenizer.encode("") == [1]
    for text in ("Once upon a time, Lily said: “café” 🙂\n\n  two", "漢字 Привет", " a", "\ta\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([2501, 263]) == " upon a"
    assert tokenizer.token_text(13) == "\n"


def test_prompt_ids_equal_the_golden_files(
    demo_checkpoint: Callable[[str], Checkpoint],
) -> None:
    for name in golden.DEMO_NAMES:
        tokenizer = demo_checkpoint(name).tokenizer
        assert tokenizer is not None
        for case in golden.greedy(name):
            assert tokenizer.encode(case.text) == case.prompt_ids


def test_truncated_tokenizer_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.bin"
    pieces = b"".join(struct.pack("<fi", 0.0, 1) + b"a" for _ in range(300))
    path.write_bytes(struct.pack("<i", 1) + pieces)
    assert read_tokenizer(path, 300).vocab_size == 300
    path.write_bytes(struct.pack("<i", 1) + pieces[:-1])
    with pytest.raises(CheckpointError, match="truncated: 299 of 300 pieces"):
        read_tokenizer(path, 300)
