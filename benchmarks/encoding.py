"""How fast keys and values become TurboQuant codes, beside how fast a model makes them.

    python benchmarks/encoding.py [THREADS]   (default 1)

Per shape of a model: tokens a second whose keys and values are encoded and packed, of all layers. For SmolLM2 135M (the
extra [smollm2]) also the prefill of a prompt with a dense memory and with codes, in turn.
"""

from __future__ import annotations

import sys

from harness import interleave, spread, write_result

TOKENS, CHUNK, ROUNDS = 1024, 1024, 9
SHAPES = {  # layers, key-value heads, head size
    "SmolLM2 135M": (30, 3, 64),
    "Llama 3.1 8B": (32, 8, 128),
    "Gemma 4 12B, full layers": (8, 1, 512),
}
POLICIES = (
    ("turboquant:4", {}),
    ("turboquant:3", {}),
    ("turboquant:2", {}),
    ("turboquant:8", {}),
    ("turboquant:3.5", {}),
    ("turboquant:4", {"rotation": "haar"}),
    ("turboquant:4", {"variant": "prod"}),
)


def main() -> None:
    import torch

    import sparing
    from sparing.config.policy import parse_policy
    from sparing.memory.turboquant.code_extents import CodeExtents
    from sparing.memory.turboquant.coder import make_coder

    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    rows = []
    for shape, (layers, heads, d) in SHAPES.items():
        k, v = torch.randn(2, CHUNK, heads, d, generator=torch.Generator().manual_seed(0))

        def encode(kv: str, options: dict, k=k, v=v, heads=heads, d=d) -> None:
            policy = parse_policy(kv, options).store
            assert policy is not None
            for role, x in (("keys", k), ("values", v)):
                coder = make_coder(policy, 0, role, heads, d, k.device).learnt(x)
                codes = CodeExtents(coder, 1)
                codes.make_room(len(x))
                codes.write(0, 0, coder.encode(x))

        sides = {f"{kv} {' '.join(options.values())}".strip(): (kv, options) for kv, options in POLICIES}
        with torch.inference_mode():
            interleave({name: lambda p=policy: encode(*p) for name, policy in sides.items()}, 1)
            seconds = interleave({name: lambda p=policy: encode(*p) for name, policy in sides.items()}, ROUNDS)
        for name, times in seconds.items():
            row = {
                "shape": shape,
                "policy": name,
                "tokens_per_second": spread([CHUNK / (layers * t) for t in times]),
                "nanoseconds_per_vector": spread([1e9 * t / (2 * CHUNK * heads) for t in times]),
            }
            print(row, flush=True)
            rows.append(row)

    model = sparing.load("smollm2", dtype="float32", device="cpu")
    ids = torch.arange(TOKENS) % 40000 + 100

    def prefill(kv: str) -> None:
        memory = model.memory(kv)
        for chunk in ids.split(CHUNK):
            model.run([sparing.models.batch.Row(chunk, memory, wanted=1)])
            memory.commit(len(chunk))

    calls = {kv: lambda kv=kv: prefill(kv) for kv in ("dense", "turboquant:4", "turboquant:3")}
    interleave(calls, 1)
    times = interleave(calls, 5)
    whole = {kv: {"tokens_per_second": spread([TOKENS / t for t in one])} for kv, one in times.items()}
    print(whole)
    write_result("encoding", {"threads": torch.get_num_threads(), "rows": rows, "prefill_smollm2": whole})


if __name__ == "__main__":
    main()
