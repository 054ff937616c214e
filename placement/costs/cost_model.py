"""How long steps take and how much memory models need: the one interface, whatever the source.

Sources: a measured table (`profile_table.py`) and a roofline (`roofline.py`). Planning, estimating
and simulating ask the same questions of each.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from muxjax.placement.costs.model_shape import ModelShape


@runtime_checkable
class CostModel(Protocol):
    """Costs of the models that it knows, by name. All methods are pure.

    Arguments that all share:
      model: a name that the cost model knows; another is a `KeyError`.
      tp: devices that the model is split over.
      share: part of the devices' compute, above 0 and at most 1 (MuxServe's share of the streaming
        multiprocessors). Where programs run in turn it is 1.
    """

    def prefill_seconds(
        self, model: str, num_tokens: float, length: float, *, tp: int = 1, share: float = 1.0
    ) -> float:
        """Seconds of one prefill step of `num_tokens` tokens in all, of prompts of `length` each.

        A prompt longer than `num_tokens` counts as a chunk of that many.
        """

    def decode_seconds(
        self, model: str, batch: float, context: float, *, tp: int = 1, share: float = 1.0
    ) -> float:
        """Seconds that one token takes for each of `batch` sequences that hold `context` tokens."""

    def weight_bytes(self, model: str, *, tp: int = 1) -> float:
        """Bytes of weights on each device."""

    def kv_bytes_per_token(self, model: str, *, tp: int = 1) -> float:
        """Bytes of keys and values of one token, all layers, on each device."""


@runtime_checkable
class PlanningCosts(CostModel, Protocol):
    """A cost model that also says what there is to choose from."""

    @property
    def models(self) -> tuple[str, ...]:
        """The names that it knows."""

    def shape(self, model: str) -> ModelShape:
        """The sizes of a model."""

    def tp_degrees(self, model: str) -> tuple[int, ...]:
        """Degrees of tensor parallelism that the model can run with, ascending."""

    def shares(self, model: str, tp: int) -> tuple[float, ...]:
        """Shares of compute that a model may be given, ascending."""
