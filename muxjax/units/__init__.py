"""Units: a mesh and the models it serves. Building, sleep and wake, reload, placement plans."""
