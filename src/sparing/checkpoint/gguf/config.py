"""GGUF's names for tensors and settings, put back into Hugging Face's, for the architectures that are understood."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparing.checkpoint.gguf.rope import partial_fraction, rope_scaling
from sparing.checkpoint.gguf.settings import Settings
from sparing.checkpoint.gguf.vocabulary import end_ids, suppressed_ids, token_id
from sparing.config.fields import LARGEST_COUNT
from sparing.errors import CheckpointError

__all__ = [
    "ARCHITECTURES",
    "RopeFactors",
    "absent_biases",
    "generation_config",
    "hf_config",
    "hf_names",
    "neutral_settings",
]

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
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
GEMMA_BLOCK = BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GEMMA4_OUTER = OUTER | {
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
}
GEMMA4_BLOCK = GEMMA_BLOCK | {
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
# by model type: names outside layers, names in them, names in them that are whole; all others have Llama's
NAMES = {"gemma3_text": (OUTER, GEMMA_BLOCK, {}), "gemma4_text": (GEMMA4_OUTER, GEMMA4_BLOCK, GEMMA4_WHOLE)}


def hf_names(
    path: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[str, ...]]:
    """Hugging Face name -> the one or two tensors of the file it is made of.

    Raises CheckpointError for a tensor without a known name.
    """
    outer, block, whole = NAMES.get(config["model_type"], (OUTER, BLOCK, {}))
    names: dict[str, tuple[str, ...]] = {}
    for name in shapes:
        match = re.fullmatch(r"blk\.(\d+)\.((.+)\.(weight|bias|scale))", name)
        if name == "rope_freqs.weight":
            continue  # part of the config: the stretching of the rotary frequencies
        if name in outer:
            names[outer[name]] = (name,)
        elif match and match[2] in whole:
            names[f"model.layers.{match[1]}.{whole[match[2]]}"] = (name,)
        elif match and match[3] in block and match[4] != "scale":
            names[f"model.layers.{match[1]}.{block[match[3]]}.{match[4]}"] = (name,)
        elif match and whole and match[3] in ("ffn_gate_exps", "ffn_up_exps"):
            layer = f"blk.{match[1]}."
            pair = (f"{layer}ffn_gate_exps.weight", f"{layer}ffn_up_exps.weight")
            joined = f"{layer}ffn_gate_up_exps.weight"
            rank = len(shapes.get(pair[0], ()))
            if joined in shapes or rank != 3 or shapes[pair[0]] != shapes.get(pair[1]):
                raise CheckpointError(f"{path}: {pair[0]} and {pair[1]} do not form a pair of expert stacks")
            names[f"model.layers.{match[1]}.experts.gate_up_proj"] = pair
        else:
            raise CheckpointError(
                f"{path}: unexpected tensor {name[:80]!a} {list(shapes[name])}; this variant is not supported"
            )
    return names


def absent_biases(
    config: Mapping[str, Any], names: Mapping[str, tuple[str, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of biases that the model has and the file leaves out, that is zeros.

    GGUF states biases by their tensors alone, one by one; a config.json has a switch for four projections at once.
    """
    having = (
        {"q_proj", "k_proj", "v_proj"} if config["model_type"] == "qwen2" or config.get("attention_bias") else set()
    )
    having |= {"o_proj"} if config.get("attention_bias") else set()
    having |= {"gate_proj", "up_proj", "down_proj"} if config.get("mlp_bias") else set()
    absent = {}
    for name, parts in names.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "weight" and stem.rpartition(".")[2] in having and f"{stem}.bias" not in names:
            absent[f"{stem}.bias"] = shapes[parts[0]][:1]
    return absent


@dataclass(frozen=True)
class RopeFactors:
    """The file's factors of the rotary wavelengths, one per pair, and the relative precision they are stored in."""

    values: list[float]
    precision: float


def hf_config(
    settings: Settings, rope_freqs: RopeFactors | None, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The config.json that this file would have had.

    rope_freqs: where the file has them.
    Raises CheckpointError for missing or contradictory metadata and for a mixture of experts outside Gemma 4.
    """
    path, metadata = settings.path, settings.metadata
    if len(shapes.get("token_embd.weight", ())) != 2:
        raise CheckpointError(f"{path}: no token_embd.weight of two dimensions; the file holds no language model")
    config: dict[str, Any] = {
        "architectures": [CLASSES[settings.architecture]],
        "model_type": ARCHITECTURES[settings.architecture],
        "hidden_size": settings.count("embedding_length"),
        "num_hidden_layers": settings.count("block_count", maximum=LARGEST_COUNT),
        "vocab_size": shapes["token_embd.weight"][0],
        "max_position_embeddings": settings.count("context_length"),
        "rms_norm_eps": settings.real("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    for name, key in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        if (value := token_id(path, metadata, name, config["vocab_size"])) is not None:
            config[key] = value
    if config["model_type"] == "gemma3_text":
        return config | _gemma3(settings, config["num_hidden_layers"], config["hidden_size"], rope_freqs, shapes)
    if config["model_type"] == "gemma4_text":
        return config | _gemma4(settings, config["num_hidden_layers"], rope_freqs, shapes)
    return config | _llama(settings, config["hidden_size"], rope_freqs, shapes)


def _llama(
    settings: Settings, hidden_size: int, rope_freqs: RopeFactors | None, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    if settings.count("expert_count", 0, minimum=0):
        raise CheckpointError(f"{settings.path}: a {settings.architecture} mixture of experts is not supported")
    heads = settings.count("attention.head_count")
    head_dim = settings.count("attention.key_length", hidden_size // heads, minimum=2)
    if head_dim % 2:
        raise settings.error("attention.key_length", f"heads of {head_dim} have no pairs to rotate")
    settings.expect("attention.value_length", head_dim, reason="keys and values of two sizes are not supported")
    settings.expect("rope.dimension_count", head_dim, reason="partial rotation is not supported here")
    freqs, precision = (None, 0.0) if rope_freqs is None else (rope_freqs.values, rope_freqs.precision)
    theta = settings.real("rope.freq_base", 10000.0)
    config = {
        "hidden_act": "silu",
        "intermediate_size": settings.count("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": settings.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_theta": theta,
        "rope_scaling": rope_scaling(settings, theta, head_dim, freqs, precision),
    }
    if settings.architecture != "qwen2":  # whose three biases are not a setting
        config["attention_bias"] = any(re.fullmatch(r"blk\.\d+\.attn_(q|k|v|output)\.bias", name) for name in shapes)
    if settings.architecture == "llama":
        config["mlp_bias"] = any(re.fullmatch(r"blk\.\d+\.ffn_(gate|up|down)\.bias", name) for name in shapes)
    return config


def _gemma3(
    settings: Settings,
    layers: int,
    hidden_size: int,
    rope_freqs: RopeFactors | None,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Any]:
    """Source: llama.cpp's loader of gemma3, which knows the scale of scores and the larger base of some sizes only."""
    heads = settings.count("attention.head_count")
    head_dim = settings.count("attention.key_length", hidden_size // heads, minimum=2)
    settings.expect("attention.value_length", head_dim, reason="keys and values of two sizes are not supported")
    settings.expect("rope.dimension_count", head_dim, reason="partial rotation is not supported here")
    window = settings.count("attention.sliding_window", 0, minimum=0)
    pattern = settings.get("attention.sliding_window_pattern", 6)
    if type(pattern) is int and pattern > 0:
        pattern = [bool((i + 1) % pattern) for i in range(layers)]
    if not isinstance(pattern, list) or len(pattern) != layers or not all(type(i) in (bool, int) for i in pattern):
        raise CheckpointError(
            f"{settings.path}: gemma3.attention.sliding_window_pattern must be a count, or {layers} of true or false"
        )
    theta = settings.real("rope.freq_base")
    scaling = rope_scaling(settings, theta, head_dim, None, 0.0)
    if rope_freqs is not None or (scaling or {}).get("rope_type") not in (None, "linear"):
        raise CheckpointError(f"{settings.path}: gemma3 is supported with linear scaling of its rotations, no other")
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "intermediate_size": settings.count("feed_forward_length"),
        "layer_types": ["sliding_attention" if window and entry else "full_attention" for entry in pattern],
        "sliding_window": window or None,
        "num_attention_heads": heads,
        "num_key_value_heads": settings.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "query_pre_attn_scalar": hidden_size // heads if layers == 62 else head_dim,  # 62: the 27B
        "final_logit_softcapping": settings.get("final_logit_softcapping") or None,
        "attention_bias": any(re.fullmatch(r"blk\.\d+\.attn_(q|k|v|output)\.bias", name) for name in shapes),
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": settings.real("rope.freq_base_swa", 10000.0)},
            "full_attention": {"rope_type": "default"} | (scaling or {}) | {"rope_theta": theta},
        },
    }


def _gemma4(
    settings: Settings, layers: int, rope_freqs: RopeFactors | None, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    pattern = settings.get("attention.sliding_window_pattern")
    if not isinstance(pattern, list) or len(pattern) != layers or not all(type(i) in (bool, int) for i in pattern):
        raise CheckpointError(
            f"{settings.path}: gemma4.attention.sliding_window_pattern must have {layers} entries, true or false"
        )
    sliding = [bool(entry) for entry in pattern]
    heads = settings.per_layer("attention.head_count", layers)
    kv_heads = settings.per_layer("attention.head_count_kv", layers)
    widths = settings.per_layer("feed_forward_length", layers)
    shared = settings.count("attention.shared_kv_layers", 0, minimum=0)
    global_dim = settings.count("attention.key_length", minimum=2)
    head_dim = settings.count("attention.key_length_swa", global_dim, minimum=2)
    for suffix, width in (("", global_dim), ("_swa", head_dim)):
        settings.expect(f"attention.value_length{suffix}", width, reason="keys and values of two sizes")
        settings.expect(f"rope.dimension_count{suffix}", width, reason="partial rotation is said by rope_freqs.weight")
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
        "head_dim": head_dim,
        "global_head_dim": global_dim,
        "num_kv_shared_layers": shared,
        "attention_k_eq_v": any(not sliding[i] and f"blk.{i}.attn_v.weight" not in shapes for i in producers),
        "hidden_size_per_layer_input": settings.count("embedding_length_per_layer_input", 0, minimum=0),
        "final_logit_softcapping": settings.get("final_logit_softcapping"),
    }
    if first_full is not None and kv_heads[first_full] != config["num_key_value_heads"]:
        config["num_global_key_value_heads"] = kv_heads[first_full]
    if config["hidden_size_per_layer_input"]:
        config["vocab_size_per_layer_input"] = shapes.get("per_layer_token_embd.weight", shapes["token_embd.weight"])[0]
    experts = settings.count("expert_count", 0, minimum=0)
    config["enable_moe_block"] = experts > 0
    if experts:
        config["num_experts"] = experts
        config["top_k_experts"] = settings.count("expert_used_count")
        config["moe_intermediate_size"] = settings.count("expert_feed_forward_length")
    if rope_scaling(settings, 1.0, global_dim, None, 0.0) is not None:
        raise CheckpointError(f"{settings.path}: rope.scaling of gemma4 is not supported")
    fraction = 0.25 if rope_freqs is None else partial_fraction(settings, global_dim, rope_freqs.values)
    config["rope_parameters"] = {
        "sliding_attention": {"rope_type": "default", "rope_theta": settings.real("rope.freq_base_swa", 10000.0)},
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": fraction,
            "rope_theta": settings.real("rope.freq_base", 1000000.0),
        },
    }
    return config


def neutral_settings(config: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """By key without the architecture, values of settings nobody reads that say what the model does anyway."""
    is_gemma, head_dim = config["model_type"].startswith("gemma"), config["head_dim"]
    scale = 1.0 if config["model_type"] == "gemma4_text" else config.get("query_pre_attn_scalar", head_dim) ** -0.5
    return {
        "attention.scale": (scale,),
        "attention.sliding_window": (config["max_position_embeddings"],),
        "hidden_activation": ("gelu_pytorch_tanh",) if is_gemma else ("silu",),
        "embedding_length_out": (config["hidden_size"],),
        "rope.dimension_count_swa": (head_dim,),
    }


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
    if never := suppressed_ids(path, metadata, len(metadata.get("tokenizer.ggml.tokens", ()))):
        config["suppress_tokens"] = never
    return config
