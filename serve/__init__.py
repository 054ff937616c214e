"""HTTP in OpenAI's schema over a fleet of models."""
