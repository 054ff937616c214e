"""Helpers for tests: an executor whose tokens can be computed by hand."""
