"""Stacked layers: one array per parameter for all layers of a kind.

On a TPU the layers run under `lax.scan`. A step compiles one layer of each kind, takes fewer
arguments, and reads a layer's weights in place. On a CPU or GPU, XLA would copy a layer's weights
out of the stack in every step, so layers are separate there. Models with alternating layers (Gemma
3: five sliding layers, then a full one) repeat in periods; layers at the same index of a period are
stacked.
"""

from __future__ import annotations

from dataclasses import dataclass

from muxjax.models.nn.config import ModelConfig
from muxjax.models.nn.params import Shape, param_shapes


@dataclass(frozen=True)
class Stacks:
    """The stacking of a model: the first `period * repeats` layers are stacked, others separate.

    The parameters of layers `p, p + period, p + 2 period, ...` are `stacks.{p}.*`, with a leading
    axis of `repeats`.

    Attributes:
      period: number of layers after which the kinds of layers repeat.
      repeats: number of repetitions.
    """

    period: int
    repeats: int

    @staticmethod
    def from_config(config: ModelConfig) -> Stacks:
        """The stacks that leave the fewest layers to compile."""
        kinds, count = config.layer_is_sliding, config.num_layers

        def is_periodic(period: int) -> bool:
            stacked = count // period * period
            return all(kinds[i] == kinds[i % period] for i in range(stacked))

        periods = [period for period in range(1, count + 1) if is_periodic(period)]
        best = min(periods, key=lambda period: period + count % period)
        return Stacks(best, count // best)

    @property
    def layers(self) -> int:
        """Number of stacked layers."""
        return self.period * self.repeats

    def locate(self, name: str) -> tuple[str, int | None]:
        """The stored name of a canonical parameter, and its index in a stack or None."""
        if not name.startswith("layers."):
            return name, None
        _, layer, short = name.split(".")
        if int(layer) >= self.layers:
            return name, None
        repeat, kind = divmod(int(layer), self.period)
        return f"stacks.{kind}.{short}", repeat

    def shapes(self, config: ModelConfig) -> dict[str, Shape]:
        """Every stored parameter with its shape."""
        shapes = {}
        for name, shape in param_shapes(config).items():
            stored, index = self.locate(name)
            shapes[stored] = shape if index is None else (self.repeats, *shape)
        return shapes
