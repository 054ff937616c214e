"""The fleet file and the settings of the server. Imports no JAX."""
