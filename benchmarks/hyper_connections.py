"""Hyper-connections of DeepSeek-V4: native kernels, plain PyTorch and transformers on the same random parameters.

    python benchmarks/hyper_connections.py [--size 1024 4096] [--threads 1 2]

A step is what stands around one branch: weights made of the streams, the streams read as one, and mixed after it. Its
gradients are those of streams and parameters. The matrices are 8,192 of 4 x 4 in 20 rounds, tokens last or one by one.
Results agree before anything is timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any

from harness import child_json, interleave, spread, write_result

STREAMS = 4
TOKENS = (1, 16, 512)
ROUNDS, NUMBERS = 15, 1 << 20  # numbers of streams that one timing runs over


def again(call: Callable[[], object], times: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(times):
            call()

    return repeated


def medians(sides: Mapping[str, Callable[[], object]], times: int) -> dict[str, dict[str, float]]:
    """Microseconds of a call."""
    repeated = {name: again(call, times) for name, call in sides.items()}
    interleave(repeated, 2)
    found = interleave(repeated, ROUNDS)
    return {name: spread([1e6 * s / times for s in seconds]) for name, seconds in found.items()}


class Step:
    """One sub-block of a size and a type, by whoever computes it."""

    def __init__(self, size: int, tokens: int, dtype: Any):
        import torch
        from transformers import DeepseekV4Config
        from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

        torch.manual_seed(0)
        self.module = DeepseekV4HyperConnection(DeepseekV4Config(hidden_size=size, hc_mult=STREAMS))
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.normal_(std=1.0 if parameter.ndim == 1 else (STREAMS * size) ** -0.5)
        self.X = torch.randn(1, tokens, STREAMS, size).to(dtype)
        self.y = torch.randn(1, tokens, size).to(dtype)

    def ours(self) -> Any:
        from sparing.kernels.hyper_connections import hc_post, hc_pre

        u, post, comb = hc_pre(self.X, self.module.fn, self.module.base, self.module.scale)
        return u, hc_post(self.X, self.y, post, comb)

    def reference(self) -> Any:
        from sparing.kernels import dispatch

        before = dispatch.active()
        dispatch.use("reference")
        try:
            return self.ours()
        finally:
            dispatch.use(before)

    def transformers(self) -> Any:
        """As its decoder layer, which rounds post and comb to the type of the streams."""
        post, comb, u = self.module(self.X)
        post, comb = post.to(self.X.dtype), comb.to(self.X.dtype)
        return u, post[..., None] * self.y[..., None, :] + comb.mT @ self.X

    def gradients(self, side: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            u, mixed = side()
            (u.sum() + mixed.square().sum()).backward()
            self.module.zero_grad()
            self.X.grad = None

        return run


def time_steps(size: int) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {}
    for tokens in TOKENS:
        times = max(1, NUMBERS // (tokens * STREAMS * size))
        for dtype in (torch.float32, torch.bfloat16):
            step = Step(size, tokens, dtype)
            with torch.inference_mode():
                for one, other in zip(step.ours(), step.transformers(), strict=True):
                    torch.testing.assert_close(one.float(), other.float(), rtol=0.02, atol=0.2)
                sides = {"ours": step.ours, "reference": step.reference, "transformers": step.transformers}
                found[f"{tokens} tokens, {str(dtype).removeprefix('torch.')}"] = medians(sides, times)
        step = Step(size, tokens, torch.float32)
        step.X.requires_grad_()
        sides = {"ours": step.gradients(step.ours), "transformers": step.gradients(step.transformers)}
        found[f"{tokens} tokens, float32, with gradients"] = medians(sides, max(1, times // 4))
    return found


def time_matrices() -> dict[str, Any]:
    import torch

    from sparing.kernels.hyper_connections import sinkhorn

    def one_by_one() -> torch.Tensor:
        matrix = torch.softmax(logits, -1) + 1e-6
        matrix = matrix / (matrix.sum(-2, keepdim=True) + 1e-6)
        for _ in range(19):
            matrix = matrix / (matrix.sum(-1, keepdim=True) + 1e-6)
            matrix = matrix / (matrix.sum(-2, keepdim=True) + 1e-6)
        return matrix

    logits = torch.randn(8192, STREAMS, STREAMS)
    assert torch.equal(sinkhorn(logits), one_by_one())
    return medians({"tokens last": lambda: sinkhorn(logits), "one by one": one_by_one}, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        found = {f"size {size}": time_steps(size) for size in args.size}
        print(json.dumps({**found, "matrices": time_matrices()}))
        return
    sizes = ["--child", "--size", *map(str, args.size)]
    result: dict[str, Any] = {"streams": STREAMS, "unit": "microseconds"}
    for threads in args.threads:
        result[f"{threads} threads"] = child_json(__file__, sizes, threads)
    write_result("hyper_connections", result)


if __name__ == "__main__":
    main()
