"""The one exception class of the library that is not a built-in, and how messages show what a file holds."""

from typing import Any

__all__ = ["CheckpointError", "shown"]

LONGEST = 100  # characters of a value in a message


class CheckpointError(ValueError):
    """A file of a checkpoint is missing, damaged, contradictory or not supported.

    The message names the file, the tensor or key, the value found and the way out.
    """


def shown(value: Any) -> str:
    """A value that a file holds as one short line of a message: long texts, lists and numbers are cut."""
    try:
        text = repr(value[: LONGEST + 1] if isinstance(value, str | list | tuple) else value)
    except (ValueError, RecursionError):  # Python writes no integer of thousands of digits, and no endless nesting
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
