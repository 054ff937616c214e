"""Compiles the steps of a fleet for devices that are not present."""
