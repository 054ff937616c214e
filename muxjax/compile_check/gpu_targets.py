"""Descriptions of GPUs that are not present, for XLA (`GpuTargetConfigProto`).

Sources: NVIDIA's data sheets of the H100 SXM5 and H200, and the table of compute capability 9.0 in
the CUDA C++ Programming Guide. Both have the same chip and different memory.
"""

from __future__ import annotations


def _hopper(name: str, memory_bytes: int, bytes_per_second: int) -> str:
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: {bytes_per_second}
  device_memory_size: {memory_bytes}
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


GPU_TARGETS: dict[str, str] = {
    "h100": _hopper("NVIDIA H100 80GB HBM3", 80 * 10**9, 3_350 * 10**9),
    "h200": _hopper("NVIDIA H200", 141 * 10**9, 4_800 * 10**9),
}
"""Descriptions by the names for `muxjax compile-check --target`."""
