"""Checkpoint formats: Hugging Face safetensors, GGUF, Orbax and llama2.c."""
