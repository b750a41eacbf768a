"""The operations models are made of, each a plain PyTorch function in the file of its mechanism."""

from sparing.kernels.attention import attention, qk_norm_attention
from sparing.kernels.experts import grouped_experts, parallel_moe, route_topk
from sparing.kernels.norm import rms_norm, softcap
from sparing.kernels.per_layer import per_layer_gate, per_layer_inputs
from sparing.kernels.products import arithmetic_dtype, linear, weighted_rows
from sparing.kernels.rope import (
    apply_rope,
    dynamic_inv_freq,
    inverse_frequencies,
    proportional_inv_freq,
    rope_tables,
    rotate,
)
from sparing.kernels.vocabulary import entropy, gumbel, stream_vocabulary

__all__ = [
    "apply_rope",
    "arithmetic_dtype",
    "attention",
    "dynamic_inv_freq",
    "entropy",
    "grouped_experts",
    "gumbel",
    "inverse_frequencies",
    "linear",
    "parallel_moe",
    "per_layer_gate",
    "per_layer_inputs",
    "proportional_inv_freq",
    "qk_norm_attention",
    "rms_norm",
    "rope_tables",
    "rotate",
    "route_topk",
    "softcap",
    "stream_vocabulary",
    "weighted_rows",
]
