"""The fleet file's `server:` section: how `muxjax serve` treats requests. Imports no JAX."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from muxjax.config.memory_size import Memory

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]


class ServerConfig(BaseModel):
    """Limits and time-outs of the HTTP server. The defaults suit a server of a few users."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    max_body: Memory = Field(
        default=4 * 2**20, description="Bytes of a request's body; larger ones get 413."
    )
    max_queue: Annotated[int, Field(ge=1)] = Field(
        default=256,
        description="Most outputs of a model that may wait for their first token; further ones get "
        "429.",
    )
    queue_timeout: Seconds | None = Field(
        default=None,
        description="Most seconds to the first token; then the request ends with 504. By default "
        "no limit but request_timeout.",
    )
    request_timeout: Seconds = Field(
        default=600.0, description="Most seconds of a request; then it ends with 504."
    )
    body_timeout: Seconds = Field(
        default=30.0, description="Most seconds that a request's body may take to arrive; then 408."
    )
    drain_timeout: Seconds = Field(
        default=30.0,
        description="Seconds that running requests have to end after SIGTERM; then they are cut.",
    )
    stall_timeout: Seconds = Field(
        default=60.0,
        description="Seconds without a step, while there is work, after which a unit counts as "
        "stalled and is restarted. More than its longest step takes.",
    )
    restarts: Annotated[int, Field(ge=0)] = Field(
        default=3,
        description="Most restarts of a unit in ten minutes; one that ends once more stays ended.",
    )
    cors_origins: Texts = Field(
        default=(),
        description="Origins (https://example.com) whose pages may call the server from a browser; "
        "by default none but the server's own.",
    )
    allowed_hosts: Texts = Field(
        default=(),
        description="Host names, besides localhost and addresses, that a server without keys on a "
        "loopback address answers to; for a proxy in front of it.",
    )
