"""The pure host part of a unit: requests, page allocator, quotas, policies, and the executor seam.

Nothing here imports JAX, so the same code runs in the engine, in the simulator and in tests. One
thread owns a `Unit`; no class here locks anything.
"""
