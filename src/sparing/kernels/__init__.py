"""The operations models are made of, each a plain PyTorch function in the file of its mechanism."""

from sparing.kernels.attention import attention, qk_norm_attention
from sparing.kernels.experts import (
    gated_gelu,
    gated_mlp,
    gated_silu,
    grouped_experts,
    latent_moe,
    parallel_moe,
    relu2,
    squared_mlp,
)
from sparing.kernels.norm import residual, residual_norm, rms_norm, softcap
from sparing.kernels.per_layer import per_layer_gate, per_layer_inputs
from sparing.kernels.products import (
    arithmetic_dtype,
    gated,
    grouped_linear,
    linear,
    linear_pair,
    look_up,
    weighted_rows,
)
from sparing.kernels.rope import (
    apply_rope,
    dynamic_inv_freq,
    inverse_frequencies,
    norm_rotate,
    proportional_inv_freq,
    rope_tables,
    rotate,
)
from sparing.kernels.rounding import stochastic_round
from sparing.kernels.routing import route, route_topk, router_scores
from sparing.kernels.ssm import MambaWeights, advance_state_, causal_conv, gated_group_norm, ssd_scan, time_steps
from sparing.kernels.tied_keys import KeysFromValues, attention_over_values
from sparing.kernels.vocabulary import entropy, gumbel, vocabulary_softmax

__all__ = [
    "KeysFromValues",
    "MambaWeights",
    "advance_state_",
    "apply_rope",
    "arithmetic_dtype",
    "attention",
    "attention_over_values",
    "causal_conv",
    "dynamic_inv_freq",
    "entropy",
    "gated",
    "gated_gelu",
    "gated_group_norm",
    "gated_mlp",
    "gated_silu",
    "grouped_experts",
    "grouped_linear",
    "gumbel",
    "inverse_frequencies",
    "latent_moe",
    "linear",
    "linear_pair",
    "look_up",
    "norm_rotate",
    "parallel_moe",
    "per_layer_gate",
    "per_layer_inputs",
    "proportional_inv_freq",
    "qk_norm_attention",
    "relu2",
    "residual",
    "residual_norm",
    "rms_norm",
    "rope_tables",
    "rotate",
    "route",
    "route_topk",
    "router_scores",
    "softcap",
    "squared_mlp",
    "ssd_scan",
    "stochastic_round",
    "time_steps",
    "vocabulary_softmax",
    "weighted_rows",
]
