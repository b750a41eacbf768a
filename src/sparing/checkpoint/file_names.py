"""What the files of a folder are called."""

__all__ = ["OTHER_VOCABULARIES"]

# what a folder may hold instead of tokenizer.json
OTHER_VOCABULARIES = ("vocab.json", "tekken.json", "tokenizer.model", "*.tiktoken", "tiktoken.model", "spiece.model")
