"""The engine of a unit, and the path of a request: input processor, router, engine, stream."""
