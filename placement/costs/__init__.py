"""Cost models: devices, clusters, model shapes, rooflines and measured profiles."""
