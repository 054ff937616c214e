"""Endpoints of OpenAI's API, and tokenization endpoints as in vLLM."""
