"""Compiled steps on the device: the JAX executor, its programs and its step functions."""
