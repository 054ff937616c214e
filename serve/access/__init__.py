"""Access: API keys, rate limits, admission and the request middleware."""
