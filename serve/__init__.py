"""HTTP server with OpenAI's API for a fleet of models."""
