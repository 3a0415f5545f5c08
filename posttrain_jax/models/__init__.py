"""The one transformer, and its ways in and out: Hugging Face, GGUF, PEFT."""
