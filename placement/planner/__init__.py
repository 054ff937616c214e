"""The planner: from expected loads and a cluster to a placement plan."""
