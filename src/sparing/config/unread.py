"""Settings that nobody reads: which of them change what a model computes, and are refused. Never imports torch.

What adds tensors (biases, adapters, norms with weights) shows itself when names are compared with the file. What
changes the computation alone (caps, scales, windows, directions) shows itself nowhere else: it is known here by its
name, as config.json and GGUF metadata spell it, where dots count as underscores.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from sparing.errors import CheckpointError, shown

__all__ = ["refuse_unread"]

OFF = (None, False, 0, "", "none", "null", "default")
ONE = (*OFF, 1)
ON = (None, True, 1)
WHERE = (
    r"(input|output|in|out|embeddings?|embed|emb|token|residual|attention|attn|query|key|value|mlp|ffn|logits?"
    r"|lm_head|head|layer|depth|width|final|router|routed|norm|q|k|v|qk)"
)

# (what a setting does, its names, the values that do nothing)
SETTINGS: tuple[tuple[str, str, Collection[Any]], ...] = (
    ("caps numbers", r"(.*_)?(soft_?cap(ping)?|logits?_cap|(clip|clamp|clamping)_(qkv|kqv)|(qkv|kqv)_clip)", OFF),
    ("caps numbers", r"swiglu_(limit|clamp)\w*|(.*_)?clamp_limit", OFF),
    ("scales numbers", rf"({WHERE}_)+((scale|scaling|multiplier)s?|scal(e|ing)_factor)", ONE),
    ("scales numbers", r"(?!.*(dim|size|width|init\w*|loss|lr|rate|range)_)\w+_multipliers?(_scale)?", ONE),
    ("scales numbers", r"scale_(emb|embedd?ings?|depth|residual|attn_\w+)|mup_\w+|use_mup|dim_model_base", ONE),
    ("scales numbers", r"query_pre_attn_scalar|softmax_scale|normali[sz]e_(embed\w*|input_embeds)", ONE),
    ("changes scores of attention", r"(attn|attention)_temperature\w*|llama_4_scaling\w*|floor_scale", ONE),
    ("changes scores of attention", r"(use_)?(attention_|attn_)?sinks?|(use_)?log_?n_(attn|scaling)", OFF),
    ("hides tokens", r"(.*_)?(sliding|local|attention|attn)_(window|chunk)(_size|_pattern|_layers)?", (*OFF, -1)),
    ("hides tokens", r"window_size|local_attention|chunked_attention|global_attn_every_n_layers", (*OFF, -1)),
    ("says what a token sees", r"(is_|attention_)?causal(_attention)?", ON),
    ("says what a token sees", r"((use|is)_)?bidirectional(_attention)?|(is_)?prefix_lm", OFF),
    ("changes positions", r"(.*_)?alibi(_\w+)?", OFF),
    ("changes positions", r"use_(rope|rotary(_emb\w*)?|position_embeddings?)", ON),
    ("changes positions", r"use_m?rope_interleaved?|use_mrope|use_nope|no_?rope_\w+|nope_\w+", OFF),
    ("changes positions", r"rotary_(pct|percent\w*|dim|emb_fraction|ndims)|(.*_)?partial_rotary_factors?", ONE),
    ("changes positions", r"(rotary|rope)_(interleaved?|is_neox_style)|mrope_(section|interleaved)", OFF),
    ("changes positions", r"(rotary|rope)(_emb)?_(base|freq_base|ratio|scaling_factor|scale)|rope_scale_linear", ONE),
    ("changes positions", r"rope_(theta|scaling)", OFF),
    ("changes positions", r"(rope_)?(local|global)_(base_freq|rope_theta)|rope_dimension_\w+", OFF),
    (
        "changes positions",
        r"position_embedding_type|positional_(encoding|embedding)(_type)?|pos_emb(_type)?",
        (*OFF, "rope", "rotary"),
    ),
    ("changes the order of a layer", r"(use_)?parallel_(attn|attention|residual|block|layers?|mlp)", OFF),
    ("changes the order of a layer", r"norm_after|(use_)?(post|sandwich)_norm|apply_residual_connection_\w+", OFF),
    ("changes the order of a layer", r"do_layer_norm_before", ON),
    ("changes the order of a layer", r"nextn_predict_layers|altup_(num_inputs|active_idx)", OFF),
    ("changes an activation", r"activation_sparsity_\w+", OFF),
    ("changes the order of a layer", r"full_attention_interval|embedding_length_out", ONE),
    ("changes the order of a layer", r"(attention_)?(q|kv)_lora_rank|attention_(key|value)_length_mla", OFF),
    ("changes the order of a layer", r"num_kv_shared_layers|cla_share_factor|num_loops|(num_)?recurrent_steps", ONE),
    ("changes a norm", r"((use|with)_)?qk_(layer_?)?norm(_type|alization)?", OFF),
    ("changes a norm", r"(layer_?norm|norm|normali[sz]ation)_(type|fn|class|function)", (*OFF, "rms", "rms_norm")),
    ("changes a norm", r"(rms_?)?norm_(add_)?(unit_)?offset|(apply_)?layer_?norm_(1p|zero_centered_gamma)", OFF),
    ("changes a norm", r"zero_centered_(gamma|norm)|add_unit_offset|use_layer_?norm", OFF),
    ("changes an activation", r"(hidden_)?(act|activation)(_fn|_func|_function|_type)?|(mlp|ffn)_\w*activation", OFF),
    ("mixes experts", r"expert_(weights_scale|gating_func|shared_count|group_(used_)?count|group_scale)", ONE),
    ("mixes experts", r"(num|n)(_local|_routed|_shared)?_experts(_per_tok)?|expert_(used_)?count|top_k_experts", ONE),
)  # fmt: skip
ANY = re.compile("|".join(f"(?:{names})" for _, names, _ in SETTINGS))
LONGEST_NAME = 80  # of a setting; what is longer is none of these
NAMES = tuple((what, re.compile(names), nothing) for what, names, nothing in SETTINGS)


def refuse_unread(
    unread: Mapping[str, Any], *, file: str, model_type: str, neutral: Mapping[str, Collection[Any]] | None = None
) -> None:
    """Refuse settings that change what a model computes and that nobody reads; all others may stay.

    unread: settings by name, of a config.json or of GGUF metadata (without the architecture in front); file: what the
    error starts with; neutral: by name, further values that say what this model does anyway.
    Raises CheckpointError naming the setting, its value and the way out.
    """
    for key, value in unread.items():
        name = re.sub(r"[.\-]", "_", key[: LONGEST_NAME + 1]).lower()
        if len(name) > LONGEST_NAME or not ANY.fullmatch(name):
            continue
        for what, names, nothing in NAMES:
            if names.fullmatch(name) and not _does_nothing(value, (*nothing, *(neutral or {}).get(key, ()))):
                raise CheckpointError(
                    f"{file}: {key} is {shown(value)}, which {what}: a {model_type} model has no such setting here;"
                    " remove it if the model was trained without"
                )


def _does_nothing(value: Any, neutral: Collection[Any]) -> bool:
    if isinstance(value, list | tuple):
        return all(_does_nothing(item, neutral) for item in value)
    if isinstance(value, Mapping):
        return not value
    if isinstance(value, str):
        value = re.sub(r"^rmsnorm$", "rms_norm", value.lower())
    # true is 1 for Python: it does nothing only where true itself is said to
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral)
