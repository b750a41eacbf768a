"""The weights of a checkpoint as a model takes them: packed ones under one name, others' formats refused by theirs."""

from __future__ import annotations

from sparing.checkpoint.folder import Checkpoint
from sparing.checkpoint.tensors import TensorSource
from sparing.checkpoint.zeros import WithZeros, absent_output_biases
from sparing.weights.foreign import check_agreement, refuse_foreign, refuse_method
from sparing.weights.packed_files import find_packed

__all__ = ["stored_weights"]


def stored_weights(checkpoint: Checkpoint) -> TensorSource:
    """The tensors of a checkpoint; nothing of them is read yet.

    Raises CheckpointError where there are none, where a file is damaged, and for formats that are not read.
    """
    where = str(checkpoint.path / "config.json")
    refuse_method(checkpoint.config, where)
    refuse_foreign(checkpoint.files)
    zeros = absent_output_biases(checkpoint.config, checkpoint.files)
    tensors = find_packed(WithZeros(checkpoint.files, zeros) if zeros else checkpoint.files)
    check_agreement(checkpoint.config, tensors, where)
    return tensors
