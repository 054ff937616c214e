"""`/models/load|unload|sleep|wake` and `/fleet/reload`: what the holder of an admin key may do.

All of it may take long, so it is done in threads of its own; a client that leaves changes nothing.
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
from typing import Any, TypeVar

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
from muxjax.serve.body import read_json
from muxjax.serve.errors import ApiError
from muxjax.serve.fleet_protocol import ManagedFleet
from muxjax.serve.find_model import find_model
from muxjax.serve.openai.requests import parse_load, parse_model
from muxjax.serve import logs

_NOT_TO_BE_HAD = (CheckpointError, DownloadError, FleetConfigError, PoolTooSmall)

Answer = TypeVar("Answer")


class ModelControl:
    """The endpoints.

    Args:
      fleet: what is served.
      fleet_file: what `/fleet/reload` reads; None if the fleet did not come from a file.
      max_body: most bytes of a request.
      reloaded: given the fleet file when it was applied.
    """

    def __init__(
        self,
        fleet: ManagedFleet,
        fleet_file: Path | None,
        max_body: int,
        reloaded: Callable[[FleetConfig], None],
    ) -> None:
        self._fleet = fleet
        self._file = fleet_file
        self._max_body = max_body
        self._reloaded = reloaded

    async def load(self, request: Request) -> Response:
        """Loads a model of the fleet file, or one that the request describes."""
        asked = parse_load(await read_json(request, self._max_body))
        key = request.state.caller.key
        if key is not None and not key.sees(asked.model):
            find_model(request.state.view, asked.model)  # the 404 of a name that was made up
        entry = asked.model if asked.entry is None else {**asked.entry, "name": asked.model}
        return await self._change(
            "load", asked.model, lambda: self._fleet.load_model(entry, asked.unit)
        )

    async def unload(self, request: Request) -> Response:
        """Drops a model when its requests have ended."""
        model = await self._named(request)
        return await self._change("unload", model, lambda: self._fleet.unload(model))

    async def sleep(self, request: Request) -> Response:
        """Puts a model to sleep when its requests have ended."""
        model = await self._named(request)
        return await self._change("sleep", model, lambda: self._fleet.sleep(model))

    async def wake(self, request: Request) -> Response:
        """Wakes a model."""
        model = await self._named(request)
        return await self._change("wake", model, lambda: self._fleet.wake(model))

    async def reload(self, request: Request) -> Response:
        """Applies the fleet file as it is now."""
        try:
            found = await self._in_thread(self.read_again)
        except MuxError as error:
            if isinstance(error, _NOT_TO_BE_HAD):
                raise ApiError(str(error), code="fleet_file") from error
            raise
        return JSONResponse(found)

    def read_again(self) -> dict[str, Any]:
        """Applies the fleet file; see `Fleet.reload`. Blocks.

        Raises:
          MuxError: the file cannot be applied, and nothing was done.
        """
        if self._file is None:
            raise WrongState("this fleet was not started from a fleet file")
        began = time.monotonic()
        try:
            config = load_fleet_config(self._file)
            found = self._fleet.reload(config)
        except MuxError as error:
            logs.event("fleet_not_reloaded", logging.WARNING, reason=str(error))
            raise
        self._reloaded(config)
        seconds = round(time.monotonic() - began, 3)
        logs.event("fleet_reloaded", seconds=seconds, changes=str(found))
        return found

    async def _named(self, request: Request) -> str:
        model = parse_model(await read_json(request, self._max_body)).model
        find_model(request.state.view, model)
        return model

    async def _change(self, what: str, model: str, action: Callable[[], None]) -> Response:
        began = time.monotonic()
        try:
            await self._in_thread(action)
        except _NOT_TO_BE_HAD as error:
            logs.event(f"model_{what}_refused", logging.WARNING, model=model, reason=str(error))
            raise ApiError(str(error), param="model", code="not_loadable") from error
        state = self._fleet.model_states().get(model)
        status = "unloaded" if state is None else state.status
        seconds = round(time.monotonic() - began, 3)
        logs.event(f"model_{what}", model=model, status=status, seconds=seconds)
        return JSONResponse({"model": model, "status": status, "seconds": seconds})

    async def _in_thread(self, action: Callable[[], Answer]) -> Answer:
        """Waits for what is done in a daemon's thread, which does not keep the process alive.

        A client that leaves ends the waiting, not the work.
        """
        done: Future[Answer] = Future()

        def run() -> None:
            try:
                done.set_result(action())
            except BaseException as error:  # noqa: BLE001  whatever it is, it is the request's
                done.set_exception(error)

        context = contextvars.copy_context()  # has the request's id, for logs
        threading.Thread(target=context.run, args=(run,), name="muxjax-admin", daemon=True).start()
        return await asyncio.shield(asyncio.wrap_future(done))
