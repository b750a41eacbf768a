"""From a checkpoint to one in few bits: tensor by tensor, shard by shard, resumed where it was interrupted.

A shard takes its place when it is whole, and `quantization.json` then says so, with the error of every weight in it.
A run that starts again finds there what is done; config.json is written last, so a folder that loads is complete.
What a GGUF file has quantised and stays dense here becomes bfloat16; its settings and tokenizer become files.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sparing.checkpoint.folder import Checkpoint
from sparing.checkpoint.lock import holding
from sparing.checkpoint.safetensors import BITS, INDEX, SINGLE
from sparing.checkpoint.source import open_checkpoint
from sparing.checkpoint.stream import StreamWriter
from sparing.checkpoint.tensors import TORCH_NAMES, TensorSource, torch_dtype
from sparing.checkpoint.write import folder_to_fill, replacing, save_tokenizer, write_config, write_json
from sparing.config import parse_config
from sparing.config.formats import FORMATS, is_packed
from sparing.config.names import OWN_HEAD, Expected, names_in_file
from sparing.config.roles import EXPERTS
from sparing.errors import CheckpointError
from sparing.weights.dialect import file_layout, file_tensors, matrices, modelopt_table, quantization_config
from sparing.weights.finite import check_finite
from sparing.weights.load import check_names, row_tiles, whole_names
from sparing.weights.packed_files import PackedTensors
from sparing.weights.resume import REPORT, WeightError, resumed
from sparing.weights.stored import stored_weights

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["REPORT", "Progress", "WeightError", "quantize"]

SHARD_BYTES = 500_000_000
SKIPPED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".part")  # weights, and files that end in them
NOT_COPIED = ("config.json", "hf_quant_config.json", INDEX, REPORT)


@dataclass(frozen=True)
class Form:
    """What matrices become: a format, and a way to choose its scales where there are several."""

    weights: str
    scales: str | None

    @property
    def rows(self) -> int:
        """How many of a matrix share a scale; 1: none do, or all."""
        return FORMATS[self.weights].scales.get(self.scales or "", 1)


@dataclass(frozen=True)
class Progress:
    """After each matrix. done, total: numbers of the checkpoint; error: None for a tensor that stays dense."""

    name: str
    done: int
    total: int
    error: WeightError | None


def quantize(
    source: str | Path,
    out: str | Path,
    weights: str,
    *,
    scales: str | None = None,
    revision: str | None = None,
    log: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, WeightError]:
    """Write the checkpoint `source` into the folder `out` with its matrices packed; the error of each packed weight.

    source, revision: as in `load`; weights: "int8", "int4", "nvfp4", "mxfp4" or "fp8"; scales: of NVFP4, as in
    `nvfp4_quantize` (None: "mse"), of FP8, as in `fp8_quantize` (None: "row"). The same tensors are packed as by
    `load(weights=...)`, except the output head, which no engine expects packed; the others are copied as they are, and
    in bfloat16 where a GGUF file has quantised them. Experts of a stack are written one by one.
    Memory holds one matrix at a time. A run that was interrupted goes on when called again; one that fails before a
    shard is whole leaves nothing behind.
    Raises ValueError for an unknown format and for `scales` that are not of it, CheckpointError for a source that is
    damaged, not as its config says, already packed or of rows that `scales` do not divide, for a folder that holds
    anything else, and for a disk that is full.
    """
    if weights not in FORMATS:
        raise ValueError(f"weights={weights!r} is not known, use {', '.join(FORMATS)}")
    form = Form(weights, FORMATS[weights].checked(scales))
    out = Path(out)
    checkpoint = open_checkpoint(source, revision)
    tensors = stored_weights(checkpoint)
    if isinstance(tensors, PackedTensors) and any(tensors.format(name) in FORMATS for name in tensors.names()):
        raise CheckpointError(f"{source}: is already quantised; give the folder of the original weights")
    config = parse_config(checkpoint.config)
    check_names(tensors, names_in_file(config, tensors.names()), whole_names(config.tolerated_tensors()))
    packed = _packed_names(checkpoint, tensors, weights)
    fused = _fused(names_in_file(config, tensors.names()), packed)
    _check_rows(tensors, packed, form)
    shards = _plan_shards(tensors, packed, form)
    matrices_of = {
        shard: [m for name in names if name in packed for m in matrices(name, tensors.shape(name))]
        for shard, names in shards.items()
    }
    digests = {shard: partial(_digest, tensors, names, packed, fused) for shard, names in shards.items()}
    with (
        folder_to_fill(out),
        holding(out),
        resumed(out, asdict(form), matrices_of, lambda shard: digests[shard]()) as report,
    ):
        done, total = 0, sum(math.prod(tensors.shape(name)) for name in tensors.names())
        largest = _LargestMagnitudes(tensors, fused)
        for shard, names in shards.items():
            if shard in report.shards:
                done += sum(math.prod(tensors.shape(name)) for name in names)
                continue
            layout = {k: v for name in names for k, v in _layout(tensors, name, packed, form).items()}
            with replacing(out / shard) as file:
                writer, errors = StreamWriter(file, layout), {}
                for name in names:
                    if name in packed:
                        for matrix, error in _write_packed(writer, tensors, name, form, largest):
                            errors[matrix] = error
                            done += math.prod(error.shape)
                            log(Progress(matrix, done, total, error))
                    else:
                        _write_dense(writer, tensors, name)
                        done += math.prod(tensors.shape(name))
                        log(Progress(name, done, total, None))
                writer.close()
            report.add(shard, digests[shard](), errors)
        _write_rest(out, checkpoint, tensors, shards, packed, form)
        return report.errors


def _packed_names(checkpoint: Checkpoint, tensors: TensorSource, weights: str) -> set[str]:
    """Names in the file of the weights that are packed. Raises CheckpointError where there is none.

    The experts of a layer are packed all or none: engines take them in one format.
    """
    names = names_in_file(parse_config(checkpoint.config), tensors.names())
    present = set(tensors.names())
    packed = {n for n, (_, shape, role) in names.items() if n in present and is_packed(role, shape, weights)}
    dense = {_layer_of_experts(names[n]) for n in present & names.keys() - packed} - {None}
    packed = {n for n in packed if _layer_of_experts(names[n]) not in dense}
    if not packed:
        raise CheckpointError(f"{checkpoint.path}: no matrix has inputs in multiples of {FORMATS[weights].block}")
    return packed


def _fused(names: Mapping[str, Expected], packed: set[str]) -> dict[str, list[str]]:
    """Packed weight -> the packed ones that engines make one matrix of, itself among them."""
    modules: dict[str, list[str]] = {}
    for name, (parameter, _, role) in names.items():
        if name in packed:
            module = parameter.removesuffix(".weight").rpartition(".")[0] if role.is_fused else parameter
            modules.setdefault(module, []).append(name)
    return {name: together for together in modules.values() for name in together}


def _layer_of_experts(expected: Expected) -> str | None:
    """What the names of all routed experts of a layer begin with; None for other weights."""
    return expected.parameter.partition(".experts.")[0] if expected.role is EXPERTS else None


def _check_rows(tensors: TensorSource, packed: set[str], form: Form) -> None:
    """Raises CheckpointError for a matrix that squares of 16 x 16 do not cover."""
    for name in sorted(packed) if form.scales == "2d" else ():
        if (rows := tensors.shape(name)[-2]) % form.rows:
            raise CheckpointError(
                f"{tensors.file(name).name}: {name} has {rows} rows, scales='2d' needs a multiple of {form.rows}; "
                "choose other scales"
            )


def _layout(tensors: TensorSource, name: str, packed: set[str], form: Form) -> dict[str, tuple[str, tuple[int, ...]]]:
    shape = tensors.shape(name)
    if name in packed:
        layouts = [file_layout(matrix, shape[-2:], form.weights, form.scales) for matrix in matrices(name, shape)]
        return {stored: kind for layout in layouts for stored, kind in layout.items()}
    names = _dense_names(tensors, name)
    return {each: (_dense_type(tensors, name), shape if names == [name] else shape[1:]) for each in names}


def _dense_names(tensors: TensorSource, name: str) -> list[str]:
    """The names under which a tensor that is not packed is written: those of experts, except gated ones, which engines
    expect in a stack while they are dense."""
    names = matrices(name, tensors.shape(name))
    is_gated = names != [name] and f"{name.rpartition('.')[0]}.gate_up_proj" in tensors.names()
    return [name] if is_gated else names


def _dense_type(tensors: TensorSource, name: str) -> str:
    """The type in which a tensor that is not packed is written: its own, bfloat16 for blocks of a GGUF file."""
    stored = tensors.dtype(name)
    return stored if stored in BITS else "BF16"


def _plan_shards(tensors: TensorSource, packed: set[str], form: Form) -> dict[str, list[str]]:
    """File -> names of the source's tensors it will hold, in the source's order."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in tensors.names():
        if _dense_type(tensors, name) not in TORCH_NAMES:
            raise CheckpointError(f"{tensors.file(name).name}: {name} is stored as {tensors.dtype(name)}")
        layout = _layout(tensors, name, packed, form)
        nbytes = sum(math.prod(shape) * BITS[dtype] // 8 for dtype, shape in layout.values())
        if groups[-1] and size + nbytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i + 1:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups)}


def _digest(tensors: TensorSource, names: Sequence[str], packed: set[str], fused: Mapping[str, Sequence[str]]) -> str:
    """SHA-256 of tensors, and of those that have a say in how they are packed."""
    digest = hashlib.sha256()
    together = [each for name in names for each in (name, *fused.get(name, ()))]
    for name in dict.fromkeys(together):
        digest.update(repr((name, tensors.dtype(name), tensors.shape(name), name in packed)).encode())
        for run in tensors.stored(name):
            digest.update(run)
    return digest.hexdigest()


class _LargestMagnitudes:
    """By which all rows of a matrix are scaled, the same for matrices that meet the same input.

    Engines join those of queries, keys and values to one matrix, and gate and up; vLLM then takes the largest scale_2
    of NVFP4 for all of it, without looking at block scales that were chosen for a smaller one, and rounds FP8 anew to
    the largest scale.
    Source: vllm 0.32 `KNvfp4Static.process`, `process_fp8_weight_tensor_strategy`.
    """

    def __init__(self, tensors: TensorSource, fused: Mapping[str, Sequence[str]]) -> None:
        self.tensors, self.fused = tensors, fused
        self.own: dict[str, Tensor] = {}

    def of(self, name: str) -> Tensor:
        """float32, for each of a weight's matrices."""
        import torch

        from sparing.weights.weight import largest_magnitudes

        for each in self.fused[name]:
            if each not in self.own:
                count = math.prod(self.tensors.shape(each)[:-2])
                self.own[each] = largest_magnitudes(partial(row_tiles, self.tensors, each), count)
        return torch.stack([self.own[each] for each in self.fused[name]]).amax(0)


def _write_packed(
    writer: StreamWriter, tensors: TensorSource, name: str, form: Form, largest: _LargestMagnitudes
) -> Iterator[tuple[str, WeightError]]:
    """Write a weight, matrix by matrix; the name of each and what packing did to it."""
    from sparing.weights.weight import empty_packed

    shape = tensors.shape(name)
    names = matrices(name, shape)
    out, size = math.prod(shape[:-1]) // len(names), shape[-1]
    tiles = row_tiles(tensors, name, multiple=form.rows)
    for i, matrix in enumerate(names):
        sums = _Sums()
        weight = empty_packed(form.weights, (out, size), scales=form.scales)
        weight.fill(lambda: _take(tiles, out), sums.add, lambda i=i: largest.of(name)[i : i + 1], form.scales)
        for stored, tensor in file_tensors(matrix, weight, form.scales).items():
            writer.put(stored, tensor)
        yield matrix, sums.error((out, size))
    tensors.release(name)


def _write_dense(writer: StreamWriter, tensors: TensorSource, name: str) -> None:
    kind, names = torch_dtype(_dense_type(tensors, name)), _dense_names(tensors, name)
    size, done = math.prod(tensors.shape(name)) // len(names), 0
    for piece in tensors.pieces(name):
        for part in piece.tensor_split(tuple(range(size - done % size, len(piece), size))):
            numbers = part.to(kind)
            check_finite(f"{tensors.file(name).name}: {name}", numbers, part)
            writer.put(names[done // size], numbers)
            done += len(part)


def _take(tiles: Iterator[Tensor], rows: int) -> Iterator[Tensor]:
    """The next tiles, `rows` rows in all."""
    while rows:
        tile = next(tiles)
        rows -= len(tile)
        yield tile


class _Sums:
    """Of squares and products over all tiles of a weight w and of what it became, v."""

    def __init__(self) -> None:
        self.ww = self.vv = self.wv = self.noise = 0.0

    def add(self, w: Tensor, v: Tensor) -> None:
        self.ww += w.square().sum().item()
        self.vv += v.square().sum().item()
        self.wv += (w * v).sum().item()
        self.noise += (w - v).square().sum().item()

    def error(self, shape: tuple[int, ...]) -> WeightError:
        both = math.sqrt(self.ww * self.vv)
        sqnr = None if self.noise == 0 else 10 * math.log10(max(self.ww, 1e-300) / self.noise)
        return WeightError(shape, sqnr, min(self.wv / both, 1.0) if both else float(self.ww == self.vv))


def _write_rest(
    out: Path,
    checkpoint: Checkpoint,
    tensors: TensorSource,
    shards: Mapping[str, list[str]],
    packed: set[str],
    form: Form,
) -> None:
    """Index, tokenizer and whatever else lies beside the weights; config.json last."""
    if len(shards) > 1:
        where = {
            stored: file
            for file, names in shards.items()
            for n in names
            for stored in _layout(tensors, n, packed, form)
        }
        total = sum((out / file).stat().st_size for file in shards)
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
    if not checkpoint.path.is_dir():
        _write_gguf_files(out, checkpoint)
    for path in sorted(checkpoint.path.iterdir()) if checkpoint.path.is_dir() else ():
        if path.is_file() and path.name not in NOT_COPIED and not path.name.endswith(SKIPPED) and path.name[0] != ".":
            with replacing(out / path.name) as file, path.open("rb") as original:
                shutil.copyfileobj(original, file)
    layouts = [_layout(tensors, name, packed, form) for name in tensors.names() if name not in packed]
    stored = {n: shape for layout in layouts for n, (_, shape) in layout.items()}
    dense = [n for n, shape in stored.items() if n.endswith(".weight") and len(shape) > 1]
    if OWN_HEAD not in dense and parse_config(checkpoint.config).tie_word_embeddings:
        dense.append(OWN_HEAD)  # a linear layer for those who read the list, also where it is the embedding
    if form.weights == "nvfp4":
        write_json(out / "hf_quant_config.json", modelopt_table(dense))
    config = {**checkpoint.config, "quantization_config": quantization_config(form.weights, form.scales, dense)}
    if not checkpoint.path.is_dir():
        expected = names_in_file(parse_config(checkpoint.config), tensors.names())
        embedding = next(name for name, (_, _, role) in expected.items() if role.kind == "embedding")
        config["dtype"] = TORCH_NAMES[_dense_type(tensors, embedding)]  # a GGUF file states no type for the whole
    write_config(out, config)


def _write_gguf_files(out: Path, checkpoint: Checkpoint) -> None:
    """What a folder has beside its weights and config.json."""
    if checkpoint.generation_config:
        write_json(out / "generation_config.json", checkpoint.generation_config)
    if checkpoint.tokenizer is not None:
        save_tokenizer(out, checkpoint.tokenizer)
