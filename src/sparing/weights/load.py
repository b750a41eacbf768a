"""Copying a checkpoint into a model: tensor by tensor, in pieces, never two copies alive."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from sparing.checkpoint.tensors import TensorSource
from sparing.config.formats import BLOCKS, format_loaded, stays_packed
from sparing.config.names import Expected
from sparing.config.roles import Role
from sparing.errors import CheckpointError
from sparing.weights.finite import check_finite, copy_checked
from sparing.weights.packed_files import PackedTensors, check_codes

if TYPE_CHECKING:
    import torch

    from sparing.kernels.huge_pages import HugePages
    from sparing.weights.weight import PackedWeight

__all__ = ["check_names", "load_weights", "row_tiles", "whole_names"]

SHOWN = 5
TILE_BYTES = 1 << 20  # of float32 rows that are quantised at once


def load_weights(
    module: "torch.nn.Module",
    tensors: TensorSource,
    expected: Mapping[str, Expected],
    *,
    dtype: "torch.dtype | None",
    device: "torch.device | str",
    ignore: Collection[str] = (),
    keep_mapped: Collection[str] = (),
    weights: str = "stored",
) -> None:
    """Fills the parameters and buffers of a module on the meta device from a checkpoint.

    expected: checkpoint tensor name -> (parameter or buffer path in the module, shape, role). A path that ends in a
    number, as `experts.up_proj.3`, is that slice of a parameter along its first dimension.
    dtype: type of every floating-point tensor once loaded, except roles that stay float32; None keeps each as stored.
    Integers keep their type.
    device: where the tensors live once loaded.
    ignore: regular expressions; a tensor of the file that is not expected must contain a match of one.
    keep_mapped: checkpoint names that stay views of the file, on the CPU and in the stored type, as blocks of a GGUF
    file do in any case.
    weights: "stored", or a format in which matrices are packed as they are read; `PackedWeight`s take their places.

    Tensors shared by two modules before loading are shared afterwards. Peak memory is the loaded model plus one
    piece of a few MiB.
    Raises CheckpointError for a missing, unexpected or misshapen tensor, where integers meet floating point, and for
    numbers that are not finite, or not in `dtype`; those of `keep_mapped` are not looked at, which would read the file;
    ValueError for a parameter that `expected` does not name. Nothing in the module changes before the names and
    shapes of all tensors have been checked.
    """
    import torch

    from sparing.kernels.huge_pages import HugePages

    check_names(tensors, expected, ignore)
    slots = _slots(module)
    targets = {name: _target(path, slots) for name, (path, _, _) in expected.items()}
    for name, (path, _) in targets.items():
        if path not in slots:
            raise ValueError(f"{name}: the module has no parameter or buffer {path}")
    unfilled = slots.keys() - {path for path, _ in targets.values()}
    aliases = {id(slots[path]) for path, _ in targets.values()}
    unfilled = sorted(path for path in unfilled if id(slots[path]) not in aliases)
    if unfilled:
        raise ValueError(f"no checkpoint tensor is expected for {_some(unfilled)}")

    memory = HugePages()
    filled: dict[int, torch.Tensor | PackedWeight] = {}
    with torch.no_grad():
        for name, (path, index) in targets.items():
            old, role = slots[path], expected[name].role
            stays = name in keep_mapped
            format = _format(tensors, name, old, role, "stored" if stays else weights, dtype)
            if format is not None:
                whole = filled.get(id(old))
                packed = _pack(tensors, name, old, format, memory, device, whole, index, stays)
                packed.dtype = dtype or packed.dtype
                filled[id(old)] = packed
                continue
            if stays and tensors.is_mapped(name):
                value = tensors.read(name)
            else:
                kind = torch.float32 if role.is_float32 else dtype
                whole = None if index is None else filled.get(id(old))
                value = _copy(tensors, name, old, kind, memory, device, whole, index)
            if isinstance(old, torch.nn.Parameter):
                value = torch.nn.Parameter(value, requires_grad=old.requires_grad and value.is_floating_point())
            filled[id(old)] = value
    for path, old in slots.items():
        prefix, _, leaf = path.rpartition(".")
        parent, value = module.get_submodule(prefix), filled[id(old)]
        if not isinstance(value, torch.Tensor):
            delattr(parent, leaf)  # the place of a parameter takes no module
        setattr(parent, leaf, value)


def whole_names(patterns: Collection[str]) -> list[str]:
    """`ignore` of names that match a pattern as a whole."""
    return [rf"^(?:{pattern})$" for pattern in patterns]


def check_names(tensors: TensorSource, expected: Mapping[str, Expected], ignore: Collection[str]) -> None:
    """Raises CheckpointError for tensors that are missing, not expected or of other shapes, as in `load_weights`.

    Nothing but headers is read, and no model is needed.
    """
    present = tensors.names()
    missing = sorted(expected.keys() - set(present))
    if missing:
        where = f" (looked in {_folder(tensors)})" if present else ""
        raise CheckpointError(
            f"{len(missing)} of {len(expected)} tensors are missing{where}: {_some(missing)}; "
            "the download is incomplete or config.json describes another model"
        )
    patterns = [re.compile(pattern) for pattern in ignore]
    surplus = [name for name in present if name not in expected and not any(p.search(name) for p in patterns)]
    if surplus:
        first = surplus[0]
        raise CheckpointError(
            f"{tensors.file(first).name}: {len(surplus)} unexpected tensors: "
            f"{_some([f'{name} {list(tensors.shape(name))}' for name in surplus])}; "
            "config.json describes another model, or this variant is not supported"
        )
    for name, (_, shape, _) in expected.items():
        if tensors.shape(name) != tuple(shape):
            raise CheckpointError(
                f"{tensors.file(name).name}: {name} has shape {list(tensors.shape(name))}, "
                f"config.json asks for {list(shape)}; the two belong to different models"
            )


def _slots(module: "torch.nn.Module") -> "dict[str, torch.Tensor]":
    """Every parameter and stored buffer by path, aliases of a shared tensor included."""
    slots: dict[str, torch.Tensor] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        own = {**part._parameters, **part._buffers}
        slots |= {
            dot + leaf: tensor
            for leaf, tensor in own.items()
            if tensor is not None and leaf not in part._non_persistent_buffers_set
        }
    return slots


def _target(path: str, slots: "Mapping[str, torch.Tensor]") -> tuple[str, int | None]:
    """(slot, index along its first dimension); the index is None where the path is the slot itself."""
    parent, _, last = path.rpartition(".")
    if path not in slots and parent in slots and last.isdigit():
        return parent, int(last)
    return path, None


def row_tiles(
    tensors: TensorSource, name: str, device: "torch.device | str" = "cpu", multiple: int = 1
) -> "Iterator[torch.Tensor]":
    """The rows of a matrix or stack of matrices in order, as float32 [n, in], of one matrix at a time.

    multiple: n is a multiple of it, except for the last rows of a matrix.
    Raises CheckpointError for numbers that are not finite: they have no code in few bits.
    """
    import torch

    rows, size = tensors.shape(name)[-2:]
    most = max(1, TILE_BYTES // (4 * size * multiple)) * multiple
    where = f"{tensors.file(name).name}: {name}"
    done = 0  # rows of the matrix
    rest: torch.Tensor | None = None  # of the piece before
    for piece in tensors.pieces(name):
        rest = piece if rest is None else torch.cat((rest, piece))
        while n := _next_rows(len(rest) // size, rows - done, most, multiple):
            tile = rest[: n * size].view(n, size).to(device=device, dtype=torch.float32)
            check_finite(where, tile)
            yield tile
            rest, done = rest[n * size :], (done + n) % rows
        rest = rest.clone() if len(rest) else None


def _next_rows(present: int, left: int, most: int, multiple: int) -> int:
    """How many of the `present` rows to take, with `left` still to come of a matrix."""
    n = min(present, left, most)
    return n if n == left else n - n % multiple


def _format(
    tensors: TensorSource, name: str, old: "torch.Tensor", role: Role, weights: str, dtype: "torch.dtype | None"
) -> str | None:
    """The format in which a tensor of the file is held, None for a plain one."""
    if weights != "stored":
        return format_loaded(role, old.shape, weights)
    stored = tensors.format(name) if isinstance(tensors, PackedTensors) else None
    kept = stored is not None and stays_packed(role, stored, str(dtype).removeprefix("torch."))
    return stored if kept else None


def _pack(
    tensors: TensorSource,
    name: str,
    old: "torch.Tensor",
    format: str,
    memory: "HugePages",
    device: "torch.device | str",
    whole: "torch.Tensor | PackedWeight | None",
    index: int | None,
    stays: bool,
) -> "PackedWeight":
    """What replaces `old`: packed as it is stored where that is the format, else quantised from all its rows.

    Blocks in the order of their file stay a view of it.
    """
    import torch

    from sparing.weights.weight import empty_packed

    stored = None
    if isinstance(tensors, PackedTensors) and tensors.format(name) == format:
        stored = tensors.packed(name)
        if format in BLOCKS and tensors.is_mapped(name) and (stays or torch.device(device).type == "cpu"):
            if not stays:
                check_codes(f"{tensors.file(name).name}: {name}", stored)
            return stored  # where it lies: a copy would take most of the time of loading
    if isinstance(whole, torch.Tensor):
        raise CheckpointError(f"{name}: experts of one layer are packed and not packed; this variant is not supported")
    if whole is None and stored is not None:
        whole = stored.empty_like(device, None if index is None else len(old), empty=memory.empty)
    elif whole is None:
        whole = empty_packed(format, old.shape, device, empty=memory.empty)
    target = whole if index is None else whole[index]
    if stored is None:
        target.fill(lambda: row_tiles(tensors, name, device))
    elif not target.copy_(stored):
        raise CheckpointError(f"{name}: experts of one layer are packed in different ways; this is not supported")
    else:
        check_codes(f"{tensors.file(name).name}: {name}", target)
    tensors.release(name)
    return whole


def _copy(
    tensors: TensorSource,
    name: str,
    old: "torch.Tensor",
    dtype: "torch.dtype | None",
    memory: "HugePages",
    device: "torch.device | str",
    whole: "torch.Tensor | PackedWeight | None" = None,
    index: int | None = None,
) -> "torch.Tensor":
    """What replaces `old`, with this tensor copied into it; index: into which part, of the `whole` filled so far."""
    import torch

    if whole is not None and not isinstance(whole, torch.Tensor):
        raise CheckpointError(f"{name}: experts of one layer are packed and not packed; this variant is not supported")

    where = f"{tensors.file(name).name}: {name}"
    target: torch.Tensor | None = None
    done = 0
    for piece in tensors.pieces(name):
        if target is None:
            if piece.is_floating_point() != old.is_floating_point():
                raise CheckpointError(
                    f"{where} is stored as {tensors.dtype(name)}, the model holds "
                    f"{old.dtype} there; this quantised variant is not supported"
                )
            if whole is None:
                kind = dtype if dtype is not None and piece.is_floating_point() else piece.dtype
                whole = memory.empty(old.shape, dtype=kind, device=device)
            target = (whole if index is None else whole[index]).view(-1)
        copy_checked(where, target[done : done + len(piece)], piece)
        done += len(piece)
    if whole is None:  # a tensor of no elements has no pieces
        whole = torch.empty(old.shape, dtype=dtype if old.is_floating_point() else old.dtype, device=device)
    return whole


def _folder(tensors: TensorSource) -> str:
    file = tensors.file(tensors.names()[0])
    return str(file if file.suffix == ".gguf" else file.parent)


def _some(names: Collection[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
