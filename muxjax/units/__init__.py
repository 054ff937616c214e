"""Units, each a mesh and its models: building, sleep and wake, reload, placement plans."""
