"""DeepSeek-V4 as it is released: what its files call each tensor, and the type that each is stored in. No torch.

The canonical names, those of `DeepseekV4Config.tensors()`, are transformers'. A canonical name follows from the
released one by the module it belongs to, so what stands beside a weight (`scale`, `weight_scale_inv`) is renamed with
it.
Source: the released repositories; transformers' `conversion_mapping.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from sparing.config import roles
from sparing.config.deepseek_v4 import DeepseekV4Config
from sparing.config.formats import Part
from sparing.config.roles import Role, Shape, Tensors

__all__ = ["INNER", "OUTER", "canonical_name", "released_parts"]

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
BLOCK = 128  # rows and columns of a matrix that share a scale in FP8
IN_FP4 = 32  # columns of an expert that do


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


def released_parts(config: DeepseekV4Config, tensors: Tensors) -> Iterator[tuple[Role, int, Part]]:
    """What the release's files hold of these tensors: (role, how many alike, (torch's name of the type, shape)).

    Matrices are in FP8 with a scale for each block of 128 x 128 where the config says so, and experts one by one in FP4
    with a scale for 32 columns, in FP8 or in bfloat16, as `expert_dtype` says (FP4 where it says nothing). Scales are
    powers of two, in a byte.
    """
    for name, (shape, role) in tensors.items():
        copies = 1
        if role is roles.EXPERTS:
            copies, *shape = shape
            if name.endswith(".gate_up_proj"):  # two matrices
                copies, shape[0] = 2 * copies, shape[0] // 2
        for part in _parts(config, role, tuple(shape)):
            yield role, copies, part


def _parts(config: DeepseekV4Config, role: Role, shape: Shape) -> tuple[Part, ...]:
    """Numbers, or codes and their scales, of one tensor."""
    dense = "int64" if role is roles.HASH_TABLE else "float32" if role.is_float32 else "bfloat16"
    if not role.is_matrix or not config.is_fp8 or (role is roles.EXPERTS and config.expert_dtype == "bf16"):
        return ((dense, shape),)
    out, size = shape
    if role is roles.EXPERTS and config.expert_dtype in (None, "fp4"):  # two codes in a byte
        return ("int8", (out, -(-size // 2))), ("float8_e8m0fnu", (out, -(-size // IN_FP4)))
    return ("float8_e4m3fn", shape), ("float8_e8m0fnu", (-(-out // BLOCK), -(-size // BLOCK)))


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """A name with its module, or the whole of it, as the table says; as it is where the table does not know it."""
    expert = re.search(r"\.experts\.\d+\.", name)
    plain = name.replace(expert[0], ".experts.N.") if expert else name
    module, _, leaf = plain.rpartition(".")
    new = table.get(plain) or (f"{table[module]}.{leaf}" if module in table else plain)
    return new.replace(".experts.N.", expert[0]) if expert else new
