"""Model configs in Hugging Face's format: reading and writing `config.json`.

Keys that a file omits have the defaults of `transformers` for the family. Unsupported options that
would change the output are errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from muxjax.errors import CheckpointError
from muxjax.models.nn.config import FAMILIES, Family, ModelConfig, RopeConfig

ARCHITECTURES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",  # its text part
}
_MODEL_TYPES: dict[Family, str] = {family: family for family in FAMILIES} | {
    "gemma3": "gemma3_text"
}

_COMMON = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 10000.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "sliding_window": None,
}
_QWEN = _COMMON | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
DEFAULTS: dict[Family, dict[str, Any]] = {
    "llama": _COMMON
    | {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mistral": _COMMON
    | {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "gemma3": _COMMON
    | {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10000.0,
    },
}
"""Defaults of `transformers`, per family, for keys that a config omits."""

OTHER_KEYS = ("layer_types", "rope_scaling", "rope_parameters")
"""Keys that are read but have no default."""

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_MUST_BE_OFF = (
    "use_bidirectional_attention",
    "num_experts",
    "num_local_experts",
    "quantization_config",
)


def from_hf(mapping: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """Reads the contents of a `config.json`.

    Args:
      mapping: the file's contents.
      generation: the contents of `generation_config.json`, whose end tokens are added.

    Raises:
      CheckpointError: the architecture is unknown, or an option is not supported.
    """
    names = mapping.get("architectures") or []
    known = [ARCHITECTURES[name] for name in names if name in ARCHITECTURES]
    if not known:
        given = ", ".join(names) or mapping.get("model_type") or "none given"
        raise CheckpointError(f"unknown architecture ({given}); known: {', '.join(ARCHITECTURES)}")
    text = mapping.get("text_config")
    if isinstance(text, Mapping):
        # Token ids and embedding tying in the outer config apply to the text model.
        outer = ("bos_token_id", "eos_token_id", "tie_word_embeddings")
        mapping = {key: mapping[key] for key in outer if key in mapping} | dict(text)
    return from_family(known[0], mapping, generation)


def from_family(
    family: str, mapping: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Builds the config of a family from keys of `config.json`, with the family's defaults.

    Raises:
      CheckpointError: the family is unknown, or an option is not supported.
    """
    if family not in FAMILIES:
        raise CheckpointError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    try:
        return _from_family(family, {**DEFAULTS[family], **mapping}, generation or {})
    except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise CheckpointError(f"a value in the config has the wrong type: {error}") from error


def _from_family(
    family: Family, values: Mapping[str, Any], generation: Mapping[str, Any]
) -> ModelConfig:
    gemma = family == "gemma3"
    for key in _MUST_BE_OFF:
        if values.get(key):
            raise CheckpointError(f"{key} = {values[key]!r} is not supported")
    activation = values["hidden_activation" if gemma else "hidden_act"]
    if activation not in _ACTIVATIONS:
        raise CheckpointError(
            f"activation {activation!r} is not supported; known: {', '.join(_ACTIVATIONS)}"
        )
    heads, width = values["num_attention_heads"], values["hidden_size"]
    head_dim = values["head_dim"] or width // heads
    layers = values["num_hidden_layers"]
    window, sliding = _windows(family, values, layers)
    rope, local_rope = _ropes(family, values)
    bias = bool(values["attention_bias"]) and family in ("llama", "qwen3", "gemma3")
    return ModelConfig(
        family=family,
        vocab_size=values["vocab_size"],
        num_layers=layers,
        hidden_size=width,
        intermediate_size=values["intermediate_size"],
        num_heads=heads,
        num_kv_heads=values["num_key_value_heads"] or heads,
        head_dim=head_dim,
        max_position=values["max_position_embeddings"],
        norm_eps=float(values["rms_norm_eps"]),
        activation=_ACTIVATIONS[activation],  # type: ignore[arg-type]
        rope=rope,
        local_rope=local_rope,
        sliding_window=window,
        layer_is_sliding=sliding,
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        mlp_bias=bool(values["mlp_bias"]) and family == "llama",
        qk_norm=family in ("qwen3", "gemma3"),
        post_norms=gemma,
        embed_scale=math.sqrt(width) if gemma else 1.0,
        attn_scale=(values["query_pre_attn_scalar"] if gemma else head_dim) ** -0.5,
        attn_softcap=values["attn_logit_softcapping"] if gemma else None,
        final_softcap=values["final_logit_softcapping"] if gemma else None,
        tie_embeddings=bool(values["tie_word_embeddings"]),
        bos_token_id=_first(values["bos_token_id"]),
        eos_token_ids=_end_tokens(values["eos_token_id"], generation.get("eos_token_id")),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The contents of `config.json` for a config; `from_hf` is its inverse.

    Raises:
      CheckpointError: Hugging Face's classes cannot express the config (rope divisors, options of
        another family).
    """
    gemma = config.family == "gemma3"
    architecture = next(name for name, family in ARCHITECTURES.items() if family == config.family)
    hf_config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": _MODEL_TYPES[config.family],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "rope_theta": config.rope.theta,
        "sliding_window": config.sliding_window,
        "dtype": "float32",
    }
    activation = next(key for key, name in _ACTIVATIONS.items() if name == config.activation)
    hf_config["hidden_activation" if gemma else "hidden_act"] = activation
    if config.rope.scaling is not None:
        hf_config["rope_scaling"] = _scaling_to_hf(config.rope)
    if config.family in ("llama", "qwen3", "gemma3"):
        hf_config["attention_bias"] = config.o_bias
    if config.family == "llama":
        hf_config["mlp_bias"] = config.mlp_bias
    if config.family in ("qwen2", "qwen3", "gemma3"):
        kinds = (_SLIDING if sliding else _FULL for sliding in config.layer_is_sliding)
        hf_config["layer_types"] = list(kinds)
    if config.family in ("qwen2", "qwen3"):
        hf_config["use_sliding_window"] = any(config.layer_is_sliding)
    if gemma:
        hf_config |= {
            "query_pre_attn_scalar": config.attn_scale**-2,
            "rope_local_base_freq": (config.local_rope or config.rope).theta,
            "attn_logit_softcapping": config.attn_softcap,
            "final_logit_softcapping": config.final_softcap,
        }
        scalar = round(config.attn_scale**-2)
        if math.isclose(scalar**-0.5, config.attn_scale, rel_tol=1e-12):
            hf_config["query_pre_attn_scalar"] = scalar  # transformers requires an integer
    if from_hf(hf_config) != config:
        raise CheckpointError(f"{architecture} cannot express this config: {config}")
    return hf_config


def _scaling_to_hf(rope: RopeConfig) -> dict[str, Any]:
    if rope.scaling == "linear":
        return {"rope_type": "linear", "factor": rope.factor}
    if rope.scaling == "llama3":
        return {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position,
        }
    raise CheckpointError(f"rope scaling {rope.scaling!r} cannot be expressed in config.json")


def _ropes(family: str, values: Mapping[str, Any]) -> tuple[RopeConfig, RopeConfig | None]:
    """Rotary embeddings of full and of sliding layers, from old or newer keys.

    Old keys: `rope_theta`, `rope_scaling`, `rope_local_base_freq`. Newer key: `rope_parameters`, a
    mapping or (Gemma 3) one mapping per kind of layer, which contains `rope_theta`.
    """
    theta, scaling = values["rope_theta"], values.get("rope_scaling")
    newer = values.get("rope_parameters")
    if family != "gemma3":
        if newer is not None and _FULL in newer:
            raise CheckpointError("rope_parameters per kind of layer are supported for gemma3 only")
        return _rope(newer if newer is not None else scaling, theta), None
    local_theta = values["rope_local_base_freq"]
    if newer is None:
        return _rope(scaling, theta), RopeConfig(float(local_theta))
    if _FULL not in newer and _SLIDING not in newer:
        raise CheckpointError(f"gemma3's rope_parameters need {_FULL} and {_SLIDING}")
    return _rope(newer.get(_FULL), theta), _rope(newer.get(_SLIDING), local_theta)


def _rope(parameters: Mapping[str, Any] | None, theta: float) -> RopeConfig:
    parameters = parameters or {}
    theta = float(parameters.get("rope_theta", theta))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("partial_rotary_factor is not supported")
    if kind == "default":
        return RopeConfig(theta)
    try:
        if kind == "linear":
            return RopeConfig(theta, "linear", float(parameters["factor"]))
        if kind == "llama3":
            return RopeConfig(
                theta,
                "llama3",
                factor=float(parameters["factor"]),
                low_freq_factor=float(parameters["low_freq_factor"]),
                high_freq_factor=float(parameters["high_freq_factor"]),
                original_max_position=int(parameters["original_max_position_embeddings"]),
            )
    except KeyError as error:
        raise CheckpointError(f"{kind} rope scaling needs {error.args[0]}") from error
    raise CheckpointError(f"rope scaling {kind!r} is not supported; known: default, linear, llama3")


def _windows(
    family: str, values: Mapping[str, Any], layers: int
) -> tuple[int | None, tuple[bool, ...]]:
    """The window in tokens (or None), and whether it applies, per layer."""
    window = values["sliding_window"]
    if family == "llama" or (family in ("qwen2", "qwen3") and not values["use_sliding_window"]):
        window = None
    kinds = values.get("layer_types") if family not in ("llama", "mistral") else None
    if kinds is not None:
        unknown = set(kinds) - {_SLIDING, _FULL}
        if unknown:
            raise CheckpointError(f"layer types {sorted(unknown)} are not supported")
        sliding = tuple(kind == _SLIDING for kind in kinds)
    elif window is None:
        sliding = (False,) * layers
    elif family == "mistral":
        sliding = (True,) * layers
    elif family == "gemma3":
        pattern = values["sliding_window_pattern"]
        sliding = tuple((layer + 1) % pattern != 0 for layer in range(layers))
    else:
        sliding = tuple(layer >= values["max_window_layers"] for layer in range(layers))
    return window, sliding


def _first(token: int | list[int] | None) -> int | None:
    return token[0] if isinstance(token, list) else token


def _end_tokens(*sources: int | list[int] | None) -> tuple[int, ...]:
    ids: list[int] = []
    for source in sources:
        ids += source if isinstance(source, list) else [] if source is None else [source]
    return tuple(dict.fromkeys(ids))
