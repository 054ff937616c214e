"""Description of a loaded model, for the engine and the server."""

from __future__ import annotations

from dataclasses import dataclass

from muxjax.models.nn.config import ModelConfig
from muxjax.models.nn.weight_format import Dtype, Quantization
from muxjax.models.tokenizers.tokenizer import Tokenizer
from muxjax.pallas_kernels import KVLayout


@dataclass(frozen=True)
class LoadedModel:
    """A model of a running fleet.

    Attributes:
      name: of the model in requests.
      config: sizes and options.
      tokenizer: None for a model that accepts token ids only.
      max_model_len: maximum number of tokens of prompt and output together.
      origin: file, folder or id that it was loaded from.
      dtype: type of the matrices, if they are not quantized.
      quantization: of the matrices.
      param_count: number of parameters.
      param_bytes: bytes of all parameters on one device.
      layout: geometry of its keys and values in the pool, on one device.
      tensor_parallel: number of devices that one replica is sharded over.
      replicas: replicas on the unit's devices.
    """

    name: str
    config: ModelConfig
    tokenizer: Tokenizer | None
    max_model_len: int
    origin: str
    dtype: Dtype
    quantization: Quantization
    param_count: int
    param_bytes: int
    layout: KVLayout
    tensor_parallel: int = 1
    replicas: int = 1

    @property
    def precision(self) -> str:
        """Type or quantization of the matrices, for display."""
        return self.dtype if self.quantization == "none" else self.quantization

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an output: from the config, then others from the tokenizer."""
        from_tokenizer = () if self.tokenizer is None else self.tokenizer.eos_token_ids
        return tuple(dict.fromkeys((*self.config.eos_token_ids, *from_tokenizer)))
