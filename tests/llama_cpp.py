"""Where tools/llama_cpp_data.py puts the vocabularies and chat templates of llama.cpp's own tests."""

from pathlib import Path

import pytest
from tools.llama_cpp_data import FOLDER

__all__ = ["template_files", "vocabulary_files"]

ABSENT = f"no {FOLDER.name} here; run tools/llama_cpp_data.py"


def vocabulary_files() -> list:
    """Every ggml-vocab-*.gguf as a parameter of a test; where there are none, one that is skipped."""
    return _parameters("ggml-vocab-*.gguf")


def template_files() -> list:
    """Every chat template as a parameter of a test; where there are none, one that is skipped."""
    return _parameters("templates/*.jinja")


def _parameters(pattern: str) -> list:
    found = sorted(FOLDER.glob(pattern))
    if not found:
        return [pytest.param(Path(), id="absent", marks=pytest.mark.skip(reason=ABSENT))]
    return [pytest.param(file, id=file.stem.removeprefix("ggml-vocab-")) for file in found]
