"""The one exception class of the library that is not a built-in."""

__all__ = ["CheckpointError"]


class CheckpointError(ValueError):
    """A file of a checkpoint is missing, damaged, contradictory or not supported.

    The message names the file, the tensor or key, the value found and the way out.
    """
