"""Models on disk: Hugging Face, GGUF, PEFT, tokenizers, our own workdirs."""
