"""Every error that MuxJAX raises on purpose."""

from __future__ import annotations

from collections.abc import Callable


class MuxError(Exception):
    """The base of all errors that MuxJAX raises on purpose."""


class InvalidRequest(MuxError, ValueError):
    """A request that cannot be served as asked; `field` names the argument at fault."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class UnknownModel(InvalidRequest):
    """A request for a model that the fleet does not hold."""


class FleetConfigError(MuxError, ValueError):
    """A fleet file that is not valid; the message names the key's path in the file."""


class CheckpointError(MuxError):
    """A checkpoint that cannot be loaded: unknown architecture, missing or misshapen tensor, ..."""


class DownloadError(MuxError):
    """A file that could not be fetched, or that is not what was asked for."""


class PoolTooSmall(MuxError):
    """A pool or quota that cannot hold even one request of a model's full length."""


class Overloaded(MuxError):
    """A request that was refused because it could not be served in time.

    Attributes:
      retry_after: seconds after which it might be.
    """

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Callable[[str, float], Overloaded], tuple[str, float]]:
        return _overloaded, (str(self), self.retry_after)


def _overloaded(message: str, retry_after: float) -> Overloaded:
    return Overloaded(message, retry_after=retry_after)


class EngineDead(MuxError):
    """The engine's loop has ended, by `close()` or by an error that the message names."""


class ModelUnavailable(MuxError):
    """A model that takes no requests: it could not be loaded or woken, or it is being unloaded."""


class WrongState(MuxError):
    """What a model is not in the state for, such as sleep for one that is pinned."""


class TimedOut(MuxError):
    """A request took longer than it may, and was ended."""


class WorkloadError(MuxError, ValueError):
    """A trace or workload that cannot be used: what is wrong, where, and what to do."""


class ProfileError(MuxError, ValueError):
    """A profile of step times that cannot be used; the message says where it is at fault."""


class PlanError(MuxError, ValueError):
    """A fleet that cannot be placed on a cluster, or a plan that is not valid."""


class ClusterError(MuxError):
    """Other processes or machines that are missing, do not fit, or have gone."""


class BenchError(MuxError, ValueError):
    """A benchmark that cannot be run as asked: what was asked, what was found, what to do."""


class KeyFileError(MuxError, ValueError):
    """A file of API keys that is not valid; the message has a line for each fault."""
