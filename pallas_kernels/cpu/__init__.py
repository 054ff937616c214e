"""Matrix products and paged attention for CPUs in C++, called through the XLA FFI."""
