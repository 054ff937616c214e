"""Which model gets what: expected needs, cost models, plans. Imports no JAX."""
