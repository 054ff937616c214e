"""Placement of models on devices: cost models, workloads, planner and simulator. Imports no JAX."""
