"""The simulator: the production scheduler on a simulated clock."""
