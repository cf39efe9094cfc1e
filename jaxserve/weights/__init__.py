"""Checkpoint formats in and out: GGUF, safetensors, orbax, and the model hub."""
