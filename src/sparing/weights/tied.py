"""Tensors that a file holds twice: whether a head beside an embedding, or another copy, is the same table."""

from sparing.checkpoint.tensors import TensorSource
from sparing.config.formats import BLOCKS
from sparing.config.names import names_in_file, stored_head
from sparing.config.protocol import HasCopies, ModelConfig
from sparing.errors import CheckpointError
from sparing.weights.packed_files import PackedTensors

__all__ = ["refuse_other_copies", "settle_head"]

PIECE = 1 << 20  # numbers that are compared at once


def settle_head(config: ModelConfig, tensors: TensorSource) -> ModelConfig:
    """The config as the file has it: without the tie where the file holds a head that differs from the embedding.

    Equal copies stay one table, as does a table that is stored once, under either name. Reads no more of the two than
    up to their first difference. Raises CheckpointError where the model cannot have a head of its own.
    Source: transformers 5.23 `tie_weights`.
    """
    head = stored_head(tensors.names())
    if head is None or not any(role.is_tied for _, role in config.tensors().values()):
        return config
    found = names_in_file(config, tensors.names())
    table = next((name for name, expected in found.items() if expected.role.is_tied), None)
    if table is None or table == head or table not in tensors.names() or _is_same(tensors, table, head):
        return config
    return config.untied(tensors.file(head).name)


def refuse_other_copies(config: ModelConfig, tensors: TensorSource) -> None:
    """Raises CheckpointError for a tensor that is stored twice, as parts of two networks that are one, and differs."""
    if not isinstance(config, HasCopies):
        return
    present = set(tensors.names())
    for name in present:
        original = config.copy_of(name)
        if original in present and not _is_same(tensors, original, name):
            raise CheckpointError(
                f"{tensors.file(name).name}: {name} differs from {original}: a model of two sets of weights is not"
                " supported"
            )


def _is_same(tensors: TensorSource, one: str, other: str) -> bool:
    if tensors.shape(one) != tensors.shape(other):
        return False
    if isinstance(tensors, PackedTensors) and tensors.format(one) != tensors.format(other):
        return False  # codes of the same table have rounded it
    # Of blocks the bytes are compared: no program that writes two copies of a table quantises it in two ways.
    are_blocks = isinstance(tensors, PackedTensors) and tensors.format(one) in BLOCKS
    a, b = ((tensors.rows(name) if are_blocks else tensors.read(name)).flatten() for name in (one, other))
    same = all((x == y).all() for x, y in zip(a.split(PIECE), b.split(PIECE), strict=True))
    for name in (one, other):
        tensors.release(name)
    return same
