"""Offloads the weights of a sleeping model to host memory, and restores them.

A model has one copy of its weights at any time. On a CPU, device memory is host memory: the weights
stay in place, and sleep releases only the model's part of the pool and its slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax


def offload_memory_kind(device: jax.Device) -> str | None:
    """Returns the kind of host memory for offloaded weights; None if they stay on the device.

    The device copies pinned pages by DMA, at the full speed of its link.
    """
    if device.platform == "cpu":
        return None
    kinds = {memory.kind for memory in device.addressable_memories()}
    return "pinned_host" if "pinned_host" in kinds else None


def offload(leaves: Sequence[jax.Array], kind: str | None) -> tuple[jax.Array, ...]:
    """Moves arrays to a kind of host memory and frees their device memory.

    Args:
      leaves: on the devices.
      kind: from `offload_memory_kind`; None leaves the arrays in place.

    Raises:
      JaxRuntimeError: the host has too little memory; the arrays are unchanged.
    """
    if kind is None:
        return tuple(leaves)
    return _move_all(
        leaves, lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))
    )


def restore(
    leaves: Sequence[jax.Array], copy_to_device: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, ...]:
    """Moves arrays to the devices and frees their host memory.

    Args:
      leaves: from `offload`.
      copy_to_device: copies one array to the devices, in the layout that the programs expect.

    Raises:
      JaxRuntimeError: the devices have too little memory; the arrays are unchanged.
    """
    if all(leaf.sharding.memory_kind == "device" for leaf in leaves):
        return tuple(leaves)
    return _move_all(leaves, copy_to_device)


def delete(leaves: Sequence[jax.Array]) -> None:
    """Frees the memory of arrays on host or device; skips those that are already deleted."""
    for leaf in leaves:
        if not leaf.is_deleted():
            leaf.delete()


def _move_all(
    leaves: Sequence[jax.Array], move: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, ...]:
    """Moves all arrays or none: a failure deletes the new arrays and keeps the old ones."""
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
