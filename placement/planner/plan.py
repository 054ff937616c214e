"""The placement plan: units, their devices, models and quotas. A versioned JSON file.

The file has all inputs of the engine and the simulator:
- the units and their devices;
- the `tp` size, replicas, compute and time shares, KV quota and batch of each model;
- the expected throughput and latencies;
- the source of the costs: model shapes and device data, or the path of a profile.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from muxjax.errors import PlanError
from muxjax.placement.costs.model_shape import ModelShape
from muxjax.scheduling.expected_load import ExpectedLoad
from muxjax.scheduling.routing import PlannedLoad

Execution = Literal["concurrent", "time_sliced"]
"""How the programs of a unit share its devices. Concurrent execution: at the same time, each with a
share of the compute (MuxServe). Time-sliced: one after the other, each with a share of the time
(MuxJAX)."""

VERSION = 1

Share = Annotated[float, Field(ge=0, le=1.0 + 1e-9, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class _PlanSection(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PlannedModel(_PlanSection):
    """A model on one unit.

    Attributes:
      name: in the fleet. A model may be on several units.
      kind: the model's name in the cost model.
      rate: requests per second that are routed here.
      prompt_tokens, output_tokens: mean lengths, in tokens.
      tp: devices that one replica is sharded over.
      replicas: replicas on the mesh of the unit, `devices / tp`.
      prefill_share, decode_share: fraction of the compute (concurrent; 1 if time-sliced).
      prefill_time, decode_time: expected fraction of the device time that its steps use.
      kv_floor, kv_quota: guaranteed and initial fraction of the unit's KV pool.
      longest: tokens of the longest request, if the fleet file has a `max_model_len`.
      max_batch: maximum number of concurrent sequences within its quota, over all replicas.
      batch: sequences that decode together at the expected load, over all replicas.
      throughput: expected requests per second that are served.
      ttft, tpot: expected mean seconds to the first token, and per output token after it; None if
        the model is not served in full, because its queue then grows without limit.
    """

    name: str
    kind: str
    rate: Amount
    prompt_tokens: Amount
    output_tokens: Amount
    tp: Count = 1
    # Plans written before version 0.2 call this field `copies`.
    replicas: Count = Field(1, validation_alias=AliasChoices("replicas", "copies"))
    prefill_share: Share = 1.0
    decode_share: Share = 1.0
    prefill_time: Share = 0.0
    decode_time: Share = 0.0
    kv_floor: Share = 0.0
    kv_quota: Share = 0.0
    longest: Count | None = None
    max_batch: Count = 1
    batch: Amount = 0.0
    throughput: Amount = 0.0
    ttft: Amount | None = None
    tpot: Amount | None = None

    @property
    def expected_load(self) -> ExpectedLoad:
        """The load that is routed here."""
        return ExpectedLoad(self.rate, self.prompt_tokens, self.output_tokens)

    @property
    def token_seconds(self) -> float:
        """Planned seconds per token of a request, prompt and output; 1 without a planned batch.

        The time from the first to the last token, by Little's law. It is also defined for replicas
        that are not served in full.
        """
        tokens = self.throughput * self.expected_load.request_tokens
        return self.batch / tokens if self.batch and tokens else 1.0


class PlannedUnit(_PlanSection):
    """A mesh and the models on it.

    Attributes:
      name: unique in the plan.
      node: index of the node in the cluster.
      device: the kind of its devices.
      devices: their indices in the node.
      weight_bytes: weight bytes on each device.
      reserved_bytes: bytes on each device for activations and the runtime.
      kv_bytes: bytes of the KV pool on each device.
      throughput: expected requests per second of all models.
      use: utilization of the resource that limits the unit (device time if time-sliced, else KV)
        with batches that fill the pool; 1 if load is refused.
      models: the models of the unit.
    """

    name: str
    node: Annotated[int, Field(ge=0)]
    device: str
    devices: tuple[int, ...]
    weight_bytes: Amount
    reserved_bytes: Amount
    kv_bytes: Amount
    throughput: Amount
    use: Share = 0.0
    models: tuple[PlannedModel, ...]

    @property
    def size(self) -> int:
        """Devices of the mesh."""
        return len(self.devices)

    @property
    def planned_load(self) -> PlannedLoad:
        """Durations and outstanding requests, for the router."""
        seconds = {model.name: model.token_seconds for model in self.models}
        outstanding = sum(
            model.batch * model.token_seconds * model.expected_load.request_tokens
            for model in self.models
        )
        return PlannedLoad(seconds, outstanding) if outstanding else PlannedLoad(seconds)


class PlannedDevice(_PlanSection):
    """Data of a kind of device, as in `costs.devices.Device`."""

    name: str
    flops: Amount
    bandwidth: Amount
    memory: Amount
    link_bandwidth: Amount
    launch_seconds: Amount
    source: str = ""


class PlannedNodes(_PlanSection):
    """A group of equal nodes."""

    nodes: Count
    devices: Count
    device: str


class PlannedTarget(_PlanSection):
    """Latency target of a model: a request that misses one of the limits is late.

    Attributes:
      ttft: maximum seconds to the first token; None: not checked.
      tpot: maximum seconds per output token after it; None: not checked.
      scale: maximum latency of the whole request, as a multiple of its latency with no other load
        on the fewest devices that hold the model; None: not checked.
    """

    ttft: Amount | None = None
    tpot: Amount | None = None
    scale: Amount | None = None


class SimulatedService(_PlanSection):
    """What a simulation of the plan measured, for one model or for all of them.

    Attributes:
      requests: number of simulated requests.
      slo_attainment: fraction of them that met their target; None without requests.
      throughput: finished requests per second.
      ttft_p50, ttft_p99: quantiles of the seconds to the first token.
      tpot_p50, tpot_p99: quantiles of the seconds per output token after it.
    """

    requests: Annotated[int, Field(ge=0)]
    slo_attainment: Share | None
    throughput: Amount
    ttft_p50: Amount | None
    ttft_p99: Amount | None
    tpot_p50: Amount | None
    tpot_p99: Amount | None


class PlanSimulation(SimulatedService):
    """The simulation behind a plan's promise: Poisson arrivals at the expected rates.

    Attributes:
      policy: the scheduling policy.
      seconds: length of the workload.
      seed: of the workload.
      models: results by model.
    """

    policy: str
    seconds: Amount
    seed: int
    models: dict[str, SimulatedService]


class PlacementPlan(_PlanSection):
    """A placement of a fleet on a cluster.

    Attributes:
      version: of the file format.
      muxjax: the MuxJAX version that wrote the plan.
      config_hash: of the fleet, cluster, costs and options.
      seed: of the search.
      execution: how the units' programs share the devices.
      objective: the maximized quantity; see `scorer.Objective`.
      cluster, devices: the nodes, and the data of their devices.
      shapes: sizes of each kind of model.
      profile: path of the profile that the costs are from; None: the roofline.
      units: the units. Devices in no unit are free.
      throughput: expected requests per second that are served, all models.
      weighted_throughput: the same, each model weighted by its fraction of the rate (MuxServe's
        measure).
      rate: offered requests per second.
      slo_attainment: fraction of the requests that meet their target: simulated if the plan has a
        simulation, else the requests whose model is served in full within its targets on average.
      score: value of the objective, plus a bonus for unused capacity of at most 0.01 % of the load
        that decides between plans that serve the same load.
      bound: upper bound of the score of any plan.
      gap: `1 - score / bound`.
      upstream_score: by MuxServe's own estimator, if the costs are from its profile.
      targets: latency target of each model, by name.
      simulation: the plan under its expected load; None: not simulated.
      seconds: duration of the planning.
    """

    version: Literal[1] = 1
    muxjax: str
    config_hash: str
    seed: int = 0
    execution: Execution
    objective: str
    cluster: tuple[PlannedNodes, ...]
    devices: tuple[PlannedDevice, ...]
    shapes: dict[str, ModelShape]
    profile: str | None = None
    units: tuple[PlannedUnit, ...]
    throughput: Amount
    weighted_throughput: Amount
    rate: Amount
    slo_attainment: Share
    score: Amount
    bound: Amount
    gap: Share
    upstream_score: Amount | None = None
    targets: dict[str, PlannedTarget] = {}
    simulation: PlanSimulation | None = None
    seconds: Amount

    @model_validator(mode="after")
    def _units_fit_cluster(self) -> Self:
        nodes = [group for group in self.cluster for _ in range(group.nodes)]
        used: set[tuple[int, int]] = set()
        names: set[str] = set()
        for unit in self.units:
            if unit.name in names:
                raise ValueError(f"two units are called {unit.name}; names must be unique")
            names.add(unit.name)
            if unit.node >= len(nodes) or max(unit.devices, default=-1) >= nodes[unit.node].devices:
                raise ValueError(f"unit {unit.name} is on devices that the cluster does not have")
            devices = {(unit.node, device) for device in unit.devices}
            if not devices or len(devices) < unit.size or devices & used:
                raise ValueError(
                    f"unit {unit.name} has no devices, or devices that another unit uses"
                )
            used |= devices
            for model in unit.models:
                if model.kind not in self.shapes:
                    raise ValueError(f"the shape of {model.kind} ({model.name}) is missing")
                if model.tp * model.replicas != unit.size:
                    raise ValueError(
                        f"{model.name} on {unit.name}: {model.replicas} replicas on {model.tp} "
                        f"devices each do not fill {unit.size} devices"
                    )
        return self

    def to_json(self) -> dict[str, Any]:
        """The contents of the file as plain data."""
        return self.model_dump(mode="json")

    def save(self, path: Path) -> None:
        """Writes the plan to a file."""
        path.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")


def load_plan(path: Path) -> PlacementPlan:
    """Reads a plan file.

    Raises:
      PlanError: the file cannot be read or is not a valid plan; one line per error.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise PlanError(f"{path}: not a plan: {error}") from error
    if isinstance(data, dict) and data.get("version", VERSION) != VERSION:
        raise PlanError(
            f"{path}: a plan of version {data['version']!r}; this MuxJAX reads version {VERSION}: "
            "write it again with `muxjax plan`"
        )
    try:
        return PlacementPlan.model_validate(data)
    except ValidationError as error:
        messages = [
            f"{path}: {'.'.join(map(str, details['loc'])) or 'plan'}: {details['msg']}"
            for details in error.errors(include_url=False)
        ]
        raise PlanError("\n".join(messages)) from error
