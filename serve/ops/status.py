"""What the server says about itself: health, model states, counters for the live page."""

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
from muxjax.serve.access.middleware import Caller
from muxjax.serve.fleet_protocol import ManagedFleet, ModelLike
from muxjax.serve.find_model import find_model
from muxjax.serve.ops.metrics import CONTENT_TYPE, PrometheusMetrics
from muxjax.serve.ops.rolling_latency import RollingLatency
from muxjax.serve.ops.stats_cache import StatsCache
from muxjax.serve.ops.watchdog import Watchdog

UPDATE_SECONDS = 0.5
"""Between two updates of the live page."""


class Status:
    """Answers questions about the server.

    Args:
      fleet: what is served.
      admission: what waits, and whether the server stops.
      metrics: what was counted.
      recent: how quick models were.
      watchdog: which units are lost.
    """

    def __init__(
        self,
        fleet: ManagedFleet,
        admission: Admission,
        metrics: PrometheusMetrics,
        recent: RollingLatency,
        watchdog: Watchdog,
    ) -> None:
        self._fleet = fleet
        self._admission = admission
        self._metrics = metrics
        self._recent = recent
        self._watchdog = watchdog
        self._snapshots = StatsCache(fleet.stats)
        self._stall_timeout = admission.config.stall_timeout
        self._started = time.time()

    # Models

    def describe(self, model: ModelLike) -> dict[str, Any]:
        """A model in OpenAI's form, with what vLLM and MuxJAX add."""
        unit = self._unit_of(model.name)
        return {
            "id": model.name,
            "object": "model",
            "created": int(self._started),
            "owned_by": "muxjax",
            "max_model_len": model.max_model_len,
            "status": self.model_status(model.name),
            "error": self._error(model.name),
            "unit": None if unit is None else unit.unit,
        }

    def model_status(self, name: str) -> ModelStatus:
        """The state of a model."""
        unit, state = self._unit_of(name), self._fleet.model_states().get(name)
        if unit is None:
            return "failed"
        if not unit.alive:
            # Between its end and its restart a unit is on its way back.
            return "failed" if self._watchdog.lost(unit.unit) or unit.reason is None else "loading"
        return "loaded" if state is None else state.status

    def statuses(self) -> dict[str, ModelStatus]:
        """The states of all models, by name."""
        return {name: self.model_status(name) for name in self._fleet.models}

    def _error(self, model: str) -> str | None:
        state: ModelHealth | None = self._fleet.model_states().get(model)
        return None if state is None else state.error

    def _unit_of(self, model: str) -> UnitHealth | None:
        return next((unit for unit in self._fleet.health() if model in unit.models), None)

    # Health

    async def health(self) -> Response:
        """200 unless a unit has ended. One that is restarted works again a second later."""
        ended = [unit for unit in self._fleet.health() if not unit.alive]
        if ended:
            reason = ended[0].reason or "the engine is closed"
            return JSONResponse({"status": "dead", "reason": reason}, status_code=503)
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """200 when requests are welcome and every unit works."""
        if self._admission.draining:
            return _not_ready("the server is stopping")
        for unit in self._fleet.health():
            if not unit.works(self._stall_timeout):
                return _not_ready(_why(unit))
        return JSONResponse({"status": "ready"})

    async def model_health(self, request: Request, name: str) -> Response:
        """200 when a model answers."""
        find_model(request.state.view, name)
        unit = self._unit_of(name)
        if unit is None or not unit.works(self._stall_timeout):
            return _not_ready("no unit has the model" if unit is None else _why(unit))
        if error := self._error(name):
            return _not_ready(f"{name} has failed: {error}")
        return JSONResponse({"status": self.model_status(name), "unit": unit.unit})

    # Counters

    async def metrics(self) -> Response:
        """Prometheus' text."""
        stats = await self._snapshots.latest()
        text = self._metrics.text(stats, self._fleet.health(), self._admission, self.statuses())
        return Response(text, headers={"content-type": CONTENT_TYPE})

    async def stats(self, request: Request) -> Response:
        """The live page's data, once."""
        return JSONResponse(await self._for(request.state.caller))

    async def stream(self, request: Request) -> Response:
        """The live page's data as server-sent events, until the server stops."""
        caller: Caller = request.state.caller

        async def updates() -> AsyncIterator[str]:
            while not self._admission.draining:
                yield f"data: {json.dumps(await self._for(caller))}\n\n"
                await asyncio.sleep(UPDATE_SECONDS)
            yield f"data: {json.dumps(await self._for(caller))}\n\n"

        return StreamingResponse(
            updates(), media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )

    async def _for(self, caller: Caller) -> dict[str, Any]:
        """What one caller may see: of other models only that they take room."""
        stats = await self._snapshots.latest()
        units = self._fleet.health()
        key = caller.key
        models = []
        for name, model in self._fleet.models.items():
            found = stats["models"].get(name, {})
            unit = next((unit for unit in units if name in unit.models), None)
            if key is None or key.sees(name):
                models.append(
                    {
                        "name": name,
                        "status": self.model_status(name),
                        "error": self._error(name),
                        "unit": None if unit is None else unit.unit,
                        "max_model_len": model.max_model_len,
                        "chat": getattr(model.tokenizer, "chat_template", None) is not None,
                        "text": model.tokenizer is not None,
                        "queue": self._admission.waiting(name),
                        "slo": self._metrics.slo_counts(name),
                        "latency": self._recent.latency(name),
                        **found,
                    }
                )
        shown = sum(model.get("kv_pages_used", 0) for model in models)
        used = sum(found.get("kv_pages_used", 0) for found in stats["models"].values())
        return {
            "time": time.time(),
            "stopping": self._admission.draining,
            "stale": stats["stale"],
            "policy": stats.get("policy"),
            "pool": {
                "pages": stats.get("usable_pages", 0),
                "bytes": stats.get("pool_bytes", 0),
                "others": used - shown,
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


def _why(unit: UnitHealth) -> str:
    if unit.alive:
        return f"unit {unit.unit} has made no step for {unit.stalled_seconds:.1f} s"
    return f"unit {unit.unit} has ended: {unit.reason or 'closed'}"


def _not_ready(reason: str) -> Response:
    return JSONResponse({"status": "not ready", "reason": reason}, status_code=503)
