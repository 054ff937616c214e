"""Tile sizes measured on GPUs; written by `python benchmarks/tune_attention.py --write`."""

from __future__ import annotations

TUNED: dict[tuple[str, int, int, bool], tuple[int, int, int, int]] = {}
"""(device kind, KV heads, padded head size, decode) -> (warpgroups, tokens, stages, waves) of
`tiles.Tiles`, for 16-bit pools. Empty: no device has been tuned yet."""
