"""Saved results, and their tables and plots."""
