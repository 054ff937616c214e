"""Units: a mesh and the models it serves; building, sleep and wake, reload, placement plans."""
