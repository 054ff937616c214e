"""Flax model definitions, checkpoint loading and tokenizers."""
