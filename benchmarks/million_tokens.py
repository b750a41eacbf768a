"""What DeepSeek-V4 holds and does for a token as its context grows: counted on a small model, then by the same formulas
for the released ones at a million tokens, beside DeepSeek-V3.2.

    python benchmarks/million_tokens.py

The model is that of `deepseek_v4.py`, with random weights and kv="released"; entries of 1 k to 128 k tokens are drawn
at random. `held` is what its memory says it holds, `resident` its allocations, head-room included. In one step at each
length every native product counts its operations by the role of its matrix, attention the entries that its queries
read, the indexer the keys that it scores; in units of FP8 operations as DeepSeek's reports compare models
(`planning/fp8.py`). Both equal the planner's closed forms, or the benchmark fails. `million` is what these say of
the released models; with_fp8_keys: where the indexer's keys are held in FP8, as engines without FP4 do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from deepseek_v4 import SMALL, drawn, give
from harness import write_result

CONTEXTS = (1024, 4096, 16384, 65536, 131072)
MILLION = 10**6
GROWTH = (*CONTEXTS, 2**18, 2**19, MILLION)


class Counted:
    """The native kernels, which count their operations on the way. roles: of weights, by their address."""

    def __init__(self, native: Any, roles: dict[int, Any], done: Counter[Any]):
        self.native, self.roles, self.done = native, roles, done

    def __getattr__(self, name: str) -> Any:
        kernel, count = getattr(self.native, name), getattr(self, f"of_{name}", None)
        if count is None:
            return kernel

        def counting(**fields: Any) -> Any:
            for weight, operations in count(fields):
                self.done[self.roles[weight.data_ptr()]] += operations
            return kernel(**fields)

        return counting

    @staticmethod
    def of_product(f: dict[str, Any]) -> Iterator[tuple[Any, int]]:
        for weight in (f["w"], f.get("w2")):
            if weight is not None:
                yield weight, 2 * f["rows"] * f["inputs"] * f["outputs"] * f.get("groups", 1)

    @staticmethod
    def of_experts(f: dict[str, Any]) -> Iterator[tuple[Any, int]]:
        products = 2 * f["tokens"] * f["k"] * f["inputs"] * f["width"]
        yield f["up"], 2 * products  # gate and up
        yield f["down"], products

    @staticmethod
    def of_route(f: dict[str, Any]) -> Iterator[tuple[Any, int]]:
        yield f["gate"], 2 * f["tokens"] * f["inputs"] * f["experts"]

    @staticmethod
    def of_hyper_pre(f: dict[str, Any]) -> Iterator[tuple[Any, int]]:
        yield f["fn"], 2 * f["tokens"] * f["fn"].numel()


@contextmanager
def counting(model: Any) -> Iterator[Counter[Any]]:
    """Operations by role, "attention" and "indexer", each as one, and "entries" and "keys" that are read."""
    from sparing.kernels import dispatch
    from sparing.memory import compressed

    done: Counter[Any] = Counter()
    attend, select, native = compressed.attend_joint, compressed.select_rows, dispatch.native

    def attended(q: Any, window: Any, entries: Any, layer: int, *, selected: Any = None, **more: Any) -> Any:
        (row,) = window.rows  # of one query
        read = min(row.window, row.entries)
        if selected is not None:
            read += int((selected >= 0).sum())
        elif entries is not None:
            read += entries.rows[0].entries
        done["entries"] += read
        done["attention"] += 4 * read * q.shape[1] * q.shape[2]
        return attend(q, window, entries, layer, selected=selected, **more)

    def selecting(q: Any, w: Any, table: Any, layer: int, **more: Any) -> Any:
        done["keys"] += table.rows[0].entries
        done["indexer"] += 2 * table.rows[0].entries * q.shape[1] * q.shape[2]
        return select(q, w, table, layer, **more)

    roles = {tensor.data_ptr(): role for _, role, _, tensor in model.parts()}
    compressed.attend_joint, compressed.select_rows = attended, selecting
    dispatch.native = Counted(native, roles, done)
    try:
        yield done
    finally:
        compressed.attend_joint, compressed.select_rows, dispatch.native = attend, select, native


def small() -> dict[str, Any]:
    """Bytes and operations of the small model at each context."""
    import torch

    from sparing.config import parse_config
    from sparing.config.policy import apply_policy, parse_policy
    from sparing.kernels import dispatch
    from sparing.memory.sequence import resident_bytes
    from sparing.models.batch import Row
    from sparing.models.loading import build
    from sparing.planning.fp8 import IN_16_BITS, fp8_operations
    from sparing.planning.memory import memory_by_kind

    if dispatch.active() == dispatch.REFERENCE:
        raise SystemExit("the native kernels count: build the package with a C++ compiler")
    torch.manual_seed(0)
    config = parse_config(SMALL | {"dtype": "float32"})
    model = build(config).to_empty(device="cpu").float().eval().requires_grad_(False)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("tid2eid"):
            tensor.copy_(torch.rand(len(tensor), SMALL["n_routed_experts"]).argsort(1)[:, : tensor.shape[1]])
        else:
            tensor.normal_(1.0 if tensor.ndim == 1 else 0.0, 0.02)
    specs = apply_policy(config.memory_specs(), parse_policy("released"))
    rows = []
    for context in CONTEXTS:
        memory = model.memory("released")
        give(memory, context, drawn(memory, context))
        held = {"held": memory.nbytes, "resident": resident_bytes([memory])}
        planned = sum(memory_by_kind(specs, context, 4).values())
        with torch.inference_mode(), counting(model) as done:
            model.head(model.run([Row(torch.tensor([7]), memory, wanted=1)]))
        read = {"entries": done.pop("entries"), "keys": done.pop("keys", 0)}
        operations = {"attention": 2.0 * done.pop("attention"), "indexer": done.pop("indexer", 0) / 2}
        wide = IN_16_BITS["deepseek_v4"]
        operations["weights"] = float(sum(n for role, n in done.items() if role not in wide))
        operations["weights_16_bits"] = 2.0 * sum(n for role, n in done.items() if role in wide)
        expected = fp8_operations(config, specs, context + 1)
        if held["held"] != planned or operations != expected:
            raise SystemExit(f"{context}: {held['held']} bytes, {operations}; planned {planned} and {expected}")
        whole = {part: int(n) for part, n in operations.items()}
        rows.append({"context": context, "bytes": held, "read": read, "operations": whole})
        print(
            f"{context:7} tokens: {held['held']:9} bytes, {sum(operations.values()) / 1e6:6.1f} M operations",
            flush=True,
        )
    return {"config": SMALL, "contexts": rows}


def million() -> dict[str, Any]:
    """Bytes and operations of the released models as their context grows; at its end also as shares of V3.2's."""
    from sparing.config import planned_config
    from sparing.config.policy import apply_policy, parse_policy
    from sparing.config.released import RELEASED
    from sparing.planning.fp8 import fp8_operations
    from sparing.planning.memory import memory_by_kind

    def held(specs: Any, tokens: int = MILLION) -> int:
        parts = memory_by_kind(specs, tokens, 2)
        parts.pop("compressors", None)  # open windows, which the report does not count
        return sum(parts.values())

    result: dict[str, Any] = {}
    for name in ("deepseek-v3.2", "deepseek-v4-pro", "deepseek-v4-flash"):
        config = planned_config(RELEASED[name])
        specs: list[Any] = list(apply_policy(config.memory_specs(), parse_policy("released")))
        result[name] = row = {
            "bytes": {tokens: held(specs, tokens) for tokens in GROWTH},
            "operations": {tokens: sum(fp8_operations(config, specs, tokens).values()) for tokens in GROWTH},
        }
        if name != "deepseek-v3.2":
            other = result["deepseek-v3.2"]
            wider = [replace(spec, codes=replace(spec.codes, key_bits=8)) for spec in specs]
            for what in ("bytes", "operations"):
                row[f"{what}_share"] = row[what][MILLION] / other[what][MILLION]
                row[f"{what}_ratio"] = other[what][MILLION] / row[what][MILLION]
            row["bytes_ratio_with_fp8_keys"] = other["bytes"][MILLION] / held(wider)
            print(name, {key: value for key, value in row.items() if "_" in key})
    return result


if __name__ == "__main__":
    write_result("million_tokens", {"small": small(), "million": million()})
