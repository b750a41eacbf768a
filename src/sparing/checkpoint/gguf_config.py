"""GGUF's names for tensors and settings, put back into Hugging Face's, for the architectures that are understood."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparing.checkpoint.gguf_vocabulary import end_ids, token_id
from sparing.errors import CheckpointError

__all__ = ["ARCHITECTURES", "generation_config", "hf_config", "hf_names"]

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma4": "gemma4_text"}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma4": "Gemma4ForCausalLM",
}

OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

# blk.N.X.weight -> model.layers.N.Y.weight
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA4_OUTER = {
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
}
GEMMA4_BLOCK = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "ffn_gate_inp": "router.proj",
}
# names without `.weight` on the Hugging Face side
GEMMA4_WHOLE = {
    "layer_output_scale.weight": "layer_scalar",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
}


def hf_names(
    path: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[str, ...]]:
    """Hugging Face name -> the one or two tensors of the file it is made of.

    Raises CheckpointError for a tensor without a known name.
    """
    gemma = config["model_type"] == "gemma4_text"
    outer = OUTER | GEMMA4_OUTER if gemma else OUTER
    block = BLOCK | GEMMA4_BLOCK if gemma else BLOCK
    whole = GEMMA4_WHOLE if gemma else {}
    names: dict[str, tuple[str, ...]] = {}
    for name in shapes:
        match = re.fullmatch(r"blk\.(\d+)\.((.+)\.(weight|bias|scale))", name)
        if name.startswith("rope_freqs."):
            continue  # part of the config: the stretching of the rotary frequencies
        if name in outer:
            names[outer[name]] = (name,)
        elif match and match[2] in whole:
            names[f"model.layers.{match[1]}.{whole[match[2]]}"] = (name,)
        elif match and match[3] in block and match[4] != "scale":
            names[f"model.layers.{match[1]}.{block[match[3]]}.{match[4]}"] = (name,)
        elif match and gemma and match[3] in ("ffn_gate_exps", "ffn_up_exps"):
            layer = f"blk.{match[1]}."
            pair = (f"{layer}ffn_gate_exps.weight", f"{layer}ffn_up_exps.weight")
            if not all(part in shapes for part in pair) or shapes[pair[0]] != shapes[pair[1]]:
                raise CheckpointError(f"{path}: {pair[0]} and {pair[1]} do not form a pair")
            names[f"model.layers.{match[1]}.experts.gate_up_proj"] = pair
        else:
            raise CheckpointError(
                f"{path}: unexpected tensor {name[:80]!a} {list(shapes[name])}; this variant is not supported"
            )
    return names


class Settings:
    """Metadata of one architecture, with errors that name the key."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self.metadata = metadata
        self.architecture: str = metadata["general.architecture"]

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or value < 0:
            raise CheckpointError(f"{self.path}: {self.architecture}.{key} is {value!a}, must be a count")
        return value

    def real(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if not isinstance(value, float) or not 0 < value < math.inf:
            raise CheckpointError(f"{self.path}: {self.architecture}.{key} is {value!a}, must be a positive number")
        return value

    def per_layer(self, key: str, layers: int) -> list[int]:
        """A count that the file states once or once per layer."""
        value = self.get(key)
        values = value if isinstance(value, list) else [value] * layers
        if len(values) != layers or not all(type(v) is int and v >= 0 for v in values):
            raise CheckpointError(f"{self.path}: {self.architecture}.{key} is not a count, nor {layers} of them")
        return values


def hf_config(
    path: Path, metadata: Mapping[str, Any], rope_freqs: list[float] | None, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The config.json that this file would have had.

    rope_freqs: the file's factors of the rotary wavelengths, one per pair, where it has them.
    Raises CheckpointError for missing or contradictory metadata and for a mixture of experts outside Gemma 4.
    """
    settings = Settings(path, metadata)
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{path}: no token_embd.weight; the file holds no language model")
    config: dict[str, Any] = {
        "architectures": [CLASSES[settings.architecture]],
        "model_type": ARCHITECTURES[settings.architecture],
        "hidden_size": settings.count("embedding_length"),
        "num_hidden_layers": settings.count("block_count"),
        "vocab_size": shapes["token_embd.weight"][0],
        "max_position_embeddings": settings.count("context_length"),
        "rms_norm_eps": settings.real("attention.layer_norm_rms_epsilon", 1e-6),
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    for name, key in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        if (value := token_id(path, metadata, name, config["vocab_size"])) is not None:
            config[key] = value
    if config["model_type"] == "gemma4_text":
        return config | _gemma4(settings, config["num_hidden_layers"], rope_freqs, shapes)
    return config | _llama(settings, config["hidden_size"], rope_freqs, shapes)


def _llama(
    settings: Settings, hidden_size: int, rope_freqs: list[float] | None, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    if settings.count("expert_count", 0):
        raise CheckpointError(f"{settings.path}: a {settings.architecture} mixture of experts is not supported")
    heads = settings.count("attention.head_count")
    head_dim = settings.count("attention.key_length", hidden_size // max(heads, 1))
    if settings.count("rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError(
            f"{settings.path}: {settings.architecture}.rope.dimension_count is {settings.get('rope.dimension_count')}, "
            f"heads are {head_dim} wide; partial rotation is not supported here"
        )
    theta = settings.real("rope.freq_base", 10000.0)
    config = {
        "hidden_act": "silu",
        "intermediate_size": settings.count("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": settings.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(settings, theta, head_dim, rope_freqs),
    }
    if settings.architecture != "qwen2":  # whose three biases are not a setting
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
    if settings.architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    return config


def _rope_scaling(settings: Settings, theta: float, head_dim: int, freqs: list[float] | None) -> dict[str, Any] | None:
    if freqs is not None:
        return _llama3_scaling(settings.path, theta, head_dim, freqs)
    kind = settings.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = settings.real("rope.scaling.factor", 1.0)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        scaling = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": settings.count("rope.scaling.original_context_length"),
        }
        for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if settings.get(f"rope.scaling.{key}") is not None:
                scaling[name] = settings.real(f"rope.scaling.{key}", 1.0)
        if (multiplier := settings.real("rope.scaling.attn_factor", 1.0)) != 1.0:
            # llama.cpp multiplies YaRN's own factor, Hugging Face replaces it
            scaling["attention_factor"] = multiplier * (0.1 * math.log(factor) + 1.0)
        return scaling
    raise CheckpointError(f"{settings.path}: rope scaling {kind!a} is not supported; supported: linear, yarn, llama3")


def _llama3_scaling(path: Path, theta: float, head_dim: int, freqs: list[float]) -> dict[str, Any]:
    """Llama 3.1's stretching, which GGUF stores as finished factors: found again and checked against them."""
    factor = float(f"{max(freqs):.6g}")
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = []
    for m in range(head_dim // 2):
        turns = 8192 * theta ** (-2 * m / head_dim) / (2 * math.pi)  # within the original context
        smooth = min(max((turns - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        expected.append(1 / ((1 - smooth) / factor + smooth))
    if len(freqs) != len(expected) or any(abs(a - b) > 1e-3 * b for a, b in zip(freqs, expected, strict=True)):
        raise CheckpointError(f"{path}: rope_freqs.weight is not Llama 3.1's stretching; this variant is not supported")
    return scaling


def _gemma4(
    settings: Settings, layers: int, rope_freqs: list[float] | None, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    pattern = settings.get("attention.sliding_window_pattern")
    if not isinstance(pattern, list) or len(pattern) != layers:
        raise CheckpointError(f"{settings.path}: gemma4.attention.sliding_window_pattern must have {layers} entries")
    sliding = [bool(entry) for entry in pattern]
    heads = settings.per_layer("attention.head_count", layers)
    kv_heads = settings.per_layer("attention.head_count_kv", layers)
    widths = settings.per_layer("feed_forward_length", layers)
    shared = settings.count("attention.shared_kv_layers", 0)
    global_dim = settings.count("attention.key_length")
    first_full = sliding.index(False) if False in sliding else None
    producers = range(layers - shared)
    config: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "intermediate_size": widths[0],
        "use_double_wide_mlp": shared > 0 and widths[-1] == 2 * widths[0],
        "layer_types": ["sliding_attention" if entry else "full_attention" for entry in sliding],
        "sliding_window": settings.count("attention.sliding_window"),
        "num_attention_heads": heads[0],
        "num_key_value_heads": next((n for n, s in zip(kv_heads, sliding, strict=True) if s), kv_heads[0]),
        "head_dim": settings.count("attention.key_length_swa", global_dim),
        "global_head_dim": global_dim,
        "num_kv_shared_layers": shared,
        "attention_k_eq_v": any(not sliding[i] and f"blk.{i}.attn_v.weight" not in shapes for i in producers),
        "hidden_size_per_layer_input": settings.count("embedding_length_per_layer_input", 0),
        "final_logit_softcapping": settings.get("final_logit_softcapping"),
    }
    if first_full is not None and kv_heads[first_full] != config["num_key_value_heads"]:
        config["num_global_key_value_heads"] = kv_heads[first_full]
    if config["hidden_size_per_layer_input"]:
        config["vocab_size_per_layer_input"] = shapes.get("per_layer_token_embd.weight", shapes["token_embd.weight"])[0]
    experts = settings.count("expert_count", 0)
    config["enable_moe_block"] = experts > 0
    if experts:
        config["num_experts"] = experts
        config["top_k_experts"] = settings.count("expert_used_count")
        config["moe_intermediate_size"] = settings.count("expert_feed_forward_length")
    # The factors are 1 for the pairs that turn and 1e30, that is standing still, for the others.
    turning = sum(factor == 1.0 for factor in rope_freqs) if rope_freqs else global_dim // 8
    config["rope_parameters"] = {
        "sliding_attention": {"rope_type": "default", "rope_theta": settings.real("rope.freq_base_swa", 10000.0)},
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": turning / (global_dim // 2),
            "rope_theta": settings.real("rope.freq_base", 1000000.0),
        },
    }
    return config


def generation_config(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling settings and end tokens as generation_config.json would state them; empty where the file has none."""
    config: dict[str, Any] = {}
    sampling = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    for key, name in sampling.items():
        if (value := metadata.get(f"general.sampling.{key}")) is not None:
            config[name] = value
    if config:
        config["do_sample"] = True
    for key in ("mirostat", "penalty_repeat", "xtc_probability"):  # which have no name there, and no effect here
        if (value := metadata.get(name := f"general.sampling.{key}")) is not None:
            config[name] = value
    if found := end_ids(path, metadata):
        config["eos_token_id"] = found
    return config
