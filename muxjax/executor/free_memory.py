"""Free memory of the host, within the limits of its containers and of `ulimit`. Imports no JAX."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 60
"""Bytes from which a limit of a control group means "no limit"."""


@dataclass(frozen=True)
class FreeMemory:
    """Memory that can still be allocated.

    Attributes:
      num_bytes: of it.
      place: what limits it, such as "on this machine".
    """

    num_bytes: int
    place: str


def host_free_memory(
    proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> FreeMemory | None:
    """Returns the free memory of this process on its host: the smallest of all limits.

    Args:
      proc: the proc file system.
      cgroups: where the control groups are mounted.

    Returns:
      None where the system does not report it (only Linux does).
    """
    found = [*_machine(proc), *_containers(proc, cgroups), *_process_limits(proc)]
    return min(found, key=lambda free: free.num_bytes, default=None)


def _machine(proc: Path) -> Iterator[FreeMemory]:
    available = _kilobyte_fields(proc / "meminfo").get("MemAvailable")
    if available is not None:
        yield FreeMemory(available, "on this machine")


def _containers(proc: Path, cgroups: Path) -> Iterator[FreeMemory]:
    """Yields what each memory limit leaves, from the process's control group up to the root."""
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = cgroups, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            mount, names = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # In a container the path can be the host's, of which only the root is mounted.
        group = mount / path.strip("/")
        for folder in [group, *group.parents]:
            if not folder.is_relative_to(mount):
                break
            limit, used = (_number(_read(folder / name)) for name in names)
            if limit is not None and used is not None and limit < _UNLIMITED:
                left = limit - used + _reclaimable(folder)
                yield FreeMemory(max(0, left), "within the container's memory limit")


def _reclaimable(folder: Path) -> int:
    """Bytes of cached files, which count as used and are dropped when memory is short."""
    fields = dict(
        line.split()[:2] for line in _read(folder / "memory.stat").splitlines() if " " in line
    )
    names = ("total_inactive_file", "total_active_file")
    if names[0] not in fields:
        names = ("inactive_file", "active_file")
    return sum(_number(fields.get(name, "")) or 0 for name in names)


def _process_limits(proc: Path) -> Iterator[FreeMemory]:
    used = _kilobyte_fields(proc / "self" / "status")
    for limit, field, option in (
        (resource.RLIMIT_AS, "VmSize", "-v"),
        (resource.RLIMIT_DATA, "VmData", "-d"),
    ):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY and field in used:
            yield FreeMemory(max(0, soft - used[field]), f"within the limit of `ulimit {option}`")


def _kilobyte_fields(path: Path) -> dict[str, int]:
    """Returns the fields of a file such as /proc/meminfo, in bytes."""
    fields = {}
    for line in _read(path).splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            fields[name] = 1024 * int(value.removesuffix(" kB"))
    return fields


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isdecimal() else None
