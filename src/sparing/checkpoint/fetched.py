"""Real models that tools/real_models.py has fetched: files of known names in one folder."""

import os
from pathlib import Path

__all__ = ["FETCHED", "fetched_file"]

FETCHED = ("smollm2", "gemma3-270m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b")


def fetched_file(name: str) -> Path:
    """Where the file of one of `FETCHED` is, or would be: below $SPARING_MODELS, else the user's cache folder."""
    folder = os.environ.get("SPARING_MODELS")
    if not folder:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(cache) / "sparing" / "models"
    return Path(folder).expanduser() / f"{name}.gguf"
