"""What the releases of DeepSeek-V4 call each tensor. Never imports torch.

The canonical names, those of `DeepseekV4Config.tensors()`, are transformers'. A canonical name follows from the
released one by the module it belongs to, so what stands beside a weight (`scale`, `weight_scale_inv`) is renamed with
it.
Source: the released repositories; transformers' `conversion_mapping.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["INNER", "OUTER", "canonical_name"]

# released module or tensor -> canonical one, outside of layers ...
OUTER = {
    "embed": "model.embed_tokens",
    "head": "lm_head",
    "norm": "model.norm",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
# ... and in `layers.i` (`model.layers.i`) and `mtp.j` (`mtp.j`); what is not listed is called the same in both
INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "hc_attn_fn": "attn_hc.fn",
    "hc_attn_base": "attn_hc.base",
    "hc_attn_scale": "attn_hc.scale",
    "hc_ffn_fn": "ffn_hc.fn",
    "hc_ffn_base": "ffn_hc.base",
    "hc_ffn_scale": "ffn_hc.scale",
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_norm",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv": "self_attn.kv_proj",
    "attn.kv_norm": "self_attn.kv_norm",
    "attn.norm": "self_attn.kv_norm",  # as transformers 5.23 writes it
    "attn.attn_sink": "self_attn.sinks",
    "attn.wo_a": "self_attn.o_a_proj",
    "attn.wo_b": "self_attn.o_b_proj",
    "attn.compressor.wkv": "self_attn.compressor.kv_proj",
    "attn.compressor.wgate": "self_attn.compressor.gate_proj",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.norm": "self_attn.compressor.kv_norm",
    "attn.indexer.wq_b": "self_attn.compressor.indexer.q_b_proj",
    "attn.indexer.weights_proj": "self_attn.compressor.indexer.scorer.weights_proj",
    "attn.indexer.compressor.wkv": "self_attn.compressor.indexer.kv_proj",
    "attn.indexer.compressor.wgate": "self_attn.compressor.indexer.gate_proj",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.norm": "self_attn.compressor.indexer.kv_norm",
    "ffn.gate": "mlp.gate",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.experts.N.w1": "mlp.experts.N.gate_proj",
    "ffn.experts.N.w2": "mlp.experts.N.down_proj",
    "ffn.experts.N.w3": "mlp.experts.N.up_proj",
    "ffn.shared_experts.w1": "mlp.shared_experts.gate_proj",
    "ffn.shared_experts.w2": "mlp.shared_experts.down_proj",
    "ffn.shared_experts.w3": "mlp.shared_experts.up_proj",
    "hc_head_fn": "hc_head.hc_fn",  # of mtp.j
    "hc_head_base": "hc_head.hc_base",
    "hc_head_scale": "hc_head.hc_scale",
}


def canonical_name(name: str) -> str:
    """What a tensor of a file is called here: a released name in the canonical spelling, any other as it is.

    transformers 5.23 writes released names with `model.` in front.

    >>> canonical_name("layers.3.ffn.experts.7.w1.scale")
    'model.layers.3.mlp.experts.7.gate_proj.scale'
    """
    match = re.fullmatch(r"(?:model\.)?(layers\.\d+\.|mtp\.\d+\.)(.+)|()(.+)", name)
    if match is None:
        return name
    prefix, inner = match[1] or "", match[2] or match[4]
    renamed = _renamed(inner, INNER if prefix else OUTER)
    return f"model.{prefix}{renamed}" if prefix.startswith("layers") else prefix + renamed


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """A name with its module, or the whole of it, as the table says; as it is where the table does not know it."""
    expert = re.search(r"\.experts\.\d+\.", name)
    plain = name.replace(expert[0], ".experts.N.") if expert else name
    module, _, leaf = plain.rpartition(".")
    new = table.get(plain) or (f"{table[module]}.{leaf}" if module in table else plain)
    return new.replace(".experts.N.", expert[0]) if expert else new
