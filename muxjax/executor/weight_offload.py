"""Where the weights of a sleeping model lie: in the host's memory, if the device has its own.

One copy is kept. On a CPU the device's memory is the host's: the weights stay where they are, and
sleeping gives back the model's part of the pool and its slots, but no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax


def host_memory(device: jax.Device) -> str | None:
    """The kind of memory that sleeping weights lie in; None where they stay on the device.

    Pinned pages are copied by the device itself, at the full speed of its link.
    """
    if device.platform == "cpu":
        return None
    kinds = {memory.kind for memory in device.addressable_memories()}
    return "pinned_host" if "pinned_host" in kinds else None


def offload(leaves: Sequence[jax.Array], kind: str | None) -> tuple[jax.Array, ...]:
    """Moves arrays to a kind of the host's memory, and frees the device's.

    If it fails, the arrays are as they were.
    """
    if kind is None:
        return tuple(leaves)
    return _moved(leaves, lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind(kind)))


def restore(
    leaves: Sequence[jax.Array], place: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, ...]:
    """Moves arrays to the devices, and frees the host's copy.

    If it fails, for want of memory say, the arrays are as they were.

    Args:
      leaves: as `offload` gave them.
      place: copies one to where the programs want it.
    """
    if all(leaf.sharding.memory_kind == "device" for leaf in leaves):
        return tuple(leaves)
    return _moved(leaves, place)


def delete(leaves: Sequence[jax.Array]) -> None:
    """Frees the memory of arrays, wherever they lie; those that are freed are passed over."""
    for leaf in leaves:
        if not leaf.is_deleted():
            leaf.delete()


def _moved(
    leaves: Sequence[jax.Array], move: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, ...]:
    moved: list[jax.Array] = []
    try:
        for leaf in leaves:
            moved.append(move(leaf))
        jax.block_until_ready(moved)
    except BaseException:
        delete(moved)
        raise
    delete(leaves)
    return tuple(moved)
