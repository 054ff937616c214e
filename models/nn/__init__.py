"""Decoder layers, parameters, sharding and weight formats."""
