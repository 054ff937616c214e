"""The shared KV pool: slabs, block allocation, quotas, preemption and the prefix cache."""
