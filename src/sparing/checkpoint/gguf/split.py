"""A model that is split among several GGUF files: what llama.cpp's gguf-split writes, read as one.

Pieces are called NAME-00001-of-00003.gguf and so on. Each says how many there are (`split.count`), which it is
(`split.no`, from 0), and how many tensors all have (`split.tensors.count`); the first has the metadata of the model.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparing.checkpoint.gguf.header import StoredTensor, read_header
from sparing.checkpoint.tensors import MappedFile
from sparing.errors import CheckpointError, shown

__all__ = ["piece_names", "read_model", "whole_models"]

PIECE = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def piece_names(name: str) -> list[str]:
    """The names of all pieces of the model that a file is named as a piece of; its own where it is named as a whole."""
    match = PIECE.fullmatch(name)
    return [f"{match[1]}-{i + 1:05}-of-{match[3]}.gguf" for i in range(int(match[3]))] if match else [name]


def whole_models(names: Sequence[str]) -> list[list[str]]:
    """File names by the model they belong to, each with all of its pieces, also those that are not among them.

    Files that go with a model and are none, as the projectors of its images, are left out.
    """
    models = {tuple(piece_names(name)): None for name in names if not name.rpartition("/")[2].startswith("mmproj")}
    return [list(pieces) for pieces in models]


def read_model(path: Path) -> tuple[Path, dict[str, Any], list[StoredTensor]]:
    """(its file, or the first of its pieces; metadata; tensors) of a model, one of whose files is named.

    Raises CheckpointError as `read_header`, and for pieces that are missing or do not belong together.
    """
    names = piece_names(path.name)
    metadata, stored = read_header(MappedFile(path))
    count = metadata.get("split.count", 1)
    if count in (0, 1):
        return path, metadata, stored
    if len(names) != count:
        raise CheckpointError(
            f"{path}: is one of {shown(count)} pieces and not named as one, NAME-00001-of-{count:05}.gguf; "
            "give it the name that it was downloaded under"
            if type(count) is int
            else f"{path}: split.count is {shown(count)}, expected a number"
        )
    found = {path.name: (metadata, stored)}
    for name in names:
        piece = path.with_name(name)
        if name not in found and not piece.exists():
            raise CheckpointError(f"{piece}: is missing, one of the {count} pieces of {path.name}; download it too")
        if name not in found:
            found[name] = read_header(MappedFile(piece))
        own = found[name][0]
        if (own.get("split.no"), own.get("split.count")) != (names.index(name), count):
            raise CheckpointError(
                f"{piece}: says that it is piece {shown(own.get('split.no'))} (from 0) of "
                f"{shown(own.get('split.count'))}, and its name that it is another; download the pieces again"
            )
    tensors = [tensor for name in names for tensor in found[name][1]]
    first = found[names[0]][0]
    if (said := first.get("split.tensors.count", len(tensors))) != len(tensors):
        raise CheckpointError(
            f"{path.with_name(names[0])}: its pieces hold {len(tensors)} tensors and not {shown(said)}; "
            "download them again"
        )
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise CheckpointError(f"{path.with_name(names[0])}: a tensor is in two of its pieces; download them again")
    return path.with_name(names[0]), first, tensors
