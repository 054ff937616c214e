"""The loop of a unit, and the path of a request: router, supervisor, detokenizer, stream."""
