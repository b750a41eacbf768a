"""How a GGUF file says that rotary frequencies are stretched, put into Hugging Face's words.

Keys under `rope.scaling.`: `type` ("linear" where it is left out), `factor` (else the older `rope.scale_linear`; 0 and
none are 1), `original_context_length` (else the context), `attn_factor` on cos and sin, `yarn_*`. A tensor
`rope_freqs.weight` holds factors of the wavelengths, one per pair.
Source: llama.cpp `llama_model::load_hparams`, `llama_context` and `ggml_rope_yarn`.
"""

import math
from collections.abc import Sequence
from typing import Any

from sparing.checkpoint.gguf.settings import Settings
from sparing.errors import CheckpointError, shown

__all__ = ["partial_fraction", "rope_scaling"]

STILL = 1e20  # a wavelength stretched by more does not turn


def rope_scaling(
    settings: Settings, theta: float, head_dim: int, freqs: Sequence[float] | None, precision: float
) -> dict[str, Any] | None:
    """`rope_scaling` of config.json, None for plain rotation.

    freqs: the file's factors of the wavelengths, stored to a relative `precision`.
    Raises CheckpointError for types and combinations that are not supported.
    """
    kind = settings.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise CheckpointError(
            f"{settings.path}: rope scaling {shown(kind)} is not supported; supported: none, linear, yarn, llama3"
        )
    factor, sharpness = _factor(settings), settings.real("rope.scaling.attn_factor", 1.0)
    if kind == "none":
        factor = 1.0
    yarn = {f"yarn_beta_{end}": settings.get(f"rope.scaling.yarn_beta_{end}") for end in ("fast", "slow")}
    for key, plain in (("yarn_log_multiplier", 0.0), ("yarn_attn_factor", 1.0), ("alpha", 0.0)):
        settings.expect(f"rope.scaling.{key}", plain, None, reason="this variant of scaling is not supported")
    full = 1.0 if kind == "yarn" else 0.0
    settings.expect("rope.scaling.yarn_ext_factor", -1.0, full, reason="this variant of scaling is not supported")
    original = settings.count("rope.scaling.original_context_length", settings.count("context_length"))
    if freqs is not None:
        if factor != 1.0 or sharpness != 1.0:
            raise CheckpointError(
                f"{settings.path}: rope_freqs.weight stretches rotary frequencies and so does rope.scaling; "
                "the two together are not supported"
            )
        return _llama3(settings, theta, head_dim, freqs, precision)
    if kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        for key, value in yarn.items():
            if value is not None:
                scaling[key.removeprefix("yarn_")] = settings.real(f"rope.scaling.{key}")
        if sharpness != 1.0:
            # llama.cpp multiplies YaRN's own factor, Hugging Face replaces it
            scaling["attention_factor"] = sharpness * (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
        return scaling
    if sharpness != 1.0:
        raise settings.error("rope.scaling.attn_factor", f"which is supported with YaRN and not with {kind!r} scaling")
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def partial_fraction(settings: Settings, head_dim: int, freqs: Sequence[float]) -> float:
    """The share of a head that turns, of factors that are 1 for those pairs and huge for all after them."""
    turning = sum(factor == 1.0 for factor in freqs)
    still = freqs[turning:]
    if len(freqs) != head_dim // 2 or list(freqs[:turning]) != [1.0] * turning or not all(f >= STILL for f in still):
        raise CheckpointError(
            f"{settings.path}: rope_freqs.weight does not say for {head_dim // 2} pairs whether they turn; "
            "this variant is not supported"
        )
    return turning / (head_dim // 2)


def _factor(settings: Settings) -> float:
    old, key = settings.get("rope.scale_linear"), "rope.scaling.factor"
    if settings.get(key) is None and old is not None:
        key = "rope.scale_linear"
    return 1.0 if settings.get(key, 0.0) == 0.0 else settings.real(key)


def _llama3(
    settings: Settings, theta: float, head_dim: int, freqs: Sequence[float], precision: float
) -> dict[str, Any]:
    """Llama 3.1's stretching, which GGUF stores as finished factors: found again and checked against them."""
    if not freqs or not all(1e-3 < factor < 1e6 for factor in freqs):
        raise CheckpointError(
            f"{settings.path}: rope_freqs.weight holds {shown(list(freqs[:4]))}, factors of wavelengths are positive "
            "numbers; the file is damaged or of another variant"
        )
    factor = float(f"{max(freqs):.6g}") if precision < 1e-4 else float(f"{max(freqs):.3g}")
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
    within = 1e-3 + precision
    if len(freqs) != len(expected) or any(abs(a - b) > within * b for a, b in zip(freqs, expected, strict=True)):
        raise CheckpointError(
            f"{settings.path}: rope_freqs.weight is not Llama 3.1's stretching; this variant is not supported"
        )
    return scaling
