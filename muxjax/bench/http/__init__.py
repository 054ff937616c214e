"""Benchmarks of OpenAI-compatible servers over HTTP."""
