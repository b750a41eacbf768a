"""Products with weights in few bits on a GPU: the Triton twin of `kernels/cpu/packed.hpp` and `unpack.hpp`.

Few rows: a program reads the codes of some rows of the weight once, decodes them in registers and multiplies all of x
with them; where the weight has few rows, several programs share its inputs and their sums are added. Many rows: pieces
of the weight are written out in x's type, and torch multiplies.

Weights are decoded to x's type with the scales of their groups: in bfloat16 that is exact except for int4, which is
rounded once. Scales of rows, of 128 x 128 blocks and of the whole multiply the float32 sums. Needs Triton; imported for
tensors on a GPU only, or with TRITON_INTERPRET=1 in the environment.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from sparing.kernels.gpu.programs import PROGRAMS, multiprocessors, power, precision

__all__ = ["few_rows", "matmul", "product_program", "takes", "unpacked"]

TYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW_ROWS = 64  # of x; above it writing weights out for torch's products costs less than multiplying them here
PIECE_BYTES = 64 << 20  # of a weight that is written out
DEPTH = 128  # inputs at a time: those that share a scale of FP8's blocks
OUT = 64  # rows of the weight at a time


def takes(x: Tensor) -> bool:
    """Whether these kernels multiply rows of this type."""
    return x.dtype in TYPES and x.numel() > 0


def matmul(
    format: str, codes: Tensor, scale: Tensor, scale_2: Tensor | None, x: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`x @ weight^T + bias` in x's type: [..., out] for x [..., in] and one matrix in a format of `config.formats`.

    codes, scale, scale_2: its tensors; FP8's scale may be [], [out] or [ceil(out / 128), ceil(in / 128)].
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= FEW_ROWS:
        return few_rows(format, codes, scale, scale_2, rows, bias).view(*x.shape[:-1], -1)
    y, start = x.new_empty(len(rows), len(codes)), 0
    for piece in unpacked(format, codes, scale, scale_2, x.dtype):
        part = slice(start, start + len(piece))
        y[:, part] = F.linear(rows, piece, None if bias is None else bias[part])
        start = part.stop
    return y.view(*x.shape[:-1], -1)


def few_rows(
    format: str, codes: Tensor, scale: Tensor, scale_2: Tensor | None, x: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`matmul` for x [rows, in], at most FEW_ROWS, without writing weights out: [rows, out]."""
    x = x.contiguous()
    (rows, size), out = x.shape, len(codes)
    tiles, steps = triton.cdiv(out, OUT), triton.cdiv(size, DEPTH)
    splits = max(1, min(steps // 2, PROGRAMS * multiprocessors(x.device) // tiles))
    stretch = triton.cdiv(steps, splits)  # steps that one program takes
    splits = triton.cdiv(steps, stretch)
    y = torch.empty(splits, rows, out, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    _multiply[(tiles, splits)](
        x,
        *_tensors(codes, scale, scale_2),
        bias,
        y,
        rows,
        size,
        out,
        stretch * DEPTH,
        FORMAT=format,
        SCALES=_scales(codes, scale),
        GROUP=_group(format, codes, scale),
        PRECISION=precision(x.device),
        **product_program(rows, x.dtype),
    )
    return y[0] if splits == 1 else y.sum(0).to(x.dtype)


def unpacked(format: str, codes: Tensor, scale: Tensor, scale_2: Tensor | None, dtype: torch.dtype) -> Iterator[Tensor]:
    """All rows in order as [n, in], one piece after the other in the same memory."""
    out, size = len(codes), codes.shape[1] * _per_byte(format)
    rows = max(1, PIECE_BYTES // (dtype.itemsize * size * OUT)) * OUT
    piece = torch.empty(min(rows, out), size, dtype=dtype, device=codes.device)
    for start in range(0, out, rows):
        stop = min(start + rows, out)
        _unpack[(triton.cdiv(stop - start, OUT), triton.cdiv(size, DEPTH))](
            *_tensors(codes, scale, scale_2),
            piece,
            start,
            stop,
            size,
            FORMAT=format,
            SCALES=_scales(codes, scale),
            GROUP=_group(format, codes, scale),
            OUT=OUT,
            DEPTH=DEPTH,
        )
        yield piece[: stop - start]


def product_program(rows: int, dtype: torch.dtype) -> dict[str, int]:
    """What a program works on at a time, and with how many threads, for this many rows of x."""
    wide = dtype == torch.float32
    return {"ROWS": max(16, power(rows)), "OUT": OUT, "DEPTH": DEPTH, "num_warps": 4, "num_stages": 2 if wide else 4}


def _per_byte(format: str) -> int:
    return 1 if format in ("int8", "fp8") else 2


def _scales(codes: Tensor, scale: Tensor) -> str:
    """What shares a scale: the "matrix", a "row", or a "block" of one or of several rows."""
    return ("matrix", "row", "block")[scale.ndim]


def _group(format: str, codes: Tensor, scale: Tensor) -> int:
    """Inputs of four bits that share a scale."""
    return codes.shape[1] * 2 // scale.shape[1] if _per_byte(format) == 2 else 0


def _tensors(codes: Tensor, scale: Tensor, scale_2: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the kernels read them: float8_e4m3fn by its bits, which not every GPU knows as numbers."""
    codes, scale = codes.contiguous(), scale.contiguous()
    codes = codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes
    scale = scale.view(torch.uint8) if scale.dtype == torch.float8_e4m3fn else scale
    return codes, scale, scale_2


@triton.jit(do_not_specialize=["stretch"])
def _multiply(
    x,  # [rows, in]
    codes,
    scale,
    scale_2,  # float32 [] or None
    bias,  # [out] or None
    y,  # [splits, rows, out]
    rows,
    size,
    out,
    stretch,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """OUT rows of the weight (axis 0), a stretch of its inputs (axis 1), all rows of x."""
    split = tl.program_id(1)
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    row = tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, OUT], dtype=tl.float32)
    for start in range(split * stretch, tl.minimum((split + 1) * stretch, size), DEPTH):
        if GROUP:
            # A byte holds two neighbouring inputs. Sums do not mind the order: x is read with the same stride of two
            # instead of the halves being interleaved in registers.
            even, odd = _pairs(codes, scale, o, start, size, out, FORMAT, GROUP, DEPTH)
            for half in tl.static_range(2):
                i = start + half + 2 * tl.arange(0, DEPTH // 2)
                some = _rows_of_x(x, row, i, rows, size)
                sums = _dot(some, odd if half else even, sums, PRECISION)
        else:
            w = _bytes(codes, o, start, size, out, FORMAT, DEPTH)
            some = _rows_of_x(x, row, start + tl.arange(0, DEPTH), rows, size)
            part = _dot(some, w, tl.zeros([ROWS, OUT], dtype=tl.float32), PRECISION)
            sums += part * _scale_of_rows(scale, o, start, size, out, SCALES)[None, :]
    if scale_2 is not None:
        sums *= tl.load(scale_2)
    if bias is not None:  # added once
        sums += tl.load(bias + o, mask=(o < out) & (split == 0), other=0.0).to(tl.float32)[None, :]
    place = y + (split * rows + row[:, None]) * out + o[None, :]
    tl.store(place, sums.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (o < out)[None, :])


@triton.jit
def _unpack(
    codes,
    scale,
    scale_2,
    y,  # [stop - first, in]
    first,
    stop,
    size,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """OUT rows of the weight (axis 0), DEPTH inputs (axis 1)."""
    o = first + tl.program_id(0) * OUT + tl.arange(0, OUT)
    start = tl.program_id(1) * DEPTH
    if GROUP:
        even, odd = _pairs(codes, scale, o, start, size, stop, FORMAT, GROUP, DEPTH)
        w = tl.interleave(even, odd)
    else:
        w = _bytes(codes, o, start, size, stop, FORMAT, DEPTH)
        w *= _scale_of_rows(scale, o, start, size, stop, SCALES)[:, None]
    if scale_2 is not None:
        w *= tl.load(scale_2)
    i = start + tl.arange(0, DEPTH)
    place = y + (o - first).to(tl.int64)[:, None] * size + i[None, :]
    tl.store(place, w.to(y.dtype.element_ty), mask=(o < stop)[:, None] & (i < size)[None, :])


@triton.jit
def _dot(x, w, sums, PRECISION: tl.constexpr):
    """float32 [ROWS, OUT]: sums + x w^T, of x [ROWS, inputs] and w [OUT, inputs] rounded to x's type."""
    w = tl.trans(w.to(x.dtype))
    if PRECISION == "ieee":  # the interpreter does not multiply bfloat16
        x, w = x.to(tl.float32), w.to(tl.float32)
    return tl.dot(x, w, sums, input_precision=PRECISION)


@triton.jit
def _rows_of_x(x, row, i, rows, size):
    """[ROWS, inputs], zeros beyond both ends."""
    return tl.load(x + row[:, None] * size + i[None, :], mask=(row < rows)[:, None] & (i < size)[None, :], other=0.0)


@triton.jit
def _pairs(codes, scale, o, start, size, out, FORMAT: tl.constexpr, GROUP: tl.constexpr, DEPTH: tl.constexpr):
    """Four bits: the weights of even and of odd inputs from `start` on, without `scale_2`: float32 [OUT, DEPTH / 2]."""
    j = start // 2 + tl.arange(0, DEPTH // 2)
    stored = (o < out)[:, None] & (j < size // 2)[None, :]
    line = o.to(tl.int64)[:, None]
    byte = tl.load(codes + line * (size // 2) + j[None, :], mask=stored, other=0).to(tl.int32)
    # Beyond the last input scales are 0, or 1 as powers of two, and x is 0.
    s = tl.load(scale + line * (size // GROUP) + (j // (GROUP // 2))[None, :], mask=stored, other=0)
    if FORMAT == "nvfp4":
        s = _e4m3(s.to(tl.int32))
    elif FORMAT == "mxfp4":
        s = _power_of_two(s.to(tl.int32))
    else:
        s = s.to(tl.float32)
    return _nibble(byte & 15, FORMAT) * s, _nibble(byte >> 4, FORMAT) * s


@triton.jit
def _bytes(codes, o, start, size, out, FORMAT: tl.constexpr, DEPTH: tl.constexpr):
    """Eight bits: the codes of the inputs from `start` on, without scales: float32 [OUT, DEPTH]."""
    i = start + tl.arange(0, DEPTH)
    stored = (o < out)[:, None] & (i < size)[None, :]
    code = tl.load(codes + o.to(tl.int64)[:, None] * size + i[None, :], mask=stored, other=0)
    return _e4m3(code.to(tl.int32)) if FORMAT == "fp8" else code.to(tl.float32)


@triton.jit
def _scale_of_rows(scale, o, start, size, out, SCALES: tl.constexpr):
    """float32 [OUT]: what the codes of each row are worth at `start`."""
    if SCALES == "matrix":
        s = tl.load(scale + o * 0)
    elif SCALES == "row":
        s = tl.load(scale + o, mask=o < out, other=0.0)
    else:
        s = tl.load(scale + o // 128 * tl.cdiv(size, 128) + start // 128, mask=o < out, other=0.0)
    return s.to(tl.float32)


@triton.jit
def _nibble(code, FORMAT: tl.constexpr):
    """The value of a code of four bits."""
    if FORMAT == "int4":
        return (code - 8).to(tl.float32)
    # E2M1 at the top of a half's mantissa and exponent is 2^-14 of its value.
    return _half(((code & 7) << 9) | ((code & 8) << 12)) * 16384.0


@triton.jit
def _e4m3(code):
    """The value of a float8_e4m3fn: in a half's places it is 2^-8 of its value, NaN's 480."""
    value = _half(((code & 127) << 7) | ((code & 128) << 8)) * 256.0
    return tl.where((code & 127) == 127, float("nan"), value)


@triton.jit
def _power_of_two(code):
    """2^(code - 127); 255 is NaN."""
    bits = tl.where(code == 0, 1 << 22, tl.where(code == 255, 0x7FC00000, code << 23))
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _half(bits):
    """float32 of the bits of a float16."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
