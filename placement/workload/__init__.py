"""Workloads: arrivals, lengths and traces of requests."""
