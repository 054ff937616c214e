"""Layers of one kind kept as one array a parameter, so that a step compiles them once.

On a TPU the layers run under `lax.scan`: a step of 32 layers compiles in seconds instead of minutes
and is called with a tenth of the arrays, and the compiler reads a layer's weights where they lie in
the stack. On a CPU or GPU it would copy them first, in every layer of every step (design, section
3, and the HLO for sm_90a), so there they stay apart; a GPU's compiler takes 9 s for 30 layers
apart, 6 s stacked. Models whose layers alternate (Gemma 3: five sliding ones, then a full one)
repeat in periods, and a period is what is stacked.
"""

from __future__ import annotations

from dataclasses import dataclass

from muxjax.models.nn.config import ModelConfig
from muxjax.models.nn.params import Shape, param_shapes


@dataclass(frozen=True)
class Stacks:
    """Which layers are stacked: the first `period * repeats`; the rest stay apart.

    The parameters of layers `p, p + period, p + 2 period, ...` are `stacks.{p}.*`, with a leading
    axis of `repeats`.

    Attributes:
      period: layers after which the kinds of layer repeat.
      repeats: how often they do.
    """

    period: int
    repeats: int

    @staticmethod
    def of(config: ModelConfig) -> Stacks:
        """The stacks that leave the fewest layers to compile."""
        kinds, count = config.layer_is_sliding, config.num_layers

        def repeats(period: int) -> bool:
            whole = count // period * period
            return all(kinds[i] == kinds[i % period] for i in range(whole))

        periods = [period for period in range(1, count + 1) if repeats(period)]
        best = min(periods, key=lambda period: period + count % period)
        return Stacks(best, count // best)

    @property
    def layers(self) -> int:
        """Layers that are stacked."""
        return self.period * self.repeats

    def place(self, name: str) -> tuple[str, int | None]:
        """Where a canonical parameter is kept: its name there, and the index in a stack."""
        if not name.startswith("layers."):
            return name, None
        _, layer, short = name.split(".")
        if int(layer) >= self.layers:
            return name, None
        repeat, kind = divmod(int(layer), self.period)
        return f"stacks.{kind}.{short}", repeat

    def shapes(self, config: ModelConfig) -> dict[str, Shape]:
        """Every parameter as it is kept, with its shape."""
        shapes = {}
        for name, shape in param_shapes(config).items():
            kept, index = self.place(name)
            shapes[kept] = shape if index is None else (self.repeats, *shape)
        return shapes
