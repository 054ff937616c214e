"""The errors that MuxJAX raises."""

from __future__ import annotations

from collections.abc import Callable


class MuxError(Exception):
    """Base class of the errors that MuxJAX raises."""


class InvalidRequest(MuxError, ValueError):
    """A request that is not valid; `field` names the invalid argument."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class UnknownModel(InvalidRequest):
    """A request for a model that is not in the fleet."""


class FleetConfigError(MuxError, ValueError):
    """A fleet file that is not valid; the message names the key's path in the file."""


class CheckpointError(MuxError):
    """A checkpoint that cannot be loaded: unknown architecture, missing tensor, wrong shape."""


class DownloadError(MuxError):
    """A file that could not be downloaded, or that does not match its checksum or size."""


class PoolTooSmall(MuxError):
    """A pool or quota that cannot hold even one request of a model's full length."""


class InsufficientMemory(MuxError):
    """Models, with their pool, that need more memory than is free; the message says how much."""


class Overloaded(MuxError):
    """A request that was refused because it would not be served in time.

    Attributes:
      retry_after: seconds after which a retry may succeed.
    """

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Callable[[str, float], Overloaded], tuple[str, float]]:
        return _overloaded, (str(self), self.retry_after)


def _overloaded(message: str, retry_after: float) -> Overloaded:
    return Overloaded(message, retry_after=retry_after)


class EngineDead(MuxError):
    """The engine has ended, by `close()` or by an error that the message names."""


class ModelUnavailable(MuxError):
    """A model that accepts no requests: it failed to load or wake, or is being unloaded."""


class WrongState(MuxError):
    """An operation that the state of a model does not allow, such as sleep of a pinned model."""


class TimedOut(MuxError):
    """A request that was ended because it exceeded a time limit."""


class WorkloadError(MuxError, ValueError):
    """A trace or workload that is not valid; the message says where and how to correct it."""


class ProfileError(MuxError, ValueError):
    """A profile of step times that is not valid; the message says where."""


class PlanError(MuxError, ValueError):
    """A fleet that cannot be placed on a cluster, or a plan that is not valid."""


class ClusterError(MuxError):
    """Processes or machines of a cluster that are missing, incompatible or lost."""


class BenchError(MuxError, ValueError):
    """A benchmark that cannot run; the message says why and how to correct it."""


class KeyFileError(MuxError, ValueError):
    """A file of API keys that is not valid; the message has one line per problem."""
