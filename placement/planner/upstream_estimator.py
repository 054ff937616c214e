"""MuxServe's own estimator, as its released optimiser has it: kept only to compare with.

After hao-ai-lab/MuxServe, `muxserve/muxsched/placement.py` (2024); the formulas are theirs, the
code is not. What the paper does not say, or says otherwise:
- a batch between two profiled ones costs what the next larger one costs;
- the time of a decode step is a mean over lengths of running means over lengths, plus an overhead
  that grows with the batch; prefill takes the first profiled length above the mean prompt;
- the size of a model is read from its name, the KV of a token from its hidden size, every device
  has 80 GB, and every prompt 161 tokens and every output 337;
- KV is split in proportion to rate times bytes of a token; a unit scores 0 when all batches are at
  what that allows before the first look; throughput beyond the rate counts;
- a unit's score is the mean of its models' throughputs weighted by their rates.
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
SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Candidate:
    """The smallest share of compute that meets a model's rate on some devices (Algorithm 2).

    Attributes:
      percent: of compute, for decoding.
      batch, throughput: that it reaches, alone.
    """

    percent: int
    batch: int
    throughput: float


@dataclass(frozen=True)
class Member:
    """A model as upstream sees it: sizes in GB, from its name."""

    name: str
    kind: str
    rate: float
    weight_gb: float
    kv_gb_per_token: float
    base_devices: int
    rate_scale: int

    @property
    def sequence_gb(self) -> float:
        """KV of one request."""
        return self.kv_gb_per_token * (OUTPUT_TOKENS + PROMPT_TOKENS)


def member(load: ModelLoad) -> Member:
    """Upstream's view of a model.

    Raises:
      PlanError: a kind that upstream has no sizes for.
    """
    if load.kind not in LLAMA_SHAPES:
        raise PlanError(
            f"{load.name}: the upstream-compatible estimator knows {', '.join(LLAMA_SHAPES)}, not "
            f"{load.kind}"
        )
    billions = int(load.kind.rsplit("-", 1)[1][:-1])
    shape = LLAMA_SHAPES[load.kind]
    return Member(
        name=load.name,
        kind=load.kind,
        rate=load.rate,
        weight_gb=2 * billions,
        kv_gb_per_token=shape.num_layers * shape.hidden_size * 2 * 2 / 1024**3,
        base_devices={"llama-30b": 2, "llama-65b": 4}.get(load.kind, 1),
        rate_scale={"llama-13b": 2, "llama-30b": 4, "llama-65b": 8}.get(load.kind, 1),
    )


def understands(profile: Mapping[str, Any], kinds: Iterable[str]) -> bool:
    """Whether upstream could read a profile of these kinds: LLaMA, whole numbers as keys, and
    prefill with all of the compute for every number of devices.
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
    """Throughput of models and of units as upstream estimates it.

    Args:
      profile: the contents of MuxServe's profile.
      members: the fleet.
      devices: of the whole cluster; a model alone is given the part of the memory that the fleet's
        weights would take, by which upstream means to leave room for others.
    """

    def __init__(self, profile: Mapping[str, Any], members: Sequence[Member], devices: int) -> None:
        self.members = {m.name: m for m in members}
        occupied = sum(m.weight_gb for m in members) + len(members) * _ACTIVATION_GB
        self._alone_gb = occupied / (DEVICE_GB * devices) * DEVICE_GB
        self._profile = profile
        self._curves: dict[tuple[str, int, int, str], tuple[list[int], list[float]]] = {}
        self._units: dict[tuple[int, tuple[tuple[str, int], ...]], tuple[float, list[float]]] = {}
        self._candidates: dict[tuple[str, int], Candidate | None] = {}

    def candidate(self, name: str, size: int) -> Candidate | None:
        """Algorithm 2 for one model and mesh size; None where it was not profiled."""
        key = (name, size)
        if key not in self._candidates:
            self._candidates[key] = self._candidate(self.members[name], size)
        return self._candidates[key]

    def _candidate(self, m: Member, size: int) -> Candidate | None:
        if size < m.base_devices or str(size) not in self._profile[m.kind]:
            return None
        best: Candidate | None = None
        for percent in sorted(map(int, self._profile[m.kind][str(size)])):
            if percent > _LARGEST_DECODE_PERCENT:
                continue
            met, throughput, batch = self._alone(m, size, percent, self._alone_gb * size)
            if met:
                return Candidate(percent, batch, throughput)
            if throughput > (best.throughput if best else 0):
                best = Candidate(percent, batch, throughput)
        return best

    def part(self, name: str, part: float) -> str:
        """The name of a replica that takes a part of a model's rate: to upstream, another model."""
        if part == 1.0:
            return name
        replica = f"{name} x {part!r}"
        if replica not in self.members:
            whole = self.members[name]
            self.members[replica] = replace(whole, name=replica, rate=whole.rate * part)
        return replica

    def unit(self, size: int, placed: tuple[tuple[str, int], ...]) -> tuple[float, list[float]]:
        """The score of a unit of `size` devices, and the throughput of each model.

        Args:
          size: devices of the mesh.
          placed: name and percent of compute for decoding of each model.

        Returns:
          The mean of the throughputs, weighted by rates; 0 for none. And the throughputs, in the
          order of `placed`, in the last state that was looked at.
        """
        key = (size, placed)
        found = self._units.get(key)
        if found is None:
            found = self._units[key] = self._estimate_unit(size, placed)
        return found

    def _estimate_unit(
        self, size: int, placed: tuple[tuple[str, int], ...]
    ) -> tuple[float, list[float]]:
        members = [self.members[name] for name, _ in placed]
        count = len(members)
        base = sum([m.kv_gb_per_token * m.rate for m in members])
        taken = sum([m.weight_gb for m in members]) + count * _ACTIVATION_GB
        pool = max(0.0, DEVICE_GB * size * 0.98 - taken)
        batches: list[float] = []
        most: list[float] = []
        prefills, decodes = [], []
        for m, (_, percent) in zip(members, placed, strict=True):
            part = m.rate * m.kv_gb_per_token / base * pool
            batches.append(self._alone(m, size, percent, part)[2])
            prefills.append(self._curve(m.kind, size, 100, "prefill"))
            decodes.append(self._curve(m.kind, size, percent, "decoding"))
            most.append(min(part // m.sequence_gb, decodes[-1][0][-1]))
        rates = [m.rate for m in members]
        overheads = [_OVERHEADS.get(m.kind, _OVERHEAD) for m in members]
        prefill = [_at_next(*prefills[i], batches[i]) for i in range(count)]
        decode = [
            (_at_next(*decodes[i], batches[i]) + overheads[i] * batches[i]) * OUTPUT_TOKENS
            for i in range(count)
        ]
        best = 0.0
        throughputs: list[float] = []
        while any(batches[i] < most[i] for i in range(count)):
            turn = sum(prefill)
            throughputs = [batches[i] / (decode[i] + turn) for i in range(count)]
            total, worst, worst_ratio = 0.0, -1, 100.0
            for i, throughput in enumerate(throughputs):
                rate = rates[i]
                total += throughput * rate
                if throughput + min(0.5, throughput * 0.1) < rate:
                    ratio = throughput / rate
                    if batches[i] < most[i] and ratio < worst_ratio:
                        worst, worst_ratio = i, ratio
            best = max(best, total)
            if worst < 0:
                break
            batches[worst] += 1
            batch = batches[worst]
            prefill[worst] = _at_next(*prefills[worst], batch)
            latency = _at_next(*decodes[worst], batch) + overheads[worst] * batch
            decode[worst] = latency * OUTPUT_TOKENS
        return best / sum(rates), throughputs

    def _alone(
        self, m: Member, size: int, percent: int, gigabytes: float
    ) -> tuple[bool, float, int]:
        """Whether a model alone meets its rate, the throughput, and the batch for it."""
        prefill = self._curve(m.kind, size, 100, "prefill")
        decode = self._curve(m.kind, size, percent, "decoding")
        overhead = _OVERHEADS.get(m.kind, _OVERHEAD)
        low, high = 1.0, max(2.0, min(gigabytes // m.sequence_gb, decode[0][-1]))
        throughput, batch = 0.0, 0.0
        while high - low >= 1:
            batch = (low + high) / 2
            latency = _at_next(*decode, batch) + overhead * batch
            throughput = batch / (latency * OUTPUT_TOKENS + _at_next(*prefill, batch))
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
        """Batches, and the seconds of a step for each."""
        key = (kind, size, percent, phase)
        found = self._curves.get(key)
        if found is None:
            found = self._curves[key] = self._make_curve(*key)
        return found

    def _make_curve(
        self, kind: str, size: int, percent: int, phase: str
    ) -> tuple[list[int], list[float]]:
        batches, seconds = [], []
        mean = PROMPT_TOKENS if phase == "prefill" else OUTPUT_TOKENS
        for batch, cells in self._profile[kind][str(size)][str(percent)].items():
            times: list[float] = []
            running: list[float] = []
            for length, cell in cells.items():  # in the file's order, as upstream goes
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


def _at_next(batches: list[int], seconds: list[float], batch: float) -> float:
    """The time of the next profiled batch; of the last one beyond it, where upstream fails."""
    index = bisect_left(batches, batch)
    return seconds[index] if index < len(seconds) else seconds[-1]
