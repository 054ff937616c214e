"""The spec of a unit: models, devices and pool, without weights or compiled programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax
import numpy as np

from muxjax.config.fleet_file import FleetConfig
from muxjax.config.model_entry import ModelEntry
from muxjax.engine.loaded_model import LoadedModel
from muxjax.executor.jax_executor import JaxExecutor
from muxjax.executor.mesh import ModelMesh
from muxjax.executor.programs import Buckets, ModelPrograms
from muxjax.executor.step_functions import StepFunctions
from muxjax.models.checkpoints.checkpoint import Checkpoint
from muxjax.models.nn.shards import Shards
from muxjax.scheduling.demand import DemandFunction
from muxjax.scheduling.policies.registry import get_policy
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.specs import ModelSpec


@dataclass(frozen=True)
class ModelBuildSpec:
    """The spec of one model of a unit.

    Attributes:
      entry: its entry of the fleet file.
      model: description of the loaded model.
      checkpoint: source of its weights.
      buckets: sizes of its compiled steps.
      functions: its steps on one device.
      shards: sharding of its parameters.
      mesh: the unit's devices, divided into its replicas.
      spec: the model's spec for the scheduler.
    """

    entry: ModelEntry
    model: LoadedModel
    checkpoint: Checkpoint
    buckets: Buckets
    functions: StepFunctions
    shards: Shards
    mesh: ModelMesh
    spec: ModelSpec

    def update_expectations(self, entry: ModelEntry) -> ModelBuildSpec:
        """Returns the same model with the expected load, floor and SLO of another entry."""
        spec = dataclasses.replace(self.spec, **expectations(entry))
        return dataclasses.replace(self, entry=entry, spec=spec)


def expectations(entry: ModelEntry) -> dict[str, Any]:
    """Returns the fields of `ModelSpec` that may change while a model is served."""
    return {
        "load": entry.expected_load,
        "kv_floor": entry.kv_floor,
        "targets": entry.slo.latency_slo,
    }


@dataclass(frozen=True)
class UnitSpec:
    """The spec of a unit.

    Attributes:
      config: the fleet file; used for settings that all models share.
      devices: of the unit.
      kv: shape `[P, rows, 128]` and type of the pool on one device.
      model_specs: its models by name, in the fleet file's order.
      demand: expected demand of the models, for the initial quotas.
      poison: test mode, see `Fleet.load`.
    """

    config: FleetConfig
    devices: tuple[jax.Device, ...]
    kv: jax.ShapeDtypeStruct
    model_specs: dict[str, ModelBuildSpec]
    demand: DemandFunction
    poison: bool = False

    @property
    def models(self) -> dict[str, LoadedModel]:
        """Its models by name, as they will be served."""
        return {name: spec.model for name, spec in self.model_specs.items()}

    @property
    def awake_specs(self) -> dict[str, ModelBuildSpec]:
        """The models that are loaded at the start: those that are not `sleeping`."""
        return {name: s for name, s in self.model_specs.items() if not s.entry.sleeping}

    @property
    def pool_bytes(self) -> int:
        """Bytes of the pool on one device."""
        return int(np.prod(self.kv.shape)) * self.kv.dtype.itemsize

    @property
    def dummy_pages(self) -> int:
        """Number of pages at the start of the pool that padding is written to."""
        return max(spec.spec.num_layers for spec in self.model_specs.values())

    def add_model(self, spec: ModelBuildSpec) -> Self:
        """Returns a copy with an added model; a model of the same name is replaced."""
        return dataclasses.replace(self, model_specs={**self.model_specs, spec.model.name: spec})

    def remove_model(self, name: str) -> Self:
        """Returns a copy without a model."""
        others = {other: spec for other, spec in self.model_specs.items() if other != name}
        return dataclasses.replace(self, model_specs=others)

    def build_executor(self, programs: Mapping[str, ModelPrograms]) -> JaxExecutor:
        """Returns an executor with a pool, and with slots for these models.

        Args:
          programs: compiled and with weights, by model name.
        """
        return JaxExecutor(
            self.devices, programs, self.kv, dummy_pages=self.dummy_pages, poison=self.poison
        )

    def build_scheduler(self, sleeping: Collection[str] = ()) -> Scheduler:
        """Returns a scheduler with an empty pool and no requests.

        Args:
          sleeping: models without a quota for now; the pool is laid out for them too.

        Raises:
          PoolTooSmall: the pool cannot hold one full-length request of each model.
        """
        policy = get_policy(self.config.policy)
        scheduler = Scheduler(
            [spec.spec for spec in self.model_specs.values()],
            self.kv.shape[0],
            policy.factory(),
            demand=self.demand,
            kv_quotas=policy.kv_quotas,
            refuse_late=self.config.refuse_late,
            prefix_cache=self.config.pool.prefix_cache,
            record_freed=self.poison,
        )
        for name in sleeping:
            scheduler.remove_model(name)
        return scheduler
