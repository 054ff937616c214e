"""KV cache: slabs and block allocation, quotas, admission, preemption and the prefix cache."""
