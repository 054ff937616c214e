"""The `server:` section of the fleet file: limits of `muxjax serve`. Imports no JAX."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from muxjax.config.memory_size import Memory

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]


class ServerConfig(BaseModel):
    """Limits and timeouts of the HTTP server. The defaults are for a server with few users."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    max_body: Memory = Field(
        default=4 * 2**20, description="Maximum size of a request body; larger ones get 413."
    )
    max_queue: Annotated[int, Field(ge=1)] = Field(
        default=256,
        description="Maximum number of outputs of a model that wait for their first token; "
        "further requests get 429.",
    )
    queue_timeout: Seconds | None = Field(
        default=None,
        description="Maximum time to first token in seconds; then the request ends with 504. By "
        "default only request_timeout applies.",
    )
    request_timeout: Seconds = Field(
        default=600.0,
        description="Maximum duration of a request in seconds; then it ends with 504.",
    )
    body_timeout: Seconds = Field(
        default=30.0,
        description="Maximum time in seconds for a request body to arrive; then 408.",
    )
    drain_timeout: Seconds = Field(
        default=30.0,
        description="Time in seconds for running requests to finish after SIGTERM; then they are "
        "aborted.",
    )
    stall_timeout: Seconds = Field(
        default=60.0,
        description="Time in seconds without a step, while there is work, after which a unit is "
        "restarted. It must be longer than the longest step.",
    )
    restarts: Annotated[int, Field(ge=0)] = Field(
        default=3,
        description="Maximum number of restarts of a unit within ten minutes; after that it is "
        "not restarted.",
    )
    cors_origins: Texts = Field(
        default=(),
        description="Origins (https://example.com) whose pages may call the server from a "
        "browser, in addition to the server's own.",
    )
    allowed_hosts: Texts = Field(
        default=(),
        description="Host names, in addition to localhost and IP addresses, that a server without "
        "API keys on a loopback address accepts; for a proxy in front of it.",
    )
