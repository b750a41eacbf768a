"""Small valid inputs of every kind that the library reads, as documents."""

from __future__ import annotations

import copy
import json
import struct
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import sparing
from sparing.checkpoint.write import save_weights
from sparing.config import parse_config
from sparing.models.loading import build
from sparing.training import RECIPES, train
from sparing.weights.convert import quantize
from tests.checkpoint.gguf_files import gguf_name, interleaved, write_gguf
from tests.cli.models import TEMPLATE, text_tokenizer
from tests.fuzz.documents import decode_gguf, decode_safetensors
from tests.tiny import CONFIGS, SUDOKU_RUN, model, random_ids

__all__ = ["EXTRA_KEYS", "seeds"]

Seeds = dict[str, tuple[dict[str, Any], list[str]]]

CONTEXT = 64
# Beyond those of the library's own tests: keys that files in use have.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": CONFIGS["dense"] | {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "eos_token_id": 1, "head_dim": 8},
    "llama3": CONFIGS["dense"]
    | {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "tie_word_embeddings": True,
        "eos_token_id": [1, 5],
    },
    "qwen2": CONFIGS["dense"] | {"model_type": "qwen2", "use_sliding_window": False, "max_window_layers": 1},
    "qwen3": CONFIGS["dense"] | {"model_type": "qwen3", "head_dim": 8},
    "mistral": CONFIGS["sliding"],
    "gemma3_text": CONFIGS["gemma3"]
    | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "gemma4_text": CONFIGS["shared"]
    | {
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
    },
    "gemma4_moe": CONFIGS["shared value-only mixture"],
    "nemotron_h": CONFIGS["hybrid"] | {"layer_norm_epsilon": 1e-5},
    "diffusion_gemma": CONFIGS["denoiser"],
}
GENERATION = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.01,
    "eos_token_id": [1, 5],
    "repetition_penalty": 1.1,
}
CANVAS = {
    "eos_token_id": 1,
    "max_denoising_steps": 3,
    "t_min": 0.4,
    "t_max": 0.8,
    "sampler_config": {"entropy_bound": 0.1},
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
}
EXTRA_KEYS = [
    *("rope_scaling", "rope_parameters", "layer_types", "attn_logit_softcapping", "quantization_config", "torch_dtype"),
    *("sliding_window", "tie_word_embeddings", "attention_bias", "partial_rotary_factor", "per_layer_config", "dtype"),
    *("original_max_position_embeddings", "use_sliding_window", "max_window_layers", "text_config", "eos_token_id"),
    *("pad_token_id", "bos_token_id", "is_causal", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
    *("stop_strings", "no_repeat_ngram_size", "max_new_tokens", "max_length", "min_new_tokens", "min_length"),
    *("forced_eos_token_id", "presence_penalty", "frequency_penalty", "logit_bias", "chat_template", "unk_token"),
    *("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder", "add_bos_token", "add_eos_token"),
    *("num_hidden_layers", "head_dim", "num_experts", "hybrid_override_pattern", "layers_block_type", "n_groups"),
]
TEMPLATES = {
    "plain": TEMPLATE,
    "long": (
        "{%- set ns = namespace(found=false) -%}{%- macro show(x, n=2) -%}[{{ x|trim }}]{%- endmacro -%}"
        "{%- for m in messages -%}{%- if m['role'] == 'system' and loop.first -%}{%- set ns.found = true -%}"
        "{{ bos_token + show(m.content) }}{%- elif m.content is string -%}<turn>{{ m.role }}\n{{ m.content[:9] }}"
        "{%- else -%}{%- for part in m.content or [] -%}{{ part.text | default('') }}{%- endfor -%}{%- endif -%}"
        "{%- if m.tool_calls -%}{{ m.tool_calls | tojson(indent=2) }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}<turn>assistant\n{%- endif -%}{{ 'a' * 3 ~ range(3)|list ~ 2 ** 3 }}"
        "{{ messages | map(attribute='role') | join(', ') | upper | center(20) | replace('A', 'b') }}"
    ),
}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Once upon"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    },
    {"role": "tool", "content": "3", "name": "f"},
    {"role": "user", "content": "a time"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}]
POLICIES: dict[str, tuple[str, str, dict[str, Any]]] = {  # a model of tests.tiny, policy, options
    "dense": ("dense", "dense", {}),
    "window": ("dense", "window:4", {}),
    "codes": ("dense", "turboquant:4", {"block": 1, "window": 2, "sink_tokens": 1}),
    "outliers": ("dense", "turboquant:2.5", {}),
    "pruned": ("dense", "triattention:8", {"interval": 4}),
    "pruned codes": ("dense", "triattention:8+turboquant:4", {"interval": 4}),
    "sliding": ("sliding", "dense", {}),
    "value-only": ("value-only", "dense", {}),
    "hybrid": ("hybrid", "dense", {"ssm_dtype": "bfloat16"}),
}


def seeds(kind: str) -> Seeds:
    """Documents by name, and the files in each that are to be mutated."""
    return copy.deepcopy(_seeds(kind))


@cache
def _seeds(kind: str) -> Seeds:
    return globals()["_" + kind.replace("-", "_")]()


@cache
def _folder(family: str) -> dict[str, Any]:
    """A model with tokenizer and template."""
    tokenizer = text_tokenizer()
    config = json.loads(json.dumps(FAMILIES[family]))
    for part in (config, config.get("text_config", {})):
        if "vocab_size" in part:
            part |= {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": CONTEXT}
        if "vocab_size_per_layer_input" in part:
            part["vocab_size_per_layer_input"] = tokenizer.get_vocab_size()
    return {
        "config.json": config,
        "generation_config.json": CANVAS if "canvas_length" in config else GENERATION,
        "tokenizer.json": json.loads(tokenizer.to_str()),
        "tokenizer_config.json": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        "chat_template.jinja": TEMPLATE,
        "model.safetensors": _weights(_state(config)),
    }


def _state(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, tensor in build(parse_config(config)).state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        state[name] = 1 + 0.3 * noise if tensor.ndim < 2 else noise * tensor.shape[-1] ** -0.5
    return state


def _weights(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        save_weights(Path(folder) / "m", tensors)
        return decode_safetensors((Path(folder) / "m" / "model.safetensors").read_bytes())


def _config() -> Seeds:
    return {family: (_folder(family), ["config.json"]) for family in FAMILIES}


def _generation() -> Seeds:
    return {family: (_folder(family), ["generation_config.json"]) for family in ("llama", "diffusion_gemma")}


def _tokenizer() -> Seeds:
    return {"byte-level": (_folder("llama"), ["tokenizer.json"])}


def _tokenizer_config() -> Seeds:
    special = {"content": "<extra>", "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document = _folder("llama") | {
        "tokenizer_config.json": {
            "bos_token": "<bos>",
            "eos_token": {"__type": "AddedToken", **special, "content": "<eos>"},
            "pad_token": "<pad>",
            "add_bos_token": True,
            "added_tokens_decoder": {"300": special},
            "additional_special_tokens": ["<turn>", "<end>"],
            "extra_special_tokens": {"turn_token": "<turn>"},
            "chat_template": TEMPLATE,
            "model_max_length": 64,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "special_tokens_map.json": {"bos_token": "<bos>", "unk_token": special | {"content": "<unk>"}},
        "added_tokens.json": {"<end>": 5},
    }
    files = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
    return {"special tokens": (document, files)}


def _template() -> Seeds:
    """The template is a list of pieces: tokens of its language."""
    import re

    pieces = {name: re.findall(r"\w+|\s+|[^\w\s]+", text) for name, text in TEMPLATES.items()}
    return {
        name: ({"pieces.json": found, "messages.json": MESSAGES, "tools.json": TOOLS}, files)
        for name, found in pieces.items()
        for files in [["pieces.json", "pieces.json", "messages.json", "tools.json"]]
    }


def _safetensors() -> Seeds:
    return {name: (_folder(name), ["model.safetensors"]) for name in ("llama", "gemma4_moe", "nemotron_h")}


def _index() -> Seeds:
    document = dict(_folder("llama"))
    del document["model.safetensors"]
    with tempfile.TemporaryDirectory() as folder:
        save_weights(Path(folder) / "m", _state(document["config.json"]), max_shard_bytes=25_000)
        for path in sorted((Path(folder) / "m").iterdir()):
            raw = path.read_bytes()
            document[path.name] = json.loads(raw) if path.suffix == ".json" else decode_safetensors(raw)
    index = "model.safetensors.index.json"
    return {"shards": (document, [index, index, *[name for name in document if name.startswith("model-")]])}


def _gguf() -> Seeds:
    """A llama with a byte-level vocabulary, and a Gemma 4 with experts and a vocabulary of pieces."""
    from tests.checkpoint.test_gguf_config import gemma4_file

    folder = _folder("llama")
    vocabulary = folder["tokenizer.json"]["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = [" ".join(pair) for pair in folder["tokenizer.json"]["model"]["merges"]]
    metadata: dict[str, Any] = {
        "context_length": CONTEXT,
        "embedding_length": 32,
        "block_count": 2,
        "feed_forward_length": 24,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": 8,
        "attention.key_length": 8,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 2.0,
        "rope.scaling.original_context_length": 32,
        "general.sampling.temp": 0.7,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3 if i < 6 else 1 for i in range(len(words))],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }
    import gguf

    tensors = {}
    for name, tensor in _state(folder["config.json"]).items():
        heads = 4 if ".q_proj." in name else 2 if ".k_proj." in name else 0
        tensors[gguf_name(gguf.MODEL_ARCH.LLAMA, 2, name)] = interleaved(tensor, heads) if heads else tensor
    config = {
        "model_type": "gemma4_text",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "vocab_size": 300,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 256,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 300,
        "final_logit_softcapping": 30.0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 12,
    }
    with tempfile.TemporaryDirectory() as out:
        write_gguf(Path(out) / "llama.gguf", "llama", metadata, tensors)
        state = _state(config)
        gemma4_file(Path(out) / "gemma4.gguf", SimpleNamespace(state_dict=lambda: state), config, True)
        llama, gemma4 = (decode_gguf((Path(out) / f"{name}.gguf").read_bytes()) for name in ("llama", "gemma4"))
    pieces = ["<unk>", "<bos>", "<eos>", *[f"<0x{i:02X}>" for i in range(256)], "\u2581", "a", "b", "ab"]
    pieces += [f"<unused{i}>" for i in range(300 - len(pieces))]
    gemma4["metadata"] += [
        ["tokenizer.ggml.model", 8, "gemma4"],
        ["tokenizer.ggml.tokens", 9, [8, pieces]],
        ["tokenizer.ggml.merges", 9, [8, ["a b"]]],
        ["tokenizer.ggml.scores", 9, [6, [-float(i) for i in range(300)]]],
        ["tokenizer.ggml.token_type", 9, [5, [3] * 3 + [6] * 256 + [1] * 41]],
        ["tokenizer.ggml.eos_token_id", 4, 2],
        ["tokenizer.ggml.bos_token_id", 4, 1],
    ]
    return {name: ({"model.gguf": file}, ["model.gguf"]) for name, file in (("llama", llama), ("gemma4", gemma4))}


@cache
def statistics() -> Any:
    return sparing.calibrate(model("dense"), random_ids(40))


def policy_options(name: str) -> tuple[str, str, dict[str, Any]]:
    """A model, a policy and its options, statistics included."""
    of, kv, options = POLICIES[name]
    return of, kv, {**options, "statistics": statistics()} if "triattention" in kv else dict(options)


def _memory() -> Seeds:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in POLICIES:
            of, kv, options = policy_options(name)
            memory = model(of).memory(kv, **options)
            for length in (6, 8):
                model(of).logits(random_ids(length), memory, prompt=memory.length == 0)
            memory.save(Path(folder) / "memory")
            file = decode_safetensors((Path(folder) / "memory").read_bytes())
            # The description is a text inside the header; as a value it can be reached into.
            file["memory"] = json.loads(file["header"]["__metadata__"].pop("memory"))
            found[name] = ({"memory.safetensors": file, "policy.json": name}, ["memory.safetensors"])
    return found


def _statistics() -> Seeds:
    with tempfile.TemporaryDirectory() as folder:
        statistics().save(Path(folder) / "s")
        own = decode_safetensors((Path(folder) / "s").read_bytes())
    heads = {
        f"layer{layer:02}_head{head:02}": {
            part: {"tensor": [4], "value": value}
            for part, value in (("q_mean_real", 0.5), ("q_mean_imag", 0.5), ("q_abs_mean", 1.0))
        }
        for layer in range(2)
        for head in range(4)
    }
    official = {"metadata": {"rope_style": "half", "head_dim": 8}, "stats": heads}
    tria = struct.pack("<II5I", 0x54524941, 1, 2, 4, 2, 8, 4).ljust(64, b"\0") + bytes(16 * 2 * 4 * 4)
    return {
        "own": ({"statistics.safetensors": own}, ["statistics.safetensors"]),
        "official": ({"statistics.pt": official}, ["statistics.pt"]),
        "TRIA": ({"statistics.bin": {"data": tria}}, ["statistics.bin"]),
    }


def _training() -> Seeds:
    with tempfile.TemporaryDirectory() as folder:
        train(RECIPES["recipes/sudoku"], folder, steps=2, set=SUDOKU_RUN, log=lambda record: None)
        state = decode_safetensors((Path(folder) / "state.safetensors").read_bytes())
        log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    state["run"] = json.loads(state["header"]["__metadata__"].pop("run"))
    return {"run": ({"run/state.safetensors": state, "run/log.jsonl": log}, ["run/state.safetensors", "run/log.jsonl"])}


def _quantise() -> Seeds:
    """The state of a run that was finished except for its config.json."""
    document = {f"in/{name}": content for name, content in _folder("llama").items()}
    from tests.fuzz.documents import encode, write_folder

    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), {name: encode(name, content) for name, content in document.items()})
        quantize(Path(folder) / "in", Path(folder) / "out", weights="int8")
        for path in sorted((Path(folder) / "out").iterdir()):
            if path.suffix == ".json" and path.name != "config.json":
                document[f"out/{path.name}"] = json.loads(path.read_bytes())
            elif path.suffix == ".safetensors":
                document[f"out/{path.name}"] = decode_safetensors(path.read_bytes())
    return {"resumed": (document, ["out/quantization.json"])}


def _policy() -> Seeds:
    """Calls of `model.memory`: the policy as pieces of its language, and its options."""
    found = {}
    for name, (of, kv, options) in POLICIES.items():
        found[name] = ({"of.json": of, "call": {"kv": [kv], "options": options}}, ["call"])
    found["written"] = (
        {"of.json": "dense", "call": {"kv": ["turboquant:", "k4", "v", "8", "+", "triattention:", "8"], "options": {}}},
        ["call"],
    )
    return found


def _arguments() -> Seeds:
    """Calls of `sparing.generate`."""
    calls = {
        "text": {"prompt": "Once", "temperature": 0.5, "top_k": 5, "top_p": 0.9, "seed": 1, "stop": ["x", 5]},
        "ids": {"prompt": [2, 7, 9], "decoder": "autoregressive", "min_p": 0.1, "repetition_penalty": 1.2},
        "chat": {"prompt": [{"role": "user", "content": "Once"}], "logprobs": True, "kv": "turboquant:4"},
        "rows": {"prompt": ["Once", "upon a"], "decoder": "speculative", "draft": "ngram", "draft_tokens": 2},
        "canvas": {"prompt": "Once", "canvas": "upon", "fixed": [0], "entropy_bound": 0.1, "t_min": 0.4, "t_max": 0.8,
                   "max_denoising_steps": 2, "stability_threshold": 1, "confidence_threshold": 0.005},
    }  # fmt: skip
    return {name: ({"call": {"max_new_tokens": 4, **call}}, ["call"]) for name, call in calls.items()}


def _command_line() -> Seeds:
    """Arguments of commands that write nothing."""
    lines = [
        "generate MODEL Once --max-new-tokens 3 --temperature 0.5 --top-k 3 --seed 1 --stop x --kv turboquant:4",
        "generate MODEL Once upon --max-new-tokens 2 --draft ngram --draft-tokens 2 --json",
        "plan MODEL --context 64 --batch 2 --kv window:16 --weights int8 --hardware H100 --new-tokens 4 --json",
        "plan gemma-4-e2b --context 4096 --steps 3 --kv triattention:512",
        "inspect MODEL --kv turboquant:4 --context 20 --json",
        "compare MODEL Once --kv dense --kv turboquant:4 --max-new-tokens 2 --seed 1 --json",
        "chat MODEL --system x --max-new-tokens 2 --repetition-penalty 1.1",
    ]
    return {line.split()[0] + f" {i}": ({"call": line.split()}, ["call"]) for i, line in enumerate(lines)}
