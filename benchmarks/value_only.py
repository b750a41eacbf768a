"""A layer whose keys and values are one projection: what storing values alone saves, and what it costs a step.

    python benchmarks/value_only.py

One full attention layer of Gemma 4's shape (4 key-value heads of 512, 32 query heads) over 4096 entries.
"""

from __future__ import annotations

from harness import interleave, spread, write_result

CONTEXT, KV_HEADS, HEADS, HEAD_DIM, STEPS = 4096, 4, 32, 512, 24
CONFIG = {
    "model_type": "gemma4_text",
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "layer_types": ["full_attention"],
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_global_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "global_head_dim": HEAD_DIM,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 1024,
}


def main() -> None:
    import torch

    from sparing import kernels
    from sparing.config import parse_config
    from sparing.memory.attention import AttentionMemory
    from sparing.memory.dense import Buffer, KeyValueStorage
    from sparing.memory.spec import AttentionSpec
    from sparing.memory.value_only import ValueOnlyStorage
    from sparing.models.gemma4 import Attention

    generator = torch.Generator().manual_seed(0)
    config = parse_config(CONFIG)
    layer = Attention(config, config.layers[0])
    torch.nn.init.uniform_(layer.k_norm.weight, 0.5, 1.5, generator)
    keys = layer.keys_from_values

    rows = []
    for dtype in (torch.bfloat16, torch.float32):

        def buffer(dtype: torch.dtype = dtype) -> Buffer:
            return Buffer(KV_HEADS, HEAD_DIM, dtype, torch.device("cpu"))

        memories = {
            "dense": AttentionMemory(AttentionSpec(KV_HEADS, HEAD_DIM), KeyValueStorage(buffer(), buffer())),
            "value_only": AttentionMemory(
                AttentionSpec(KV_HEADS, HEAD_DIM, value_only=True), ValueOnlyStorage(buffer(), keys)
            ),
        }
        v = kernels.rms_norm(torch.randn(CONTEXT, KV_HEADS, HEAD_DIM, generator=generator)).to(dtype)
        k = keys(v.transpose(0, 1), torch.arange(CONTEXT)).transpose(0, 1)
        q = torch.randn(1, HEADS, HEAD_DIM, generator=generator).to(dtype)
        for memory in memories.values():
            memory.stage(k, v)
            memory.commit(CONTEXT)

        def step(memory: AttentionMemory, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> None:
            memory.stage(k[-1:], v[-1:])
            memory.attend(q, scale=1.0, causal=True)
            memory.commit(0)

        with torch.inference_mode():
            calls = {name: lambda m=m, k=k, v=v, q=q: step(m, k, v, q) for name, m in memories.items()}
            interleave(calls, 2)
            seconds = interleave(calls, STEPS)
        ratios = [alone / both for both, alone in zip(seconds["dense"], seconds["value_only"], strict=True)]
        row = {
            "dtype": str(dtype).removeprefix("torch."),
            "bytes": {name: memory.nbytes for name, memory in memories.items()},
            "step_seconds": {name: spread(values) for name, values in seconds.items()},
            "step_ratio": spread(ratios),
        }
        print(row, flush=True)
        rows.append(row)
    write_result("value_only", {"context": CONTEXT, "threads": torch.get_num_threads(), "rows": rows})


if __name__ == "__main__":
    main()
