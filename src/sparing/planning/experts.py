"""What a mixture-of-experts layer costs: operations, bytes of weights, traffic between devices. Never imports torch."""

from __future__ import annotations

from sparing.config.numbers import whole, whole_numbers

__all__ = ["expected_experts", "moe_layer_cost"]


def expected_experts(experts: int, k: int, tokens: int) -> float:
    """How many of `experts` a pass over `tokens` tokens touches, each choosing k of them independently and uniformly.

    Source: `E (1 - (1 - k / E)^tokens)`.
    """
    return experts * (1 - (1 - k / experts) ** tokens)


def moe_layer_cost(
    H: int,
    F: int,
    E: int,
    k: int,
    latent: int | None = None,
    shared: int = 0,
    tokens: int = 1,
    bytes_per_weight: float = 2,
) -> dict[str, float]:
    """Cost of one layer of two-matrix experts for a pass over `tokens` tokens.

    H: hidden size; F: width of one of E experts, of which a token uses k; latent: size the routed experts work in
    (None: H); shared: width of the expert that every token uses.
    Returns flops (two a multiply-add), weight_bytes (read once; routed experts as far as expected to be chosen),
    expected_experts, intensity (FLOP a byte of weights) and all_to_all_bytes (dispatching 16-bit inputs to k experts).
    Raises ValueError for sizes below 1, k above E, and a negative number of tokens or shared width.
    Source: Nemotron 3, LatentMoE: with alpha = H / latent, alpha times as many experts cost the same.
    """
    H, F, E, k = whole_numbers(1, H=H, F=F, E=E, k=k)
    latent = None if latent is None else whole("latent", latent, 1)
    shared, tokens = whole_numbers(0, shared=shared, tokens=tokens)
    if k > E:
        raise ValueError(f"k is {k}: a token cannot use more than all {E} experts (E)")
    if not bytes_per_weight > 0:
        raise ValueError(f"bytes_per_weight is {bytes_per_weight!r}, expected a number above 0")
    size = H if latent is None else latent
    expert = 2 * size * F
    always = 2 * H * shared + E * H + (0 if latent is None else 2 * H * latent)
    hit = expected_experts(E, k, tokens)
    flops = 2 * tokens * (k * expert + always)
    weight_bytes = bytes_per_weight * (hit * expert + always)
    return {
        "flops": flops,
        "weight_bytes": weight_bytes,
        "expected_experts": hit,
        "intensity": flops / weight_bytes,
        "all_to_all_bytes": 2 * tokens * k * size,
    }
