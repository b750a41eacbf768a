"""Compile kernels for a GPU that need not be there, and print the bytes of shared memory that each program uses.

python compile_kernels.py codes|packed
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparing.kernels.gpu import codes, packed

STREAM = ("*i32", "i32", "i32", "*fp16", "i32", "i32", "*fp32")


def shared_memory(kernel, signature: dict, constants: dict, settings: dict) -> int:
    options = {name: settings.pop(name) for name in ("num_warps", "num_stages") if name in settings}
    constants = {**constants, **settings, **{n: None for n, kind in signature.items() if kind == "constexpr"}}
    signature = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared


def over_codes(rows: int, keys: codes.Shapes, values: codes.Shapes, bias: str, precision: str) -> int:
    signature = {
        "q": tuple(("*fp32", "i32", "i32", "i32") for _ in keys),
        "keys": tuple(STREAM for _ in keys),
        "values": tuple(STREAM for _ in values),
        "out": tuple("*fp32" for _ in values),
        "lse": "*fp32",
        "bias": bias,
        **dict.fromkeys(("bias_token", "bias_head", "bias_key", "n", "tokens", "stretch"), "i32"),
        "scale": "fp32",
    }
    constants = {"GROUP": 4, "KEYS": keys, "VALUES": values, "PRECISION": precision}
    return shared_memory(codes._attend, signature, constants, codes.program(rows, keys, values))


def weight(format: str, scales: str) -> tuple[dict, dict]:
    """Signature and constants of what every kernel of packed weights takes."""
    kinds = {
        "int8": ("*i8", "*fp32", 0),
        "fp8": ("*u8", "*fp32", 0),
        "int4": ("*u8", "*bf16", 32),
        "nvfp4": ("*u8", "*u8", 16),
        "mxfp4": ("*u8", "*u8", 32),
    }
    code, scale, group = kinds[format]
    scale_2 = "*fp32" if format == "nvfp4" else "constexpr"
    return {"codes": code, "scale": scale, "scale_2": scale_2}, {"FORMAT": format, "SCALES": scales, "GROUP": group}


def product(format: str, scales: str, rows: int, dtype: torch.dtype, out: str, bias: str, precision: str) -> int:
    tensors, constants = weight(format, scales)
    kind = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    signature = {
        "x": kind,
        **tensors,
        "bias": bias,
        "y": out,
        **dict.fromkeys(("rows", "size", "out", "stretch"), "i32"),
    }
    return shared_memory(
        packed._multiply, signature, {**constants, "PRECISION": precision}, packed.product_program(rows, dtype)
    )


def unpacking(format: str, scales: str, out: str) -> int:
    tensors, constants = weight(format, scales)
    signature = {**tensors, "y": out, **dict.fromkeys(("first", "stop", "size"), "i32")}
    return shared_memory(packed._unpack, signature, constants, {"OUT": packed.OUT, "DEPTH": packed.DEPTH})


if sys.argv[1] == "codes":
    print(over_codes(16, ((512, 4),), ((512, 3),), "constexpr", "bf16x3"))
    print(over_codes(4, ((128, 2), (128, 1)), ((96, 2), (32, 3)), "*fp32", "tf32"))
else:
    most = packed.FEW_ROWS
    for format, scales in (
        ("int8", "row"),
        ("fp8", "block"),
        ("int4", "block"),
        ("nvfp4", "block"),
        ("mxfp4", "block"),
    ):
        print(product(format, scales, 1, torch.bfloat16, "*fp32", "constexpr", "bf16x3"))
        print(product(format, scales, most, torch.float32, "*fp32", "*fp32", "bf16x3"))
    print(product("fp8", "matrix", most, torch.float16, "*fp16", "*fp16", "bf16x3"))
    print(unpacking("nvfp4", "block", "*bf16"))
    print(unpacking("fp8", "row", "*fp32"))
