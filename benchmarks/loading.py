"""Peak memory of loading a checkpoint, as a multiple of its size, against transformers.

    python benchmarks/loading.py

Each side loads in a fresh process; the peak is counted above what its imports took. Linux only.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from harness import child_json, peak_rss, write_result


def save(folder: str) -> None:
    """A Llama of about 150 M parameters in bfloat16: 300 MB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def load(side: str, folder: str) -> dict[str, int]:
    """Load in this process; every weight is read once, so that a mapped file counts as memory on both sides."""
    if side == "sparing":
        import sparing.models.llama

        def build() -> object:
            return sparing.load(folder, device="cpu")
    else:
        import torch
        from transformers import LlamaForCausalLM

        def build() -> object:
            return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    before = peak_rss()
    model = build()
    for parameter in model.parameters():  # type: ignore[attr-defined]
        parameter.detach().sum()
    return {"bytes": peak_rss() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "FOLDER"), help="load in this process, print JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(load(*arguments.one)))
        return
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        peaks = {
            side: child_json(__file__, ["--one", side, folder], 1)["bytes"] for side in ("sparing", "transformers")
        }
    result = {"checkpoint_bytes": size, "peak_bytes": peaks, "peak_share": {k: v / size for k, v in peaks.items()}}
    print(result)
    write_result("loading", result)


if __name__ == "__main__":
    main()
