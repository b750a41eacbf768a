"""Quantised checkpoints: several tensors of a file that together are one weight.

Decided by the tensors that are there, never by the tables of a config: names, types and shapes say the format.

    weight               what is beside it                          format
    X.weight      U8     X.weight_scale F8_E4M3, X.weight_scale_2   NVFP4 (ModelOpt)
    X.weight_packed U8   X.weight_scale F8_E4M3, X.weight_global_scale: the reciprocal of scale_2 (compressed-tensors)
    X.weight, X.weight_packed, U8 or I8; X.weight_scale or X.scale, U8 or F8_E8M0, one for 32 inputs: MXFP4
    X.weight      F8_E4M3   X.weight_scale: one, or one for each row      FP8 (ModelOpt, compressed-tensors)
    X.weight      F8_E4M3   X.weight_scale_inv or X.scale                 FP8 with a scale for each 128 x 128 block
    X.weight      I8        X.weight_scale: one for each row              int8 (compressed-tensors)
    X.weight_packed I32     X.weight_scale: one for each group            int4 (compressed-tensors)

A stack of experts has no `.weight`: the scales of `Y.experts.up_proj` are `Y.experts.up_proj_weight_scale`. Where it is
stored expert by expert, `experts.3.gate_proj.weight` and `experts.3.up_proj.weight` become the one matrix that models
hold, `experts.3.gate_up_proj.weight`: gate above up.
Scales are used as stored. What quantises activations or a cache (`input_scale`, `k_scale`, ...) is passed over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparing.checkpoint.renamed import FLOATS, GATE
from sparing.checkpoint.safetensors import BITS
from sparing.checkpoint.tensors import PIECE_BYTES, TensorSource
from sparing.config.formats import BLOCKS, FORMATS, PLAIN
from sparing.errors import CheckpointError
from sparing.weights.finite import check_finite

if TYPE_CHECKING:
    import torch

    from sparing.weights.weight import PackedWeight

__all__ = ["PackedTensors", "check_codes", "find_packed", "part_names"]

# What may end a name beside a weight, longest first.
SCALES = ("weight_scale", "weight_scale_inv", "scale")
EXTRAS = ("weight_scale_2", "weight_global_scale", "weight_shape")
PASSED_OVER = ("input_scale", "input_scale_ub", "input_global_scale", "output_scale", "k_scale", "v_scale", "q_scale")
REFUSED = ("weight_zero_point", "weight_g_idx")  # beside codes
BLOCK = 128


@dataclass(frozen=True)
class Group:
    """One packed weight: its format, the shape it stands for, and what its tensors are called in the file."""

    format: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]  # codes, scale, scale_2 or global_scale -> name in the file


class PackedTensors:
    """A checkpoint in which some weights are packed (a TensorSource, of names and shapes without packing).

    groups: name -> what is packed under it, one matrix or two, the rows of the second below those of the first.
    """

    def __init__(self, source: TensorSource, groups: Mapping[str, tuple[Group, ...]], hidden: set[str]) -> None:
        self._source, self._groups = source, groups
        self._names = [name for name in source.names() if name not in hidden and name not in groups]
        self._names += groups

    def format(self, name: str) -> str | None:
        """The format of a packed weight, None for a plain tensor."""
        return self._groups[name][0].format if name in self._groups else None

    def packed(self, name: str) -> PackedWeight:
        """A packed weight, as views of the file where its layout is ours.

        Raises CheckpointError for a scale of a matrix, row or block of 128 x 128 that is not finite, and for two
        matrices that cannot be one.
        """
        weights = [self._read(group) for group in self._groups[name]]
        return weights[0] if len(weights) == 1 else _joined(f"{self.file(name).name}: {name}", *weights)

    def _read(self, group: Group) -> PackedWeight:
        import torch

        from sparing.weights.weight import packed_class

        if group.format in BLOCKS:
            return packed_class(group.format)(codes=self._source.rows(group.parts["codes"]))
        parts = {part: self._source.read(stored) for part, stored in group.parts.items()}
        if "global_scale" in parts:
            parts["scale_2"] = parts.pop("global_scale").float().reciprocal()
        stack = group.shape[:-2]
        if "scale_2" in parts:
            parts["scale_2"] = parts["scale_2"].float().reshape(stack)
        if group.format in ("int4", "nvfp4", "mxfp4"):
            parts["codes"] = parts["codes"].view(torch.uint8)
        if group.format == "mxfp4":
            parts["scale"] = parts["scale"].view(torch.uint8)
        if group.format == "fp8":
            parts["scale"] = _fp8_scale(parts["scale"], group.shape)
        if group.format == "int8":
            parts["scale"] = parts["scale"].float().reshape(group.shape[:-1])
        for part in ("scale_2", *(("scale",) if group.format in ("fp8", "int8") else ())):  # the others are many
            if part in parts and not (finite := parts[part].isfinite()).all():
                stored = group.parts.get(part) or group.parts["global_scale"]
                found = parts[part][~finite].flatten()[0].item()
                where = f"{self._source.file(stored).name}: {stored}"
                raise CheckpointError(f"{where} stands for a scale of {found}; the file is damaged")
        return packed_class(group.format)(**parts)

    def nbytes(self, name: str) -> int:
        """Bytes that a packed weight holds once it is read."""
        if (format := self._groups[name][0].format) in BLOCKS:
            block, nbytes = BLOCKS[format]
            return math.prod(self.shape(name)) // block * nbytes
        total = 0
        for i, group in enumerate(self._groups[name]):
            for part, stored in group.parts.items():
                count = math.prod(self._source.shape(stored))
                if i and part != "codes" and count == 1:
                    continue  # the scale of both
                as_float32 = part != "codes" and group.format in ("fp8", "int8")
                total += count * (32 if as_float32 else BITS[self._source.dtype(stored)]) // 8
        return total

    def names(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._groups:
            return self._source.shape(name)
        *stack, out, size = self._groups[name][0].shape
        return (*stack, len(self._groups[name]) * out, size)

    def dtype(self, name: str) -> str:
        return self._groups[name][0].format.upper() if name in self._groups else self._source.dtype(name)

    def file(self, name: str) -> Path:
        return self._source.file(self._groups[name][0].parts["codes"] if name in self._groups else name)

    def is_mapped(self, name: str) -> bool:
        return (self.format(name) in (None, *BLOCKS)) and self._source.is_mapped(name)

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(name) if self._is_plain(name) else self.packed(name).dequantize()

    def rows(self, name: str) -> torch.Tensor:
        import torch

        if name in self._groups and self.format(name) not in BLOCKS:
            return self.read(name).view(torch.uint8)
        return self._source.rows(name)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        if self._is_plain(name):
            yield from self._source.pieces(name)
            return
        yield from (tile.reshape(-1) for tile in self.packed(name).tiles(PIECE_BYTES))
        self.release(name)

    def stored(self, name: str) -> Iterator[memoryview]:
        for part in self._stored_names(name):
            yield from self._source.stored(part)

    def release(self, name: str) -> None:
        for part in self._stored_names(name):
            self._source.release(part)

    def _is_plain(self, name: str) -> bool:
        """Whether the source reads a tensor as the numbers that it holds."""
        return self.format(name) in (None, *PLAIN)

    def _stored_names(self, name: str) -> list[str]:
        return [part for group in self._groups.get(name, ()) for part in group.parts.values()] or [name]


def check_codes(where: str, weight: PackedWeight) -> None:
    """Raises CheckpointError where a packed weight has a code or a scale that stands for no number.

    where: file and tensor. Costs a pass over the codes of FP8 and the scales of other formats.
    """
    import torch

    for part, tensor in weight.named_buffers():
        if tensor.is_meta or not tensor.numel():
            continue
        if weight.format in BLOCKS:
            if not weight.has_finite_scales():  # type: ignore[operator]
                raise CheckpointError(
                    f"{where} holds blocks with scales that are not finite; the file is damaged: download it again"
                )
            continue
        if tensor.itemsize > 1:
            check_finite(f"{where} ({part})", tensor)
            continue
        if tensor.dtype == torch.float8_e4m3fn:  # 0x7F is the largest signed byte, 0xFF the largest unsigned one
            nan = tensor.view(torch.uint8).amax() == 0xFF or tensor.view(torch.int8).amax() == 0x7F
        else:
            nan = part == "scale" and tensor.amax() == 0xFF  # a power of two
        if nan:
            among = "codes" if part == "codes" else "scales"
            raise CheckpointError(f"{where} has NaN among its {among}; the file is damaged: download it again")


def find_packed(source: TensorSource, has_blocks: bool = False) -> TensorSource:
    """The same tensors, with those that together are one weight under one name.

    has_blocks: whether matrices may be rows of blocks, as in a GGUF file, which each are a weight by themselves.
    Raises CheckpointError for a packed weight whose tensors do not fit each other, and for formats that are not known.
    """
    present = set(source.names())
    groups: dict[str, Group] = {}
    hidden: set[str] = set()
    for name in source.names():
        base, _, leaf = name.rpartition(".")
        if has_blocks:
            format = source.dtype(name).lower()
            if format in BLOCKS and len(source.shape(name)) > 1:
                groups[name] = Group(format, source.shape(name), {"codes": name})
                hidden.add(name)
        elif leaf in PASSED_OVER or leaf.endswith("_input_scale"):
            hidden.add(name)
        elif leaf.endswith(("weight", "weight_packed")) or ".experts." in name:
            packed = leaf == "weight_packed"
            logical = f"{base}.weight" if packed else name
            beside = {extra: part for extra, part in part_names(logical).items() if part in present and part != name}
            if group := _group(source, name, beside):
                groups[logical] = group
                hidden.update(beside.values(), (name,))
    return PackedTensors(source, _with_gates(groups), hidden) if groups else source


def _with_gates(groups: Mapping[str, Group]) -> dict[str, tuple[Group, ...]]:
    """The same weights, gate and up of an expert under one name."""
    joined: dict[str, tuple[Group, ...]] = {name: (group,) for name, group in groups.items()}
    for name, gate in groups.items():
        match = GATE.fullmatch(name)
        up = groups.get(f"{match[1]}.up_proj.weight") if match else None
        if match and up and (gate.format, gate.shape) == (up.format, up.shape):
            del joined[name], joined[f"{match[1]}.up_proj.weight"]
            joined[f"{match[1]}.gate_up_proj.weight"] = gate, up
    return joined


def _joined(where: str, first: PackedWeight, second: PackedWeight) -> PackedWeight:
    """A weight of the rows of both. Raises CheckpointError where they have no layout in common."""
    import torch

    parts: dict[str, torch.Tensor] = {}
    for (name, a), (_, b) in zip(first.named_buffers(), second.named_buffers(), strict=True):
        if a.ndim != b.ndim or a.dtype != b.dtype or a.shape[1:] != b.shape[1:]:
            raise CheckpointError(f"{where}: gate and up are packed in different ways; this is not supported")
        if not a.ndim and a != b:
            raise CheckpointError(
                f"{where}: the scales of gate and up are {a.item():g} and {b.item():g}; only experts with one scale "
                "for both are supported"
            )
        if name == "scale" and first.format == "fp8" and a.ndim == 2 and len(first) % BLOCK:
            raise CheckpointError(
                f"{where}: gate has {len(first)} rows, so that blocks of {BLOCK} would lie across gate and up; "
                "this is not supported"
            )
        parts[name] = torch.cat((a, b)) if a.ndim else a
    return type(first)(**parts)


def part_names(name: str) -> dict[str, str]:
    """What the tensors beside a weight are called, by role. `X.weight` -> X.weight_scale; `Y.up_proj` ->
    Y.up_proj_weight_scale."""
    stem = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
    return {role: stem + role for role in (*SCALES, *EXTRAS, *REFUSED)}


def _group(source: TensorSource, name: str, beside: Mapping[str, str]) -> Group | None:
    """The packed weight whose codes this tensor is; None for a plain tensor."""
    kind, shape = source.dtype(name), source.shape(name)
    where = f"{source.file(name).name}: {name}"
    if kind in FLOATS and (role := next((role for role in SCALES[:2] if role in beside), None)):
        raise CheckpointError(
            f"{where} is {kind} and has a {role} beside it: its weights were not compressed, or are codes in a type "
            "that has no use for scales; this is not supported"
        )
    if kind not in ("U8", "I8", "I32", "F8_E4M3") or len(shape) < 2:
        return None
    role = next((role for role in SCALES if role in beside), None)
    if role is None:
        return None
    if refused := next((extra for extra in REFUSED if extra in beside), None):
        raise CheckpointError(f"{where} has a {refused} beside it; only symmetric formats in order are supported")
    scale = beside[role]
    scale_kind, scale_shape = source.dtype(scale), source.shape(scale)
    parts = {"codes": name, "scale": scale}
    *stack, out, width = shape

    def checked(format: str, logical: tuple[int, ...], *scale_shapes: tuple[int, ...]) -> Group:
        if scale_shape not in scale_shapes:
            expected = " or ".join(str(list(own)) for own in dict.fromkeys(scale_shapes))
            raise CheckpointError(
                f"{where} {list(shape)} looks like {format}, but {scale} is {list(scale_shape)} and not {expected}; "
                "the file is damaged or of another variant"
            )
        return Group(format, logical, parts)

    # The types of codes and scales decide the format, whatever a config says; the shape of the scales must then agree.
    # stack: leading dimensions of experts; width: bytes or words of a row, which hold 2 or 8 codes of four bits.
    if kind in ("U8", "I8") and scale_kind == "F8_E4M3":
        wholes = [role for role in ("weight_scale_2", "weight_global_scale") if role in beside]
        if len(wholes) != 1:
            raise CheckpointError(
                f"{where} looks like NVFP4, but has no weight_scale_2 or weight_global_scale beside it"
            )
        whole = beside[wholes[0]]
        parts["scale_2" if wholes[0] == "weight_scale_2" else "global_scale"] = whole
        if source.dtype(whole) != "F32" or math.prod(source.shape(whole)) != math.prod(stack):
            found = f"{source.dtype(whole)} {list(source.shape(whole))}"
            raise CheckpointError(f"{where}: {whole} is {found}, not one F32 number for each matrix")
        return checked("nvfp4", (*stack, out, 2 * width), (*stack, out, 2 * width // FORMATS["nvfp4"].block))
    if kind in ("U8", "I8") and scale_kind in ("U8", "F8_E8M0"):
        return checked("mxfp4", (*stack, out, 2 * width), (*stack, out, 2 * width // FORMATS["mxfp4"].block))
    if kind == "F8_E4M3" and (scale_kind in FLOATS or role == "scale"):
        blocks = (*stack, -(-out // BLOCK), -(-width // BLOCK))
        if role != "weight_scale":
            return checked("fp8", shape, blocks)
        one = ((), (1,)) if not stack else (tuple(stack), (*stack, 1), (*stack, 1, 1))
        return checked("fp8", shape, (*stack, out, 1), (*stack, out), *one, blocks)
    if kind == "I8" and scale_kind in FLOATS:
        return checked("int8", shape, (*stack, out, 1), (*stack, out))
    if kind == "I32" and scale_kind in FLOATS and len(scale_shape) == len(shape):
        _check_bits(source, where, width, beside.get("weight_shape"))
        size, groups = 8 * width, scale_shape[-1]
        if not groups or size % groups or size // groups % 2:
            raise CheckpointError(f"{where}: {scale} is {list(scale_shape)}, which makes no groups of {size} inputs")
        return checked("int4", (*stack, out, size), (*stack, out, groups))
    raise CheckpointError(f"{where} is {kind} with {scale} of {scale_kind}; this quantised variant is not supported")


def _check_bits(source: TensorSource, where: str, width: int, name: str | None) -> None:
    """Raises CheckpointError where integers [out, width] hold other than eight inputs each, as `weight_shape` tells."""
    if name is None or not source.dtype(name).startswith("I") or source.shape(name) not in ((2,), (3,)):
        return
    inputs = int(source.read(name)[-1])
    if -(-inputs // 8) != width:
        bits = 32 * width // inputs if inputs > 0 else 0
        packs = f"{bits} bits each" if 0 < bits <= 16 else f"{width} integers"
        raise CheckpointError(
            f"{where} packs {inputs} inputs in {packs} (compressed-tensors); 4 bits are supported: use the original "
            "weights, which load(weights=...) and `sparing quantize` pack"
        )


def _fp8_scale(scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """float32 [...], [..., out] or [..., out blocks, in blocks], whatever ones the file's shape has.

    Powers of two as bytes or float8_e8m0fnu are exact in float32.
    """
    import torch

    from sparing.kernels.microscaling import ue8m0_decode

    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        scale = ue8m0_decode(scale.view(torch.uint8))
    scale = scale.float()
    *stack, out, size = shape
    if scale.shape == (*stack, -(-out // BLOCK), -(-size // BLOCK)):  # there may be as many blocks as rows
        return scale
    return scale.reshape(stack) if scale.numel() == math.prod(stack) else scale.reshape(*stack, out)
