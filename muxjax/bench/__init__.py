"""Measuring: steps, policies on the real engine, servers over HTTP, and reports of saved runs."""
