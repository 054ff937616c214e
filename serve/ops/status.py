"""Health, model states and counters: `/v1/models`, `/health`, `/metrics`, `/stats`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from muxjax.engine.health import ModelHealth, ModelStatus, UnitHealth
from muxjax.serve.access.admission import Admission
from muxjax.serve.access.callers import Caller
from muxjax.serve.find_model import find_model
from muxjax.serve.fleet_protocol import ManagedFleet, ModelLike
from muxjax.serve.ops.metrics import CONTENT_TYPE, PrometheusMetrics
from muxjax.serve.ops.rolling_latency import RollingLatency
from muxjax.serve.ops.stats_cache import StatsCache
from muxjax.serve.ops.watchdog import Watchdog

UPDATE_SECONDS = 0.5
"""Interval between two updates of the live page, in seconds."""


class Status:
    """The endpoints that report the state of the server.

    Args:
      fleet: the fleet to report on.
      admission: provides queue lengths and whether the server drains.
      metrics: Prometheus metrics.
      latency: latency percentiles for the live page.
      watchdog: provides which units are lost.
    """

    def __init__(
        self,
        fleet: ManagedFleet,
        admission: Admission,
        metrics: PrometheusMetrics,
        latency: RollingLatency,
        watchdog: Watchdog,
    ) -> None:
        self._fleet = fleet
        self._admission = admission
        self._metrics = metrics
        self._latency = latency
        self._watchdog = watchdog
        self._stats = StatsCache(fleet.stats)
        self._stall_timeout = admission.config.stall_timeout
        self._started = time.time()

    # Models

    async def list_models(self, request: Request) -> Response:
        """Lists the models that the caller may use."""
        models = request.state.view.models.values()
        return JSONResponse({"object": "list", "data": [self._card(model) for model in models]})

    async def get_model(self, request: Request, name: str) -> Response:
        """Describes one model."""
        return JSONResponse(self._card(find_model(request.state.view, name)))

    def _card(self, model: ModelLike) -> dict[str, Any]:
        """Describes a model with OpenAI's fields and the additional ones of vLLM and MuxJAX."""
        unit = self._unit_of(model.name)
        return {
            "id": model.name,
            "object": "model",
            "created": int(self._started),
            "owned_by": "muxjax",
            "max_model_len": model.max_model_len,
            "status": self.model_status(model.name),
            "error": self._model_error(model.name),
            "unit": None if unit is None else unit.unit,
        }

    def model_status(self, name: str) -> ModelStatus:
        """Returns the state of a model."""
        unit, state = self._unit_of(name), self._fleet.model_states().get(name)
        if unit is None:
            return "failed"
        if not unit.alive:
            # The watchdog restarts a unit that has ended, unless it is lost.
            is_lost = self._watchdog.is_lost(unit.unit)
            return "failed" if is_lost or unit.reason is None else "loading"
        return "loaded" if state is None else state.status

    def _model_error(self, model: str) -> str | None:
        state: ModelHealth | None = self._fleet.model_states().get(model)
        return None if state is None else state.error

    def _unit_of(self, model: str) -> UnitHealth | None:
        return next((unit for unit in self._fleet.health() if model in unit.models), None)

    # Health

    async def health(self) -> Response:
        """Liveness: 200 unless a unit has ended and has not been restarted."""
        ended = [unit for unit in self._fleet.health() if not unit.alive]
        if ended:
            reason = ended[0].reason or "the engine is closed"
            return JSONResponse({"status": "dead", "reason": reason}, status_code=503)
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """Readiness: 200 if the server accepts requests and every unit works."""
        if self._admission.draining:
            return _not_ready("the server is shutting down")
        for unit in self._fleet.health():
            if not unit.works(self._stall_timeout):
                return _not_ready(_problem(unit))
        return JSONResponse({"status": "ready"})

    async def model_health(self, request: Request, name: str) -> Response:
        """Readiness of one model: 200 if it serves requests."""
        find_model(request.state.view, name)
        unit = self._unit_of(name)
        if unit is None or not unit.works(self._stall_timeout):
            return _not_ready("no unit has the model" if unit is None else _problem(unit))
        if error := self._model_error(name):
            return _not_ready(f"{name} has failed: {error}")
        return JSONResponse({"status": self.model_status(name), "unit": unit.unit})

    # Counters

    async def metrics(self) -> Response:
        """Returns the metrics in the text format of Prometheus."""
        stats = await self._stats.latest()
        names = list(self._fleet.models)
        text = self._metrics.render(
            stats,
            self._fleet.health(),
            states={name: self.model_status(name) for name in names},
            waiting={name: self._admission.waiting(name) for name in names},
        )
        return Response(text, headers={"content-type": CONTENT_TYPE})

    async def stats(self, request: Request) -> Response:
        """Returns the data of the live page once."""
        return JSONResponse(await self._page_data(request.state.caller))

    async def stream(self, request: Request) -> Response:
        """Streams the data of the live page as server-sent events until the server drains."""
        caller: Caller = request.state.caller

        async def updates() -> AsyncIterator[str]:
            while not self._admission.draining:
                yield f"data: {json.dumps(await self._page_data(caller))}\n\n"
                await asyncio.sleep(UPDATE_SECONDS)
            yield f"data: {json.dumps(await self._page_data(caller))}\n\n"

        return StreamingResponse(
            updates(), media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )

    async def _page_data(self, caller: Caller) -> dict[str, Any]:
        """Returns what the caller may see. Other callers' models appear only as used pool pages."""
        stats = await self._stats.latest()
        units = self._fleet.health()
        key = caller.key
        models = [
            self._model_data(model, stats["models"].get(name, {}), units)
            for name, model in self._fleet.models.items()
            if key is None or key.permits(name)
        ]
        visible = sum(model.get("kv_pages_used", 0) for model in models)
        used = sum(model.get("kv_pages_used", 0) for model in stats["models"].values())
        return {
            "time": time.time(),
            "stopping": self._admission.draining,
            "stale": stats["stale"],
            "policy": stats.get("policy"),
            "pool": {
                "pages": stats.get("usable_pages", 0),
                "bytes": stats.get("pool_bytes", 0),
                "others": used - visible,
            },
            "units": [
                {
                    "unit": unit.unit,
                    "alive": unit.alive,
                    "works": unit.works(self._stall_timeout),
                    "restarts": unit.restarts,
                }
                for unit in units
            ],
            "models": models,
        }

    def _model_data(
        self, model: ModelLike, stats: dict[str, Any], units: list[UnitHealth]
    ) -> dict[str, Any]:
        name = model.name
        unit = next((unit for unit in units if name in unit.models), None)
        return {
            "name": name,
            "status": self.model_status(name),
            "error": self._model_error(name),
            "unit": None if unit is None else unit.unit,
            "max_model_len": model.max_model_len,
            "chat": model.tokenizer is not None and model.tokenizer.chat_template is not None,
            "text": model.tokenizer is not None,
            "queue": self._admission.waiting(name),
            "slo": self._metrics.slo_counts(name),
            "latency": self._latency.percentiles(name),
            **stats,
        }


def _problem(unit: UnitHealth) -> str:
    if unit.alive:
        return f"unit {unit.unit} has executed no step for {unit.stalled_seconds:.1f} s"
    return f"unit {unit.unit} has ended: {unit.reason or 'closed'}"


def _not_ready(reason: str) -> Response:
    return JSONResponse({"status": "not ready", "reason": reason}, status_code=503)
