"""The interface of cost models: durations of steps and memory of models.

A measured table (`profile_table.py`) and a roofline (`roofline.py`) implement it. The planner and
the simulator accept either.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from muxjax.placement.costs.model_shape import ModelShape


@runtime_checkable
class CostModel(Protocol):
    """Costs of models, by name. All methods are pure.

    Common arguments:
      model: name of a model; an unknown name raises `KeyError`.
      tp: number of devices that the model is sharded over.
      share: fraction of the devices' compute, above 0 and at most 1 (MuxServe's share of the
        streaming multiprocessors). In time-sliced execution it is 1.
    """

    def prefill_seconds(
        self, model: str, num_tokens: float, length: float, *, tp: int = 1, share: float = 1.0
    ) -> float:
        """Seconds of one prefill step of `num_tokens` tokens of prompts of `length` tokens each.

        A prompt longer than `num_tokens` counts as one chunk of `num_tokens` tokens.
        """

    def decode_seconds(
        self, model: str, batch: float, context: float, *, tp: int = 1, share: float = 1.0
    ) -> float:
        """Seconds of one decode step of `batch` sequences with contexts of `context` tokens."""

    def weight_bytes(self, model: str, *, tp: int = 1) -> float:
        """Weight bytes on each device."""

    def kv_bytes_per_token(self, model: str, *, tp: int = 1) -> float:
        """KV bytes of one token, all layers, on each device."""


@runtime_checkable
class PlanningCosts(CostModel, Protocol):
    """A cost model that also lists the possible configurations."""

    @property
    def models(self) -> tuple[str, ...]:
        """Names of all models with costs."""

    def shape(self, model: str) -> ModelShape:
        """The sizes of a model."""

    def tp_sizes(self, model: str) -> tuple[int, ...]:
        """Numbers of devices that the model can be sharded over, ascending."""

    def shares(self, model: str, tp: int) -> tuple[float, ...]:
        """Possible compute shares of a model, ascending."""
