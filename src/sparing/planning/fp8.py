"""Work of one token in units of FP8 operations, as DeepSeek's reports compare models. Never imports torch.

An operation of FP8 counts once (an FP4 weight meets an FP8 input too), one of 16 bits twice, one between two FP4
numbers half. Attention runs in 16 bits, the indexer in the type of its keys. Norms, activations, softmax and the mixing
of streams are left out.
Source: DeepSeek-V4, arXiv 2606.19348, whose four ratios to DeepSeek-V3.2 this weighting alone gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sparing.config import planned_config, roles
from sparing.config.memory import CompressedSpec, MemorySpec
from sparing.config.policy import apply_policy, parse_policy
from sparing.config.protocol import ModelConfig
from sparing.config.released import RELEASED
from sparing.planning.memory import memory_by_kind
from sparing.planning.parameters import element_size
from sparing.planning.roofline import compressed_flops

__all__ = ["against_v32", "fp8_operations"]

# Model type -> roles of matrices that are multiplied in 16 bits. The report counts V3.2's router with its FP8 weights.
IN_16_BITS = {
    "deepseek_v4": (roles.COMPRESSOR, roles.ROUTER, roles.HYPER_CONNECTION, roles.HEAD),
    "deepseek_v32": (roles.HEAD,),
}


def fp8_operations(config: ModelConfig, specs: Sequence[MemorySpec | None], tokens: int) -> dict[str, float]:
    """Operations of one token that comes last of `tokens`, by part: "attention", "indexer", "weights" and
    "weights_16_bits" (the head among them).

    config: of DeepSeek-V4 or V3.2; specs: its own, whose `released.key_bits` say the indexer's type.
    """
    done = {"attention": 0.0, "indexer": 0.0, "weights": 0.0, "weights_16_bits": 0.0}
    for spec in specs:
        assert isinstance(spec, CompressedSpec)
        core, indexer = compressed_flops(spec, config.num_attention_heads, tokens)
        done["attention"] += 2 * core
        done["indexer"] += indexer * (0.5 if spec.released.key_bits == 4 else 1)
    for shape, role in config.tensors().values():
        numbers = math.prod(shape)
        if role is roles.EXPERTS:
            numbers = numbers // config.num_experts * config.top_k_experts
        if role in IN_16_BITS[config.model_type]:
            done["weights_16_bits"] += 4 * numbers
        elif role.kind in ("matrices", "experts"):
            done["weights"] += 2 * numbers
    return done


def against_v32(config: ModelConfig, specs: Sequence[MemorySpec | None], tokens: int) -> tuple[float, float]:
    """(bytes of memory, operations in units of FP8) of one token after `tokens`, as shares of DeepSeek-V3.2's.

    specs: as a policy left them; V3.2 is taken as its release keeps it.
    """
    other = planned_config(RELEASED["deepseek-v3.2"])
    theirs = apply_policy(other.memory_specs(), parse_policy("released"))
    held = [
        sum(memory_by_kind(own, tokens, element_size(model)).values())
        for model, own in ((config, specs), (other, theirs))
    ]
    work = [sum(fp8_operations(model, own, tokens).values()) for model, own in ((config, specs), (other, theirs))]
    return held[0] / held[1], work[0] / work[1]
