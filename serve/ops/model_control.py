"""Admin endpoints: `/models/load|unload|sleep|wake` and `/fleet/reload`.

A change may take long, so it runs in a separate thread. It continues if the client disconnects.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from muxjax.config.fleet_file import FleetConfig, load_fleet_config
from muxjax.errors import (
    CheckpointError,
    DownloadError,
    FleetConfigError,
    MuxError,
    PoolTooSmall,
    WrongState,
)
from muxjax.serve import logs
from muxjax.serve.body import read_json
from muxjax.serve.errors import ApiError
from muxjax.serve.find_model import find_model
from muxjax.serve.fleet_protocol import ManagedFleet
from muxjax.serve.ops.requests import parse_load, parse_model

_NOT_LOADABLE = (CheckpointError, DownloadError, FleetConfigError, PoolTooSmall)


class ModelControl:
    """The admin endpoints.

    Args:
      fleet: the fleet to change.
      fleet_file: the file that a reload applies; None if the fleet did not come from a file.
      max_body: maximum size of a request body in bytes.
      on_reload: called with the fleet file after it was applied.
    """

    def __init__(
        self,
        fleet: ManagedFleet,
        fleet_file: Path | None,
        max_body: int,
        on_reload: Callable[[FleetConfig], None],
    ) -> None:
        self._fleet = fleet
        self._fleet_file = fleet_file
        self._max_body = max_body
        self._on_reload = on_reload

    async def load(self, request: Request) -> Response:
        """Loads a model from the fleet file or from the entry in the request."""
        body = parse_load(await read_json(request, self._max_body))
        key = request.state.caller.key
        if key is not None and not key.permits(body.model):
            find_model(request.state.view, body.model)  # raises 404, as for an unknown name
        entry = body.model if body.entry is None else {**body.entry, "name": body.model}
        return await self._change(
            "load", body.model, lambda: self._fleet.admin.load(entry, body.unit)
        )

    async def unload(self, request: Request) -> Response:
        """Unloads a model after its requests have finished."""
        model = await self._read_model(request)
        return await self._change("unload", model, lambda: self._fleet.admin.unload(model))

    async def sleep(self, request: Request) -> Response:
        """Puts a model to sleep after its requests have finished."""
        model = await self._read_model(request)
        return await self._change("sleep", model, lambda: self._fleet.admin.sleep(model))

    async def wake(self, request: Request) -> Response:
        """Wakes a model."""
        model = await self._read_model(request)
        return await self._change("wake", model, lambda: self._fleet.admin.wake(model))

    async def reload(self, request: Request) -> Response:
        """Reads the fleet file and applies it to the running fleet."""
        try:
            changes = await self._run_in_thread(self.apply_fleet_file)
        except MuxError as error:
            if isinstance(error, _NOT_LOADABLE):
                raise ApiError(str(error), code="fleet_file") from error
            raise
        return JSONResponse(changes)

    def apply_fleet_file(self) -> dict[str, Any]:
        """Reads the fleet file and applies it; see `FleetAdmin.reload`. Blocks.

        Raises:
          MuxError: the file cannot be applied; nothing was changed.
        """
        if self._fleet_file is None:
            raise WrongState("this fleet was not started from a fleet file")
        started = time.monotonic()
        try:
            config = load_fleet_config(self._fleet_file)
            changes = self._fleet.admin.reload(config)
        except MuxError as error:
            logs.event("fleet_not_reloaded", logging.WARNING, reason=str(error))
            raise
        self._on_reload(config)
        seconds = round(time.monotonic() - started, 3)
        logs.event("fleet_reloaded", seconds=seconds, changes=str(changes))
        return changes

    async def _read_model(self, request: Request) -> str:
        model = parse_model(await read_json(request, self._max_body)).model
        find_model(request.state.view, model)
        return model

    async def _change(self, verb: str, model: str, action: Callable[[], None]) -> Response:
        started = time.monotonic()
        try:
            await self._run_in_thread(action)
        except _NOT_LOADABLE as error:
            logs.event(f"model_{verb}_refused", logging.WARNING, model=model, reason=str(error))
            raise ApiError(str(error), param="model", code="not_loadable") from error
        state = self._fleet.model_states().get(model)
        status = "unloaded" if state is None else state.status
        seconds = round(time.monotonic() - started, 3)
        logs.event(f"model_{verb}", model=model, status=status, seconds=seconds)
        return JSONResponse({"model": model, "status": status, "seconds": seconds})

    async def _run_in_thread[T](self, action: Callable[[], T]) -> T:
        """Runs an action in a daemon thread, which does not keep the process alive.

        Cancelling the call does not cancel the action.
        """
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(action())
            except BaseException as error:  # noqa: BLE001  raised to the caller
                done.set_exception(error)

        context = contextvars.copy_context()  # has the request id, for logs
        threading.Thread(target=context.run, args=(run,), name="muxjax-admin", daemon=True).start()
        return await asyncio.shield(asyncio.wrap_future(done))
