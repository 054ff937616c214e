"""Scheduling policies: which model and phase runs next."""
