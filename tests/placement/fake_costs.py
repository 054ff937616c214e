"""Linear costs, for expected values computed by hand."""

from __future__ import annotations

from dataclasses import dataclass

from muxjax.placement.costs.model_shape import ModelShape
from muxjax.placement.planner.batch_curve import BatchCurve, build_batch_curve
from muxjax.placement.planner.load import ModelLoad
from muxjax.scheduling.expected_load import ExpectedLoad

MEMORY = 10_000.0
"""Bytes of a device."""
SHAPE = ModelShape(1, 8, 8, 8, 8, 8, 8)


@dataclass
class FakeCosts:
    """Costs that are inversely proportional to `tp` and compute share.

    Attributes:
      prefill: seconds per prefill token.
      decode: seconds of a decode step, without its sequences.
      per_sequence: seconds of each sequence of a decode step.
      weights, kv: bytes of all weights, and of the KV of a token.
      degrees: possible `tp` sizes.
      kinds: names of the models.
    """

    prefill: float = 0.001
    decode: float = 0.01
    per_sequence: float = 0.0
    weights: float = 100.0
    kv: float = 1.0
    degrees: tuple[int, ...] = (1, 2, 4)
    kinds: tuple[str, ...] = ("m",)

    @property
    def models(self) -> tuple[str, ...]:
        return self.kinds

    def shape(self, model: str) -> ModelShape:
        return SHAPE

    def tp_sizes(self, model: str) -> tuple[int, ...]:
        return self.degrees

    def shares(self, model: str, tp: int) -> tuple[float, ...]:
        return (0.25, 0.5, 0.75, 1.0)

    def prefill_seconds(
        self, model: str, num_tokens: float, length: float, *, tp: int = 1, share: float = 1.0
    ) -> float:
        return self.prefill * num_tokens / tp / share

    def decode_seconds(
        self, model: str, batch: float, context: float, *, tp: int = 1, share: float = 1.0
    ) -> float:
        return (self.decode + self.per_sequence * max(1.0, batch)) / tp / share

    def weight_bytes(self, model: str, *, tp: int = 1) -> float:
        return self.weights / tp

    def kv_bytes_per_token(self, model: str, *, tp: int = 1) -> float:
        return self.kv / tp


def load(rate: float = 1.0, prompt: float = 100.0, output: float = 50.0) -> ModelLoad:
    return ModelLoad("a", "m", ExpectedLoad(rate, prompt, output))


def curve(rate: float = 1.0, size: int = 1, tp: int = 1, **costs: float) -> BatchCurve:
    return build_batch_curve(load(rate), FakeCosts(**costs), size=size, tp=tp)  # type: ignore[arg-type]
