"""The config of a model from its source in a fleet file, without its weights.

For planning: reads a `config.json` or a file's header, and downloads no weights. Imports no JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muxjax.errors import CheckpointError, DownloadError
from muxjax.models.checkpoints.hf_config import from_family, from_hf
from muxjax.models.checkpoints.sources import is_hub_id, read_inline_config
from muxjax.models.disk_errors import write_failure
from muxjax.models.json_files import read_json
from muxjax.models.nn.config import Family, ModelConfig, config_from_dict

DEMO_SHAPES: Mapping[str, tuple[Family, Mapping[str, Any]]] = {
    "smollm2-135m": (
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3-270m": (
        "gemma3",
        {
            "vocab_size": 262144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "max_position_embeddings": 32768,
        },
    ),
    "stories15m": (
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 288,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
        },
    ),
}
"""The demo models' families and sizes, with keys as in `config.json`, for planning offline."""

_SCALE_BITS = 16
_DEFAULT_GROUP = 128


@dataclass(frozen=True)
class ShapeOnly:
    """The config of a model whose weights were not read.

    Attributes:
      config: its sizes and options.
      weight_bits: bits per weight of the layers' matrices, including scales; None if the
        checkpoint's config has no quantization.
    """

    config: ModelConfig
    weight_bits: float | None = None


def read_shape(source: str, config_mapping: Mapping[str, Any] | None = None) -> ShapeOnly:
    """Reads the config of a source, of any kind that `loading.open_checkpoint` supports.

    Downloads only `config.json` for a Hub id, and nothing for a demo model.

    Raises:
      CheckpointError: the source cannot be read, or its architecture is unknown.
      DownloadError: the config of a Hub id cannot be downloaded, or the demo model is unknown.
      FleetConfigError: `config_mapping` has an unknown key, or the source is not `config:FAMILY`.
    """
    inline = read_inline_config(source, config_mapping)
    if inline is not None:
        return ShapeOnly(inline[0])
    if source.startswith("demo:"):
        return _from_demo(source.removeprefix("demo:"))
    path = Path(source).expanduser()
    if not path.exists() and is_hub_id(source):
        path = _fetch_config(source)
    if path.is_file() and path.name == "config.json":
        path = path.parent
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.suffix == ".bin":
        from muxjax.models.checkpoints.llama2c import open_llama2c

        return ShapeOnly(open_llama2c(path).config)
    from muxjax.models.checkpoints.gguf import open_gguf

    return ShapeOnly(open_gguf(path).config)  # dequantized on loading


def _from_folder(path: Path) -> ShapeOnly:
    if (path / "muxjax.json").is_file():
        contents = read_json(path / "muxjax.json")
        try:
            return ShapeOnly(config_from_dict(contents["config"]))
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path / 'muxjax.json'}: not a valid config: {error}") from error
    if (path / "config.json").is_file():
        try:
            return _from_mapping(read_json(path / "config.json"))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
    raise CheckpointError(f"{path}: neither config.json nor muxjax.json in this folder")


def _from_mapping(mapping: Mapping[str, Any]) -> ShapeOnly:
    plain = {key: value for key, value in mapping.items() if key != "quantization_config"}
    quantization = mapping.get("quantization_config")
    return ShapeOnly(from_hf(plain), _bits(quantization) if quantization else None)


def _bits(quantization: object) -> float:
    """Bits per weight, from `quantization_config`.

    Raises:
      CheckpointError: not a mapping, or the method's bits per weight are unknown.
    """
    if not isinstance(quantization, Mapping):
        raise CheckpointError(f"quantization_config must be a mapping, not {quantization!r}")
    method = str(quantization.get("quant_method", ""))
    if method == "fp8":
        return 8.0
    if method == "bitsandbytes":
        return 4.0 if quantization.get("load_in_4bit") else 8.0
    bits = quantization.get("bits", quantization.get("w_bit"))
    if isinstance(bits, int) and 1 <= bits <= 16:
        group = quantization.get("group_size", quantization.get("q_group_size"))
        size = group if isinstance(group, int) and group > 0 else _DEFAULT_GROUP
        # A scale and a zero point for each group.
        return bits + (_SCALE_BITS + bits) / size
    raise CheckpointError(
        f"quantization_config: bits per weight are unknown for the method {method!r}"
    )


def _from_demo(name: str) -> ShapeOnly:
    if name not in DEMO_SHAPES:
        raise DownloadError(f"no demo model {name!r}; there are {', '.join(DEMO_SHAPES)}")
    return ShapeOnly(from_family(*DEMO_SHAPES[name]))


def _fetch_config(source: str) -> Path:
    import huggingface_hub
    import huggingface_hub.errors

    repository, _, revision = source.partition("@")
    try:
        path = huggingface_hub.hf_hub_download(repository, "config.json", revision=revision or None)
    except (huggingface_hub.errors.HfHubHTTPError, OSError, ValueError) as error:
        raise DownloadError(
            f"{source}: neither a local path nor a config.json on the Hub: {write_failure(error)}"
        ) from error
    return Path(path)
