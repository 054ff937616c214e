"""The plan: which models run on which meshes, with what quotas. A versioned JSON file.

It holds all that the engine and the simulator need: the units with their devices, each model's
degree of tensor parallelism, copies, shares of compute and of time, KV quotas and batch, what the
estimator expects of it, and where the costs came from (the models' shapes and the devices' figures,
or a profile's path), so that it can be used without the files it was made from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from muxjax.errors import PlanError
from muxjax.placement.costs.model_shape import ModelShape

Execution = Literal["concurrent", "time_sliced"]
"""How the programs of a unit share its devices: at once, each with a share of the compute
(MuxServe), or one after the other, each with a share of the time (MuxJAX)."""

VERSION = 1

Share = Annotated[float, Field(ge=0, le=1.0 + 1e-9, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PlannedModel(_Part):
    """A model on one unit.

    Attributes:
      name: in the fleet. A model with replicas stands in several units.
      kind: what the cost model calls it.
      rate: requests a second that are routed here.
      prompt_tokens, output_tokens: mean lengths.
      tp: devices that one copy is split over.
      replicas: replicas on the mesh of the unit, `devices / tp`.
      prefill_share, decode_share: part of the compute (concurrent; 1 where time is sliced).
      prefill_time, decode_time: part of the device time that its steps are expected to take.
      kv_floor, kv_quota: part of the unit's KV pool that is guaranteed, and that it begins with.
      longest: tokens of the longest request, where the fleet file says; its `max_model_len`.
      max_batch: sequences at once that its quota holds, all copies together.
      batch: sequences that decode together at the expected load, all copies together.
      throughput: requests a second that are expected to be served.
      ttft, tpot: seconds that are expected to the first token, and for each further one; None where
        less is served than comes, as the queue grows then.
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
    def token_seconds(self) -> float:
        """Seconds for each token of a request, prompt and output, from first to last, as planned;
        1 where the plan does not say. By Little's law, so that copies which are to serve less than
        comes compare with others.
        """
        tokens = self.throughput * (self.prompt_tokens + self.output_tokens)
        return self.batch / tokens if self.batch and tokens else 1.0


class PlannedUnit(_Part):
    """A mesh and the models on it.

    Attributes:
      name: unique in the plan.
      node: index of the node in the cluster.
      device: the kind of its devices.
      devices: their indices in the node.
      weight_bytes: on each device.
      reserved_bytes: on each device, for activations and the runtime.
      kv_bytes: on each device: the pool.
      throughput: requests a second, all models.
      use: of what limits the unit (time where it is sliced, else KV), at the batches that fill the
        pool; 1 where load is refused.
      models: who lives here.
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
    def token_seconds(self) -> dict[str, float]:
        """`PlannedModel.token_seconds` of each model."""
        return {model.name: model.token_seconds for model in self.models}


class PlannedDevice(_Part):
    """The figures of a kind of device, as in `devices.Device`."""

    name: str
    flops: Amount
    bandwidth: Amount
    memory: Amount
    link_bandwidth: Amount
    launch_seconds: Amount
    source: str = ""


class PlannedNodes(_Part):
    """Nodes that are alike."""

    nodes: Count
    devices: Count
    device: str


class PlacementPlan(_Part):
    """A whole plan.

    Attributes:
      version: of this format.
      muxjax: the version that made it.
      config_hash: of the fleet, the cluster, the costs and the options that it was made from.
      seed: of the search.
      execution: how the units' programs share the devices.
      objective: what was maximised.
      cluster, devices: what there is.
      shapes: of each kind of model.
      profile: path of the profile that the costs are from; None: the roofline.
      units: who runs where. Devices in none are free.
      throughput: requests a second that are expected to be served, all models.
      weighted_throughput: the same, each model's weighted by its share of the rate (MuxServe's
        measure).
      rate: requests a second that are offered.
      slo_attainment: part of the requests whose model is served at its rate within its targets.
      score: of the objective, and up to 0.01 % of the load more for what is left unused, so that
        of two plans that serve the same the one with more room has the higher score.
      bound: a score that no plan can exceed.
      gap: `1 - score / bound`.
      upstream_score: by MuxServe's own estimator, where the costs are from its profile.
      seconds: that the search took.
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
    seconds: Amount

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        nodes = [group for group in self.cluster for _ in range(group.nodes)]
        taken: set[tuple[int, int]] = set()
        names: set[str] = set()
        for unit in self.units:
            if unit.name in names:
                raise ValueError(f"two units are called {unit.name}")
            names.add(unit.name)
            if unit.node >= len(nodes) or max(unit.devices, default=-1) >= nodes[unit.node].devices:
                raise ValueError(f"unit {unit.name} is on devices that the cluster has not")
            places = {(unit.node, device) for device in unit.devices}
            if not places or len(places) < unit.size or places & taken:
                raise ValueError(f"unit {unit.name} has no device, or one that is taken")
            taken |= places
            for model in unit.models:
                if model.kind not in self.shapes:
                    raise ValueError(f"the shape of {model.kind} ({model.name}) is missing")
                if model.tp * model.replicas != unit.size:
                    raise ValueError(
                        f"{model.name} on {unit.name}: {model.replicas} copies on {model.tp} "
                        f"devices each do not fill {unit.size} devices"
                    )
        return self

    def to_json(self) -> dict[str, Any]:
        """Plain data, as in the file."""
        return self.model_dump(mode="json")

    def save(self, path: Path) -> None:
        """Writes the file."""
        path.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")


def load_plan(path: Path) -> PlacementPlan:
    """Reads a plan's file.

    Raises:
      PlanError: it cannot be read or is not a valid plan; a line for each fault.
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
            "make it again with `muxjax plan`"
        )
    try:
        return PlacementPlan.model_validate(data)
    except ValidationError as error:
        faults = [
            f"{path}: {'.'.join(map(str, details['loc'])) or 'plan'}: {details['msg']}"
            for details in error.errors(include_url=False)
        ]
        raise PlanError("\n".join(faults)) from error
