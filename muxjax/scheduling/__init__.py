"""Scheduling on the host: requests, KV cache, quotas, policies, and the executor interface.

Nothing here imports JAX, so the same code runs in the engine, in the simulator and in tests. One
thread owns a `Scheduler`; no class here is thread-safe.
"""
