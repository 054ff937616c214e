"""Endpoints in the schema of OpenAI's API."""
