"""llama2.c's files: the model (the "legacy" export, version 0) and its `tokenizer.bin`.

Both are consecutive C structs, little endian. The model file has seven 32-bit integers and then
float32 tensors without names, with queries and keys in interleaved order. The tokenizer file has
Llama 2's pieces as text with their SentencePiece scores.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np

from muxjax.errors import CheckpointError
from muxjax.models.checkpoints.checkpoint import Checkpoint
from muxjax.models.checkpoints.source_files import SourceFiles
from muxjax.models.nn.config import ModelConfig
from muxjax.models.nn.params import Shape, map_names
from muxjax.models.tokenizers import bpe
from muxjax.models.tokenizers.hf_tokenizer import tokenizer_files
from muxjax.models.tokenizers.tokenizer import Tokenizer

NAMES = {
    "embed": "token_embedding",
    "final_norm": "rms_final",
    "head": "wcls",
    "attn_norm": "rms_att",
    "qkv": "wq wk wv",
    "o": "wo",
    "mlp_norm": "rms_ffn",
    "gate_up": "w1 w3",
    "down": "w2",
}
_UNKNOWN, _BOS, _EOS = 0, 1, 2
_CONTROL_NAMES = ("<unk>", "<s>", "</s>")
_NEW_FORMAT = 0x616B3432


def open_llama2c(path: Path) -> Checkpoint:
    """Opens a model file; its tokenizer is `tokenizer.bin` in the same folder, if it exists.

    Raises:
      CheckpointError: the file has another format, or its length does not match its header.
    """
    files = SourceFiles.record([path])
    file = _Llama2cFile(path)
    tokenizer = path.with_name("tokenizer.bin")
    vocab_size = file.config.vocab_size

    def build_tokenizer() -> Tokenizer | None:
        return read_tokenizer(tokenizer, vocab_size) if tokenizer.is_file() else None

    return Checkpoint(
        config=file.config,
        origin=str(path),
        source=file,
        mapped=map_names(file.config, NAMES, "{}.", interleaved=True),
        build_tokenizer=build_tokenizer,
        files=files,
    )


class _Llama2cFile:
    """The tensors of a model file, named as in llama2.c, with the layer's index as prefix."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                header = file.read(28)
            size = path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        if len(header) < 28:
            raise CheckpointError(f"{path}: truncated: only {len(header)} bytes")
        dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("<7i", header)
        if dim == _NEW_FORMAT:
            raise CheckpointError(f"{path}: llama2.c's versioned formats are not supported")
        if min(dim, hidden, layers, heads, kv_heads, abs(vocab), length) < 1 or dim % heads:
            raise CheckpointError(f"{path}: not a llama2.c model")
        self.config = ModelConfig(
            family="llama",
            vocab_size=abs(vocab),
            num_layers=layers,
            hidden_size=dim,
            intermediate_size=hidden,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim // heads,
            max_position=length,
            norm_eps=1e-5,
            tie_embeddings=vocab > 0,
            bos_token_id=_BOS,
            eos_token_ids=(_EOS, _BOS),  # <s> starts the next story
        )
        self._locations = self._layout(length)
        expected = 28 + 4 * max(
            start + math.prod(shape) for start, shape in self._locations.values()
        )
        if size != expected:
            problem = "truncated" if size < expected else "not a llama2.c model"
            raise CheckpointError(f"{path}: {problem}: {size} bytes, its header implies {expected}")
        self._floats = np.memmap(path, "<f4", "r", offset=28)

    def _layout(self, length: int) -> dict[str, tuple[int, Shape]]:
        """Offset in floats and shape of every tensor. A tensor's layers are consecutive."""
        c = self.config
        D, F = c.hidden_size, c.intermediate_size
        kinds: list[tuple[str, int, Shape]] = [
            ("token_embedding", 0, (c.vocab_size, D)),
            ("rms_att", c.num_layers, (D,)),
            ("wq", c.num_layers, (c.q_width, D)),
            ("wk", c.num_layers, (c.kv_width, D)),
            ("wv", c.num_layers, (c.kv_width, D)),
            ("wo", c.num_layers, (D, c.q_width)),
            ("rms_ffn", c.num_layers, (D,)),
            ("w1", c.num_layers, (F, D)),
            ("w2", c.num_layers, (D, F)),
            ("w3", c.num_layers, (F, D)),
            ("rms_final", 0, (D,)),
            ("", 0, (2, length, c.head_dim // 2)),  # tables of cosines and sines
        ]
        if not c.tie_embeddings:
            kinds.append(("wcls", 0, (c.vocab_size, D)))
        locations: dict[str, tuple[int, Shape]] = {}
        start = 0
        for name, count, shape in kinds:
            names = [f"{index}.{name}" for index in range(count)] if count else [name]
            for tensor in names:
                locations[tensor] = (start, shape)
                start += math.prod(shape)
        return locations

    def shapes(self) -> dict[str, Shape]:
        return {name: shape for name, (_, shape) in self._locations.items() if name}

    def read(self, name: str) -> np.ndarray:
        start, shape = self._locations[name]
        return np.array(self._floats[start : start + math.prod(shape)], np.float32).reshape(shape)


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Reads a `tokenizer.bin` with `vocab_size` pieces.

    Raises:
      CheckpointError: the file is truncated.
    """
    data = path.read_bytes()
    pieces: list[bytes] = []
    scores: list[float] = []
    position = 4  # after the length of the longest piece
    try:
        for _ in range(vocab_size):
            score, size = struct.unpack_from("<fi", data, position)
            position += 8
            if size < 0 or position + size > len(data):
                raise struct.error
            pieces.append(data[position : position + size])
            scores.append(score)
            position += size
    except struct.error as error:
        raise CheckpointError(f"{path}: truncated: {len(pieces)} of {vocab_size} pieces") from error
    names = [*_CONTROL_NAMES, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [piece.decode("utf-8", "replace").replace(" ", bpe.SPACE) for piece in pieces[259:]]
    control = (_UNKNOWN, _BOS, _EOS)
    backend = bpe.sentencepiece_bpe(
        names, scores, control=control, user_defined=(), unknown_id=_UNKNOWN, add_space=True
    )
    bpe.add_bos_and_eos(backend, dict(enumerate(_CONTROL_NAMES)), _BOS, None)
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(
        encode_text=lambda text, special: backend.encode(text, add_special_tokens=special).ids,
        pieces=bpe.sentencepiece_bytes(names, control),
        special_ids=frozenset(control),
        bos_token_id=_BOS,
        eos_token_ids=(_EOS, _BOS),
        special_tokens=special,
        adds_space_prefix=True,
        to_files=lambda: tokenizer_files(backend, special, None),
    )
