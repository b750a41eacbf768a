"""GGUF files: one file that holds settings, tokenizer and weights."""
