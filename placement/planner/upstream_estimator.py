"""MuxServe's own estimator, as in its released optimizer ("upstream"), for comparisons.

A reimplementation of the formulas of hao-ai-lab/MuxServe, `muxserve/muxsched/placement.py` (2024).
Properties that the paper does not mention, or describes differently:
- A batch between two profiled batches costs as much as the larger one.
- A decode step takes a mean of running means over the profiled lengths, plus an overhead
  proportional to the batch. Prefill uses the first profiled length above the mean prompt.
- The name of a model gives its size, and the hidden size gives the KV bytes of a token. Every
  device has 80 GB, every prompt 161 tokens and every output 337.
- KV is divided in proportion to rate times bytes per token. A unit scores 0 if all batches are at
  their limit before the first iteration. Throughput beyond the rate counts.
- A unit's score is the mean of its models' throughputs weighted by their rates.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from muxjax.errors import PlanError
from muxjax.placement.costs.model_shape import LLAMA_SHAPES
from muxjax.placement.planner.load import ModelLoad

PROMPT_TOKENS, OUTPUT_TOKENS = 161, 337
DEVICE_GB = 80
_ACTIVATION_GB = 6
_OVERHEADS = {"llama-7b": 1e-4, "llama-13b": 8e-5}
_OVERHEAD = 7e-5
_LARGEST_DECODE_PERCENT = 90
MESH_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Candidate:
    """The smallest compute share that meets a model's rate on a mesh size (Algorithm 2).

    Attributes:
      percent: of the compute, for decoding.
      batch: sequences that decode together in isolation.
      throughput: requests per second in isolation.
    """

    percent: int
    batch: int
    throughput: float


@dataclass(frozen=True)
class UpstreamModel:
    """A model with the sizes that upstream derives from its name, in GB."""

    name: str
    kind: str
    rate: float
    weight_gb: float
    kv_gb_per_token: float
    base_devices: int
    rate_scale: int

    @property
    def sequence_gb(self) -> float:
        """GB of KV of one request."""
        return self.kv_gb_per_token * (OUTPUT_TOKENS + PROMPT_TOKENS)


def upstream_model(load: ModelLoad) -> UpstreamModel:
    """Derives the sizes that upstream assumes for a model.

    Raises:
      PlanError: a kind that upstream has no sizes for.
    """
    if load.kind not in LLAMA_SHAPES:
        raise PlanError(
            f"{load.name}: the upstream-compatible estimator supports {', '.join(LLAMA_SHAPES)}, "
            f"not {load.kind}"
        )
    billions = int(load.kind.rsplit("-", 1)[1][:-1])
    shape = LLAMA_SHAPES[load.kind]
    return UpstreamModel(
        name=load.name,
        kind=load.kind,
        rate=load.expected.rate,
        weight_gb=2 * billions,
        kv_gb_per_token=shape.num_layers * shape.hidden_size * 2 * 2 / 1024**3,
        base_devices={"llama-30b": 2, "llama-65b": 4}.get(load.kind, 1),
        rate_scale={"llama-13b": 2, "llama-30b": 4, "llama-65b": 8}.get(load.kind, 1),
    )


def supports_profile(profile: Mapping[str, Any], kinds: Iterable[str]) -> bool:
    """Whether upstream supports a profile of these kinds of models.

    All kinds must be LLaMA models, all keys integers, and every number of devices must have times
    at 100 % of the compute.
    """
    return all(
        kind in LLAMA_SHAPES
        and all(
            size.isdigit() and "100" in shares and all(percent.isdigit() for percent in shares)
            for size, shares in profile[kind].items()
        )
        for kind in kinds
    )


class UpstreamEstimator:
    """Throughput of models and units as upstream estimates it.

    Args:
      profile: the contents of MuxServe's profile.
      models: the fleet.
      devices: number of devices of the cluster. To reserve memory for other models, upstream
        limits an isolated model to the fraction of the memory that the fleet's weights use.
    """

    def __init__(
        self, profile: Mapping[str, Any], models: Sequence[UpstreamModel], devices: int
    ) -> None:
        self.models = {m.name: m for m in models}
        occupied = sum(m.weight_gb for m in models) + len(models) * _ACTIVATION_GB
        self._isolated_gb = occupied / (DEVICE_GB * devices) * DEVICE_GB
        self._profile = profile
        self._curves: dict[tuple[str, int, int, str], tuple[list[int], list[float]]] = {}
        self._units: dict[tuple[int, tuple[tuple[str, int], ...]], tuple[float, list[float]]] = {}
        self._candidates: dict[tuple[str, int], Candidate | None] = {}

    def candidate(self, name: str, size: int) -> Candidate | None:
        """Runs Algorithm 2 for a model and mesh size; None for a size that was not profiled."""
        key = (name, size)
        if key not in self._candidates:
            self._candidates[key] = self._find_candidate(self.models[name], size)
        return self._candidates[key]

    def _find_candidate(self, m: UpstreamModel, size: int) -> Candidate | None:
        if size < m.base_devices or str(size) not in self._profile[m.kind]:
            return None
        best: Candidate | None = None
        for percent in sorted(map(int, self._profile[m.kind][str(size)])):
            if percent > _LARGEST_DECODE_PERCENT:
                continue
            is_met, throughput, batch = self._estimate_isolated(
                m, size, percent, self._isolated_gb * size
            )
            if is_met:
                return Candidate(percent, batch, throughput)
            if throughput > (best.throughput if best else 0):
                best = Candidate(percent, batch, throughput)
        return best

    def add_replica(self, name: str, part: float) -> str:
        """Registers a replica with a part of a model's rate as a separate model of upstream.

        Returns:
          The replica's name, or the model's name if `part` is 1.
        """
        if part == 1.0:
            return name
        replica = f"{name} x {part!r}"
        if replica not in self.models:
            model = self.models[name]
            self.models[replica] = replace(model, name=replica, rate=model.rate * part)
        return replica

    def score_unit(
        self, size: int, placed: tuple[tuple[str, int], ...]
    ) -> tuple[float, list[float]]:
        """Scores a unit.

        Args:
          size: devices of the mesh.
          placed: name and percent of compute for decoding of each model.

        Returns:
          The mean of the throughputs weighted by rates, 0 without throughput. Then the throughputs
          of the last iteration, in requests per second, in the order of `placed`.
        """
        key = (size, placed)
        score = self._units.get(key)
        if score is None:
            score = self._units[key] = self._estimate_unit(size, placed)
        return score

    def _estimate_unit(
        self, size: int, placed: tuple[tuple[str, int], ...]
    ) -> tuple[float, list[float]]:
        models = [self.models[name] for name, _ in placed]
        count = len(models)
        base = sum([m.kv_gb_per_token * m.rate for m in models])
        occupied = sum([m.weight_gb for m in models]) + count * _ACTIVATION_GB
        pool = max(0.0, DEVICE_GB * size * 0.98 - occupied)
        batches: list[float] = []
        limits: list[float] = []
        prefills, decodes = [], []
        for m, (_, percent) in zip(models, placed, strict=True):
            part = m.rate * m.kv_gb_per_token / base * pool
            batches.append(self._estimate_isolated(m, size, percent, part)[2])
            prefills.append(self._curve(m.kind, size, 100, "prefill"))
            decodes.append(self._curve(m.kind, size, percent, "decoding"))
            limits.append(min(part // m.sequence_gb, decodes[-1][0][-1]))
        rates = [m.rate for m in models]
        overheads = [_OVERHEADS.get(m.kind, _OVERHEAD) for m in models]
        prefill = [_at_next_batch(*prefills[i], batches[i]) for i in range(count)]
        decode = [
            (_at_next_batch(*decodes[i], batches[i]) + overheads[i] * batches[i]) * OUTPUT_TOKENS
            for i in range(count)
        ]
        best = 0.0
        throughputs: list[float] = []
        while any(batches[i] < limits[i] for i in range(count)):
            prefilling = sum(prefill)
            throughputs = [batches[i] / (decode[i] + prefilling) for i in range(count)]
            total, worst, worst_ratio = 0.0, -1, 100.0
            for i, throughput in enumerate(throughputs):
                rate = rates[i]
                total += throughput * rate
                if throughput + min(0.5, throughput * 0.1) < rate:
                    ratio = throughput / rate
                    if batches[i] < limits[i] and ratio < worst_ratio:
                        worst, worst_ratio = i, ratio
            best = max(best, total)
            if worst < 0:
                break
            batches[worst] += 1
            batch = batches[worst]
            prefill[worst] = _at_next_batch(*prefills[worst], batch)
            latency = _at_next_batch(*decodes[worst], batch) + overheads[worst] * batch
            decode[worst] = latency * OUTPUT_TOKENS
        return best / sum(rates), throughputs

    def _estimate_isolated(
        self, m: UpstreamModel, size: int, percent: int, gigabytes: float
    ) -> tuple[bool, float, int]:
        """Whether an isolated model meets its rate, and its throughput and batch."""
        prefill = self._curve(m.kind, size, 100, "prefill")
        decode = self._curve(m.kind, size, percent, "decoding")
        overhead = _OVERHEADS.get(m.kind, _OVERHEAD)
        low, high = 1.0, max(2.0, min(gigabytes // m.sequence_gb, decode[0][-1]))
        throughput, batch = 0.0, 0.0
        while high - low >= 1:
            batch = (low + high) / 2
            latency = _at_next_batch(*decode, batch) + overhead * batch
            throughput = batch / (latency * OUTPUT_TOKENS + _at_next_batch(*prefill, batch))
            if throughput >= m.rate:
                high = batch
            else:
                low = batch
        if throughput + min(0.5, throughput * 0.1) > m.rate:
            return True, m.rate, int(batch)
        return False, throughput, int(batch)

    def _curve(
        self, kind: str, size: int, percent: int, phase: str
    ) -> tuple[list[int], list[float]]:
        """Profiled batches, and the seconds of a step of each batch."""
        key = (kind, size, percent, phase)
        curve = self._curves.get(key)
        if curve is None:
            curve = self._curves[key] = self._build_curve(*key)
        return curve

    def _build_curve(
        self, kind: str, size: int, percent: int, phase: str
    ) -> tuple[list[int], list[float]]:
        batches, seconds = [], []
        mean = PROMPT_TOKENS if phase == "prefill" else OUTPUT_TOKENS
        for batch, cells in self._profile[kind][str(size)][str(percent)].items():
            times: list[float] = []
            running: list[float] = []
            for length, cell in cells.items():  # in file order, as in upstream
                if cell[phase] > 0:
                    running.append(cell[phase])
                    decoding = phase == "decoding"
                    times.append((_mean(running) if decoding else cell[phase]) / 1000)
                    if int(length) > mean:
                        break
            if times:
                batches.append(int(batch))
                seconds.append(times[-1] if phase == "prefill" else _mean(times))
        return batches, seconds


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _at_next_batch(batches: list[int], seconds: list[float], batch: float) -> float:
    """Seconds at the next profiled batch. Beyond the last batch, where upstream fails, its time."""
    index = bisect_left(batches, batch)
    return seconds[index] if index < len(seconds) else seconds[-1]
