"""The engine of a unit, and the way of a request: input processor, router, engine, stream."""
