"""Greedy decoding at batch 1 against llama.cpp on the CPU, on the same random Llama of 220 M parameters.

    python benchmarks/llama_cpp.py --bin LLAMA_CPP/build/bin [--threads 1] [--rounds 5]

llama.cpp is no dependency: build it first, without a GPU, for the CPU it will run on. Its source is also inside the
source distribution of llama-cpp-python (`pip download --no-deps --no-binary llama-cpp-python llama-cpp-python`, then
vendor/llama.cpp):

    cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF
    cmake --build build --target llama-bench llama-quantize

The weights are written to a GGUF file in bfloat16 and converted by `llama-quantize --pure`. The table that is embedding
and head has the kind of all others there; ours is int8 beside both kinds. `bytes` says what a step reads of either. The
two programs take turns: a round is one run of `llama-bench` and as many steps of ours for each kind of weights, both
with the same number of threads and 256 tokens in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from decode import PROMPT, WARM, Ours, llama
from harness import interleave, read_bandwidth, spread, write_result
from packed_decode import read_bytes

STEPS = 24
KINDS = {"bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}  # ours: theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bin", type=Path, help="folder with llama-bench and llama-quantize; without it nothing is done"
    )
    parser.add_argument("--version", help="of llama.cpp, where its build knows none: one without its git repository")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    if arguments.bin is None:
        print("llama.cpp is not measured: build it and give --bin")
        return

    import torch

    import sparing

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        theirs = llama().to(torch.bfloat16).eval()
        theirs.save_pretrained(folder)
        files = write_files(arguments.bin, folder, theirs)
        del theirs
        weights = {side: "stored" if side == "bfloat16" else side for side in KINDS}
        ours = {side: sparing.load(folder, weights=packed, device="cpu") for side, packed in weights.items()}
        rows = []
        for threads in arguments.threads:
            rows.append(measure(arguments, files, ours, threads))
            print(lines(rows[-1]), flush=True)
    if not arguments.dry:
        write_result("llama_cpp", {"prompt": PROMPT, "steps": STEPS, "rounds": arguments.rounds, "rows": rows})


def measure(
    arguments: argparse.Namespace, files: dict[str, Path], ours: dict[str, Any], threads: int
) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads)
    prompt = torch.randint(8, 30000, (PROMPT,), generator=torch.Generator().manual_seed(1))
    speeds: dict[str, dict[str, list[float]]] = {side: {"sparing": [], "llama.cpp": []} for side in ours}
    version, nbytes = arguments.version, {}
    for _ in range(arguments.rounds):
        for side, model in ours.items():
            bench = run_llama_bench(arguments.bin / "llama-bench", files[side], threads)
            nbytes[side] = bench["model_size"]
            if bench["build_number"]:
                version = f"b{bench['build_number']} ({bench['build_commit']})"
            speeds[side]["llama.cpp"].append(bench["avg_ts"])
            with torch.inference_mode():
                decoder = Ours(model)
                decoder.start(prompt)
                interleave({side: decoder.step}, WARM)
                speeds[side]["sparing"].append(STEPS / sum(interleave({side: decoder.step}, STEPS)[side]))
    rows = {}
    for side, both in speeds.items():
        pairs = zip(both["sparing"], both["llama.cpp"], strict=True)
        rows[side] = {
            "sparing": {"bytes": read_bytes(ours[side]), "tokens_per_second": spread(both["sparing"])},
            "llama.cpp": {
                "weights": KINDS[side],
                "bytes": nbytes[side],
                "tokens_per_second": spread(both["llama.cpp"]),
            },
            "ratio": spread([mine / their for mine, their in pairs]),
        }
    return {"threads": threads, "llama.cpp": version, "read_bytes_per_second": read_bandwidth(threads), "rows": rows}


def run_llama_bench(program: Path, file: Path, threads: int) -> dict[str, Any]:
    """One run of generated tokens after a prompt: llama-bench's own report of it."""
    options = {"-m": file, "-p": 0, "-n": STEPS, "-d": PROMPT, "-t": threads, "-r": 1, "-ngl": 0, "-o": "jsonl"}
    command = [str(program), *(str(part) for option in options.items() for part in option)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def write_files(programs: Path, folder: Path, model: Any) -> dict[str, Path]:
    """The same model as GGUF files, by the name of our side."""
    files = {side: folder / f"{kind}.gguf" for side, kind in KINDS.items()}
    write_gguf(files["bfloat16"], model)
    for side, kind in KINDS.items():
        if side != "bfloat16":
            command = [programs / "llama-quantize", "--pure", files["bfloat16"], files[side], kind]
            subprocess.run(command, capture_output=True, check=True)
    return files


def write_gguf(path: Path, model: Any) -> None:
    """A transformers Llama in bfloat16; the vocabulary is of made-up words, which llama-bench never looks at."""
    import torch
    from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map

    config = model.config
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *(f"t{i}" for i in range(config.vocab_size - 259))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)])
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        for heads, part in ((config.num_attention_heads, ".q_proj."), (config.num_key_value_heads, ".k_proj.")):
            if part in name:  # rotary pairs lie side by side there
                tensor = tensor.view(heads, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        known = names.get_name(name, (".weight",))
        assert known is not None
        if tensor.ndim == 1:
            writer.add_tensor(known, tensor.float().numpy())
        else:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(known, raw, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def lines(result: dict[str, Any]) -> str:
    text = [f"{result['threads']} threads, {result['read_bytes_per_second'] / 1e9:.0f} GB/s"]
    for side, row in result["rows"].items():
        mine, their, ratio = row["sparing"], row["llama.cpp"], row["ratio"]
        text.append(
            f"    {side:9}{mine['bytes'] / 1e6:5.0f} MB {mine['tokens_per_second']['median']:7.1f} tok/s | "
            f"{their['weights']:5}{their['bytes'] / 1e6:5.0f} MB {their['tokens_per_second']['median']:7.1f} tok/s | "
            f"{ratio['median']:.2f}x ({ratio['min']:.2f}-{ratio['max']:.2f})"
        )
    return "\n".join(text)


if __name__ == "__main__":
    main()
