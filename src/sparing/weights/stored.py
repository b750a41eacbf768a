"""The weights of a checkpoint as a model takes them: packed ones under one name, others' formats refused by theirs."""

from __future__ import annotations

from sparing.checkpoint.folder import Checkpoint
from sparing.checkpoint.renamed import JoinedGates, Renamed
from sparing.checkpoint.tensors import TensorSource
from sparing.checkpoint.zeros import WithZeros, absent_output_biases
from sparing.config.deepseek_v4_names import canonical_name
from sparing.weights.foreign import check_agreement, refuse_foreign, refuse_method
from sparing.weights.packed_files import find_packed

__all__ = ["stored_weights"]

RENAMED = {"deepseek_v4": canonical_name}  # model_type -> what a name of any dialect is called here


def stored_weights(checkpoint: Checkpoint) -> TensorSource:
    """The tensors of a checkpoint; nothing of them is read yet.

    Raises CheckpointError where there are none, where a file is damaged, and for formats that are not read.
    """
    where = str(checkpoint.path / "config.json")
    refuse_method(checkpoint.config, where)
    refuse_foreign(checkpoint.files)
    files: TensorSource = checkpoint.files
    if (name_of := RENAMED.get(checkpoint.config.get("model_type", ""))) is not None:
        files = Renamed(files, name_of)
    if zeros := absent_output_biases(checkpoint.config, files):
        files = WithZeros(files, zeros)
    tensors = find_packed(JoinedGates(files), checkpoint.has_blocks)
    check_agreement(checkpoint.config, tensors, where)
    return tensors
