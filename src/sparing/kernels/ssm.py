"""Mamba-2: the causal convolution, the scan in matrix form, chunk by chunk, and the gated norm after it.

The native kernel runs the recurrence token by token, a block of the state in registers: fewer operations than the
matrix form takes, and one reading of the state.
State S [heads, head_dim, N]; head i reads group i // (heads / groups) of B and C:
S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t + D x_t.
Source: Dao and Gu, "Transformers are SSMs" (2024), state-space duality.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.kernels import dispatch
from sparing.kernels.norm import rms_norm
from sparing.kernels.shapes import dimensions, expect

__all__ = [
    "MambaWeights",
    "advance_state_",
    "causal_conv",
    "gated_group_norm",
    "joins_passes",
    "ssd_scan",
    "time_steps",
]

CHUNK = 64  # tokens: work within a chunk grows with it, passes over the state fall


class MambaWeights(NamedTuple):
    """What a Mamba layer's rows are scanned with. A = -exp(A_log) and D: float32 [heads]; conv_weight: [C, 1, K]."""

    conv_weight: Tensor
    conv_bias: Tensor | None
    A: Tensor
    D: Tensor


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`silu(b + sum_j w[:, j] * x_{t - K + 1 + j})` of the last T rows: float32 [T, C].

    x: [K - 1 + T, C], the K - 1 rows before first (zeros at the start of a text); weight: [C, 1, K]; bias: [C].
    Raises ValueError for other shapes. Source: Mamba-2, depthwise convolution over x, B and C.
    """
    length, channels = dimensions("x", x, "K - 1 + T", "C")
    _, _, kernel = dimensions("weight", weight, "C", "1", "K")
    expect("weight", weight, channels, 1, kernel)
    expect("x", x, max(length, kernel - 1), channels)
    if bias is not None:
        expect("bias", bias, channels)
    if dispatch.takes(x, weight, bias):
        return _native_conv(x, weight, bias)
    taps = weight.float().squeeze(1).T  # [K, C]
    rows = x.float()
    tokens = length - kernel + 1
    if tokens == 1:
        out = (rows * taps).sum(0, keepdim=True)
    else:
        out = rows[:tokens] * taps[0]
        for j in range(1, len(taps)):
            out.addcmul_(rows[j : j + tokens], taps[j])
    if bias is not None:
        out += bias.float()
    return F.silu(out, inplace=True)


def _native_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    channels, _, taps = weight.shape
    x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    tokens = x.shape[0] - taps + 1
    out = x.new_empty(tokens, channels, dtype=torch.float32)
    dispatch.native.convolution(
        x=x,
        weight=weight,
        bias=bias,
        y=out,
        tokens=tokens,
        channels=channels,
        taps=taps,
        bfloat16=x.dtype is torch.bfloat16,
    )
    return out


def time_steps(raw: Tensor, bias: Tensor, limit: tuple[float, float]) -> Tensor:
    """`clamp(softplus(raw + bias), *limit)` in float32: [T, heads] for raw [T, heads] and bias [heads].

    Source: Mamba-2. Released models set no limits, (0, inf); the reference's lower limit of 0.001 is a defect.
    """
    dt = F.softplus(raw + bias.float())  # float32, as the bias is
    return dt if limit == (0.0, float("inf")) else dt.clamp(*limit)


def ssd_scan(
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    state: Any = None,
    chunk: int | None = None,
    *,
    pending: tuple[Tensor, Tensor, Tensor] | None = None,
    final_state: bool = True,
) -> tuple[Any, Any]:
    """Run T tokens through the recurrence: (y [T, h, p], state after them [h, p, N]).

    x: [T, h, p]; dt: [T, h], positive; A: [h], negative; B, C: [T, G, N] with h a multiple of G; D: [h] or None;
    state: [h, p, N] before the first token (None: zeros), left as it is; chunk: tokens a product of matrices covers:
    the result is the same for any. pending: x, dt and B of tokens that `state` has yet to follow; it is carried over
    them first, in place. final_state: False saves the last update of the state and returns None for it.
    float32, or float64 where x is; arrays of NumPy are taken too, and then returned.
    Raises ValueError if h is not a multiple of G, for other shapes and for a chunk below 1. Source: Mamba-2, section 6.
    """
    if not isinstance(x, Tensor):
        given = [None if v is None else torch.as_tensor(v) for v in (x, dt, A, B, C, D, state)]
        y, after = ssd_scan(*given, chunk=chunk, final_state=final_state)
        return y.numpy(), None if after is None else after.numpy()
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected at least 1")
    heads, p, groups, n = _expect_inputs(x, dt, A, B)
    expect("C", C, len(x), groups, n)
    if D is not None:
        expect("D", D, heads)
    if state is not None:
        expect("state", state, heads, p, n)
    if pending is not None:
        tokens = len(pending[0])
        expect("x of pending tokens", pending[0], tokens, heads, p)
        expect("dt of pending tokens", pending[1], tokens, heads)
        expect("B of pending tokens", pending[2], tokens, groups, n)
    if state is not None and _native_takes(state, x, dt, A, B, C, D, *(pending or ())):
        return _native_scan(state, A, D, pending, (x, dt, B, C), final_state)
    x = x if x.dtype == torch.float64 else x.float()
    dt, A, B, C = (v.to(x.dtype) for v in (dt, A, B, C))
    tokens, chunk = len(x), chunk or CHUNK
    if state is None:
        state = x.new_zeros(*x.shape[1:], B.shape[2])
    if pending is not None:
        advance_state_(state, pending[0], pending[1], A, pending[2])
    # `state` belongs to the caller. It is copied only where a chunk's end will be written into it.
    copied = final_state or tokens > chunk
    state = state.to(x.dtype, copy=copied, memory_format=torch.contiguous_format).contiguous()
    outputs = []
    for start in range(0, tokens, chunk):
        part = slice(start, start + chunk)
        outputs.append(_chunk_outputs(x[part], dt[part], A, B[part], C[part], state))
        if final_state or start + chunk < tokens:
            if torch.is_grad_enabled():
                state = state.clone()  # the outputs' gradients read the one before
            advance_state_(state, x[part], dt[part], A, B[part])
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs) if outputs else torch.empty_like(x)
    if D is not None:
        y = y + D.to(x.dtype)[:, None] * x
    return y, state if final_state else None


def _expect_inputs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> tuple[int, int, int, int]:
    """(h, p, G, N); raises ValueError unless x [T, h, p], dt [T, h], A [h] and B [T, G, N] fit each other."""
    tokens, heads, p = dimensions("x", x, "T", "h", "p")
    _, groups, n = dimensions("B", B, "T", "G", "N")
    expect("B", B, tokens, groups, n)
    expect("dt", dt, tokens, heads)
    expect("A", A, heads)
    if not groups or heads % groups:
        raise ValueError(f"{heads} heads are not a multiple of {groups} groups")
    return heads, p, groups, n


def advance_state_(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> None:
    """Carry a state over T tokens in place: `S = exp(c_T) S + sum_s exp(c_T - c_s) dt_s x_s B_s^T`, c summing dt A.

    state: [h, p, N]; others and errors as in `ssd_scan`, all of one dtype. This is also how a state follows accepted
    tokens: from where it stood before them.
    """
    heads, p, groups, n = _expect_inputs(x, dt, A, B)
    expect("state", state, heads, p, n)
    if _native_takes(state, x, dt, A, B):
        _native_scan(state, A, None, (x, dt, B), None, False)
        return
    tokens = len(x)
    a = (dt * A).double()  # sums of many steps, of which small differences count
    total = a.sum(0)
    weights = (total - a.cumsum(0)).exp().to(x.dtype) * dt  # [T, h]
    # Heads of a group share B, so their channels stack into one product: [G, h / G * p, T] with [G, T, N].
    inputs = (x * weights[..., None]).reshape(tokens, groups, heads // groups * p)
    state *= total.exp().to(x.dtype)[:, None, None]
    by_group = state.view(groups, heads // groups * p, -1)
    add = by_group.addcmul_ if tokens == 1 else by_group.baddbmm_  # the same for one token, in half of the time
    add(inputs.permute(1, 2, 0), B.transpose(0, 1))


def joins_passes(state: Tensor) -> bool:
    """Whether `ssd_scan` carries this state over pending tokens while it reads it for new ones."""
    return _native_takes(state)


def _native_takes(state: Tensor, *inputs: Tensor | None) -> bool:
    return state.dtype == torch.float32 and state.is_contiguous() and dispatch.takes(state, *inputs)


def _native_scan(
    state: Tensor,
    A: Tensor,
    D: Tensor | None,
    pending: tuple[Tensor, Tensor, Tensor] | None,
    staged: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Carry `state` over pending tokens, in place; then the outputs of staged ones, and the state after them."""
    heads, p, n = state.shape
    y = state.new_empty(0 if staged is None else staged[0].shape[0], heads, p)
    after = torch.empty_like(state) if final_state else None
    dispatch.native.scan(
        state=state,
        carried=None if pending is None else state,
        A=A.contiguous(),
        D=None if D is None else D.contiguous(),
        pending=None if pending is None else _native_inputs(*pending),
        staged=None if staged is None else _native_inputs(*staged),
        y=y,
        after=after,
        heads=heads,
        p=p,
        n=n,
        groups=(pending or staged or (state,))[-1].shape[1],
    )
    return y, after


def _native_inputs(x: Tensor, dt: Tensor, B: Tensor, C: Tensor | None = None) -> dict[str, Any]:
    """The fields of ScanInputs: each contiguous within a token, B and C of one stride; without C, B stands for it."""
    x, dt, B = _tight(x), dt.contiguous(), _tight(B)
    C = B if C is None else _tight(C)
    if C is not B and B.stride(0) != C.stride(0):
        B, C = B.contiguous(), C.contiguous()
    return {
        "x": x,
        "dt": dt,
        "B": B,
        "C": C,
        "tokens": x.shape[0],
        "x_row": x.stride(0),
        "dt_row": dt.stride(0),
        "B_row": B.stride(0),
    }


def _tight(v: Tensor) -> Tensor:
    return v if v.stride(2) == 1 and v.stride(1) == v.shape[2] else v.contiguous()


def _chunk_outputs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """y [Q, h, p] of Q tokens that start from `state`: a decayed product of C and B, and what the state held."""
    (tokens, heads, p), groups = x.shape, B.shape[1]
    per_group = heads // groups
    by_group = state.view(groups, per_group * p, -1)
    if tokens == 1:
        # In this order: the other way round, a product with one column, takes five times as long.
        held = (C.transpose(0, 1) @ by_group.transpose(1, 2)).view(1, heads, p)
        new = (B * C).sum(-1).repeat_interleave(per_group, 1) * dt
        return held * (dt * A).exp()[..., None] + new[..., None] * x
    c = (dt * A).double().cumsum(0).T  # [h, Q]
    # exp of differences, never a quotient of exps; what lies ahead has weight exp(-inf) = 0.
    ahead = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
    weights = (c[:, :, None] - c[:, None, :]).to(x.dtype).masked_fill_(ahead, float("-inf")).exp_()
    scores = C.transpose(0, 1) @ B.permute(1, 2, 0)  # [G, Q, Q]
    times = torch.mul if torch.is_grad_enabled() else Tensor.mul_  # gradients read the factors
    weights = times(weights.view(groups, per_group, tokens, tokens), scores[:, None])
    weights = times(weights, dt.T.reshape(groups, per_group, 1, tokens))
    y = weights.view(heads, tokens, tokens) @ x.transpose(0, 1)  # [h, Q, p]
    # What the incoming state holds, read by C and decayed up to each token: exp(c_l) C_l . S.
    held = (C.transpose(0, 1) @ by_group.transpose(1, 2)).view(groups, tokens, per_group, p)
    y.view(groups, per_group, tokens, p).addcmul_(
        held.transpose(1, 2), c.exp().to(x.dtype).view(groups, per_group, tokens, 1)
    )
    return y.transpose(0, 1)


def gated_group_norm(y: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float = 1e-5) -> Tensor:
    """`rms_norm(y * silu(gate)) * weight` with the mean taken within each of `groups` runs of channels.

    y: float32 [..., D]; gate: [..., D]; weight: [D]; returns y's shape in the gate's dtype, rounded once.
    Raises ValueError for other shapes. Source: Mamba-2, the norm after the scan (gate first).
    """
    size = y.shape[-1]
    expect("gate", gate, *y.shape)
    expect("weight", weight, size)
    if groups < 1 or size % groups:
        raise ValueError(f"{size} channels are not a multiple of {groups} groups")
    if y.numel() and y.ndim == 2 and y.dtype == torch.float32 and dispatch.takes(y) and dispatch.takes(gate, weight):
        return _native_gated_norm(y, gate, weight, groups, eps)
    gated = (y * F.silu(gate.float())).unflatten(-1, (groups, -1))
    return (rms_norm(gated, eps=eps).flatten(-2) * weight.float()).to(gate.dtype)


def _native_gated_norm(y: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    y, weight, gate = y.contiguous(), weight.contiguous(), gate if gate.stride(1) == 1 else gate.contiguous()
    out = torch.empty_like(y, dtype=gate.dtype)
    dispatch.native.gated_norm(
        y=y,
        gate=gate,
        weight=weight,
        out=out,
        rows=y.shape[0],
        groups=groups,
        size=y.shape[1] // groups,
        gate_row=gate.stride(0),
        eps=eps,
        bfloat16=gate.dtype is torch.bfloat16,
    )
    return out
