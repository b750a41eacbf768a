"""Compile the kernel for a GPU that need not be there, and print the bytes of shared memory that programs use."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparing.kernels.gpu import codes

STREAM = ("*i32", "i32", "i32", "*fp16", "i32", "i32", "*fp32")


def shared_memory(rows: int, keys: codes.Shapes, values: codes.Shapes, bias: str, precision: str) -> int:
    settings = codes.program(rows, keys, values)
    options = {name: settings.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"GROUP": 4, "KEYS": keys, "VALUES": values, "PRECISION": precision, **settings}
    signature = {
        "q": tuple(("*fp32", "i32", "i32", "i32") for _ in keys),
        "keys": tuple(STREAM for _ in keys),
        "values": tuple(STREAM for _ in values),
        "out": tuple("*fp32" for _ in values),
        "lse": "*fp32",
        "bias": bias,
        **dict.fromkeys(("bias_token", "bias_head", "bias_key", "n", "tokens", "stretch"), "i32"),
        "scale": "fp32",
        **dict.fromkeys(constants, "constexpr"),
    }
    if bias == "constexpr":
        constants["bias"] = None
    source = ASTSource(codes._attend, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared


print(shared_memory(16, ((512, 4),), ((512, 3),), "constexpr", "bf16x3"))
print(shared_memory(4, ((128, 2), (128, 1)), ((96, 2), (32, 3)), "*fp32", "tf32"))
