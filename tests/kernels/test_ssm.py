"""The scan of Mamba-2 against its recurrence written out, for every way to cut a text."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparing.kernels import (
    advance_state_,
    causal_conv,
    gated_group_norm,
    ssd_scan,
    stochastic_round,
    time_steps,
)
from tests.kernel_sets import using

P, N = 5, 7


def inputs(tokens, heads, groups, dtype=torch.float64, seed=0, p=P, n=N) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    dt = torch.nn.functional.softplus(draw(tokens, heads))
    return {
        "x": draw(tokens, heads, p),
        "dt": dt,
        "A": -draw(heads).exp(),
        "B": draw(tokens, groups, n),
        "C": draw(tokens, groups, n),
        "D": draw(heads),
        "state": draw(heads, p, n),
    }


def recurrence(x, dt, A, B, C, D=None, state=None):
    """Step 4 of the mixer, one number at a time."""
    tokens, heads, p = x.shape
    state = torch.zeros(heads, p, B.shape[2], dtype=x.dtype) if state is None else state.clone()
    y = torch.zeros_like(x)
    for t in range(tokens):
        for i in range(heads):
            group = i // (heads // B.shape[1])
            state[i] = math.exp(dt[t, i] * A[i]) * state[i] + dt[t, i] * torch.outer(x[t, i], B[t, group])
            y[t, i] = state[i] @ C[t, group] + (0 if D is None else D[i] * x[t, i])
    return y, state


def test_worked_example():
    one = torch.ones(3, 1, 1, dtype=torch.float64)
    dt = torch.full((3, 1), math.log(2), dtype=torch.float64)
    expected = torch.tensor([0.693147, 1.039721, 1.213008], dtype=torch.float64)
    y, state = ssd_scan(one, dt, -torch.ones(1), one, one)
    torch.testing.assert_close(y.flatten(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(state.flatten(), expected[-1:], rtol=0, atol=1e-6)
    y, _ = ssd_scan(one, dt, -torch.ones(1), one, one, D=torch.ones(1))
    torch.testing.assert_close(y.flatten(), expected + 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("heads", "groups"), [(6, 3), (3, 3), (4, 1), (1, 1)])
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 20])
def test_every_chunk_equals_the_recurrence(heads, groups, tokens):
    flow = inputs(tokens, heads, groups)
    before = flow["state"].clone()
    y, state = recurrence(**flow)
    for chunk in (1, 2, 8, tokens, tokens + 5, None):
        mine, after = ssd_scan(**flow, chunk=chunk)
        torch.testing.assert_close(mine, y, rtol=0, atol=1e-12)
        torch.testing.assert_close(after, state, rtol=0, atol=1e-12)
        only, none = ssd_scan(**flow, chunk=chunk, final_state=False)
        assert none is None
        assert torch.equal(only, mine)
        assert torch.equal(flow["state"], before)
    without = {key: flow[key] for key in ("x", "dt", "A", "B", "C")}
    torch.testing.assert_close(ssd_scan(**without)[0], recurrence(**without)[0], rtol=0, atol=1e-12)


@given(st.integers(1, 30), st.data())
def test_a_split_text_equals_one_call(tokens, data):
    flow = inputs(tokens, 6, 3, seed=tokens)
    cut = data.draw(st.integers(0, tokens))
    fixed = {"A": flow["A"], "D": flow["D"]}
    y, state = ssd_scan(**flow)
    parts = []
    carried = flow["state"]
    for part in (slice(0, cut), slice(cut, None)):
        each = {key: flow[key][part] for key in ("x", "dt", "B", "C")}
        out, carried = ssd_scan(**each, **fixed, state=carried, chunk=4)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(carried, state, rtol=0, atol=1e-12)


@given(st.integers(0, 12))
def test_carrying_a_state_over_accepted_tokens_equals_running_them(accepted):
    flow = inputs(12, 6, 3)
    state = flow["state"].clone()
    advance_state_(state, flow["x"][:accepted], flow["dt"][:accepted], flow["A"], flow["B"][:accepted])
    run = {key: value[:accepted] if key in ("x", "dt", "B", "C") else value for key, value in flow.items()}
    torch.testing.assert_close(state, recurrence(**run)[1], rtol=0, atol=1e-13)


def test_no_token_and_no_time_leave_the_state():
    flow = inputs(4, 6, 3)
    empty = {key: value[:0] if key in ("x", "dt", "B", "C") else value for key, value in flow.items()}
    y, state = ssd_scan(**empty)
    assert y.shape == (0, 6, P)
    assert torch.equal(state, flow["state"])
    _, state = ssd_scan(**dict(flow, dt=torch.zeros(4, 6)))
    assert torch.equal(state, flow["state"])


@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
def test_float32_stays_close_to_float64_for_slow_and_fast_decay(each_kernel_set, size):
    """Sums of decays grow to thousands; it is their small differences that count."""
    flow = inputs(200, 4, 2)
    flow["dt"] = flow["dt"] * size
    flow["dt"][::3] *= 0.01
    single: Any = {key: value.float() for key, value in flow.items()}
    y, state = ssd_scan(**flow)
    mine, after = ssd_scan(**single)
    assert torch.isfinite(mine).all()
    scale = y.abs().max()
    assert (mine - y).abs().max() <= 1e-5 * scale
    assert (after - state).abs().max() <= 1e-5 * state.abs().max()


def test_arrays_of_numpy():
    flow = inputs(9, 6, 3)
    y, state = ssd_scan(**{key: value.numpy() for key, value in flow.items()}, chunk=4)
    assert isinstance(y, np.ndarray)
    np.testing.assert_allclose(y, ssd_scan(**flow)[0].numpy(), atol=1e-12)
    np.testing.assert_allclose(state, ssd_scan(**flow)[1].numpy(), atol=1e-12)


def test_groups_must_divide_the_heads():
    flow = inputs(2, 6, 3)
    with pytest.raises(ValueError, match="6 heads are not a multiple of 4 groups"):
        ssd_scan(**dict(flow, B=torch.zeros(2, 4, N), C=torch.zeros(2, 4, N)))


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_convolution_sees_the_rows_before(each_kernel_set, kernel, bias):
    x, weight = torch.randn(9, 6), torch.randn(6, 1, kernel)
    offset = torch.randn(6) if bias else None
    padded = torch.cat([torch.zeros(kernel - 1, 6), x])
    out = causal_conv(padded, weight, offset)
    expected = torch.nn.functional.conv1d(x.T[None], weight, offset, padding=kernel - 1, groups=6)[0, :, :9].T
    torch.testing.assert_close(out, torch.nn.functional.silu(expected), rtol=1e-5, atol=1e-6)
    for cut in range(10):
        pieces = [padded[: kernel - 1 + cut], padded[cut:]]
        torch.testing.assert_close(torch.cat([causal_conv(piece, weight, offset) for piece in pieces]), out)
    assert causal_conv(padded.bfloat16(), weight.bfloat16(), offset).dtype == torch.float32


def test_time_steps_have_no_floor_unless_the_config_sets_one():
    raw = torch.tensor([[-30.0, 0.0, 3.0]])
    free = time_steps(raw, torch.zeros(3), (0.0, math.inf))
    torch.testing.assert_close(free.double(), torch.log1p(raw.double().exp()), rtol=1e-5, atol=0)
    bounded = time_steps(raw, torch.tensor([0.0, 0.5, 0.0]), (0.1, 2.0))
    torch.testing.assert_close(bounded, torch.tensor([[0.1, 0.974077, 2.0]]))


def test_norm_gates_first_and_takes_each_group_apart(each_kernel_set):
    y, z, weight = torch.randn(4, 6), torch.randn(4, 6), torch.randn(6)
    out = gated_group_norm(y, z, weight, 2, 1e-5)
    gated = y.double() * z.double() * torch.sigmoid(z.double())
    for group in (slice(0, 3), slice(3, 6)):
        mean = gated[:, group].square().mean(-1, keepdim=True)
        expected = gated[:, group] * (mean + 1e-5) ** -0.5 * weight[group].double()
        torch.testing.assert_close(out[:, group].double(), expected, rtol=1e-5, atol=1e-6)
    assert gated_group_norm(y, z.bfloat16(), weight, 2).dtype == torch.bfloat16


SIZES = [(6, 3, 5, 7), (4, 1, 64, 128), (2, 2, 3, 130), (3, 1, 1, 1)]  # heads, groups, head_dim, state_size


@pytest.mark.parametrize(("heads", "groups", "p", "n"), SIZES)
@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 33])
def test_native_scan_against_float64(native_kernel_set, heads, groups, p, n, tokens):
    flow = inputs(tokens, heads, groups, p=p, n=n)
    y, state = recurrence(**flow)
    single: Any = {key: value.float() for key, value in flow.items()}
    mine, after = ssd_scan(**single)
    assert torch.equal(single["state"], flow["state"].float())
    torch.testing.assert_close(mine.double(), y, rtol=1e-5, atol=1e-5 * n**0.5)
    torch.testing.assert_close(after.double(), state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "groups", "p", "n"), SIZES)
def test_native_scan_gives_the_same_bits_for_every_split(native_kernel_set, heads, groups, p, n):
    """In two calls, with the tokens before as pending ones, or as a state carried over them."""
    tokens = 40
    flow: Any = {key: v.float() for key, v in inputs(tokens, heads, groups, p=p, n=n).items()}
    fixed = {"A": flow["A"], "D": flow["D"]}
    y, state = ssd_scan(**flow)
    for cut in (0, 1, 15, 16, 17, 32, 39, 40):
        before, rest = (
            {key: flow[key][part] for key in ("x", "dt", "B", "C")} for part in (slice(0, cut), slice(cut, None))
        )
        first, middle = ssd_scan(**before, **fixed, state=flow["state"])
        for pending in (None, (before["x"], before["dt"], before["B"])):
            start = (middle if pending is None else flow["state"]).clone()
            last, after = ssd_scan(**rest, **fixed, state=start, pending=pending)
            assert torch.equal(torch.cat([first, last]), y)
            assert torch.equal(after, state)
            assert torch.equal(start, middle)
        carried = flow["state"].clone()
        advance_state_(carried, before["x"], before["dt"], flow["A"], before["B"])
        assert torch.equal(carried, middle)


def test_native_scan_however_its_inputs_lie(native_kernel_set):
    flow: Any = {key: v.float() for key, v in inputs(20, 6, 3).items()}
    y, state = ssd_scan(**flow)
    mixed = torch.cat([flow[key].flatten(1) for key in ("x", "B", "C")], 1)
    x, B, C = mixed.split([30, 21, 21], 1)
    views = {"x": x.unflatten(1, (6, 5)), "B": B.unflatten(1, (3, 7)), "C": C.unflatten(1, (3, 7))}
    columns = {key: flow[key].mT.contiguous().mT for key in ("x", "dt", "C")}
    for other in (views, columns):
        mine, after = ssd_scan(**flow | other)
        assert torch.equal(mine, y)
        assert torch.equal(after, state)


def test_threads_change_nothing(native_kernel_set):
    flow: Any = {key: v.float() for key, v in inputs(30, 6, 3, p=64, n=128).items()}
    x, weight = torch.randn(150, 700).bfloat16(), torch.randn(700, 1, 4).bfloat16()
    y, gate = torch.randn(40, 700), torch.randn(40, 700)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append([*ssd_scan(**flow), causal_conv(x, weight), gated_group_norm(y, gate, torch.ones(700), 7)])
    torch.set_num_threads(1)
    assert all(torch.equal(one, many) for one, many in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "channels", "taps"), [(1, 1000, 4), (70, 37, 4), (3, 600, 3), (0, 8, 4)])
def test_native_convolution_against_float64(native_kernel_set, dtype, tokens, channels, taps):
    x, weight = torch.randn(tokens + taps - 1, channels).to(dtype), torch.randn(channels, 1, taps).to(dtype)
    bias = torch.randn(channels).to(dtype)
    with using("reference"):
        exact = causal_conv(x.double().float(), weight, bias)
    out = causal_conv(x, weight, bias)
    assert out.shape == (tokens, channels) and out.dtype == torch.float32
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "size"), [(1, 7), (3, 40), (8, 256)])
def test_native_norm_against_float64(native_kernel_set, dtype, groups, size):
    wide = torch.randn(9, 2 * groups * size).to(dtype)
    y, gate, weight = torch.randn(9, groups * size), wide[:, : groups * size], torch.randn(groups * size).to(dtype)
    gated = (y.double() * torch.nn.functional.silu(gate.double())).unflatten(1, (groups, size))
    exact = (gated * (gated.square().mean(-1, keepdim=True) + 1e-5) ** -0.5).flatten(1) * weight.double()
    out = gated_group_norm(y, gate, weight, groups)
    assert out.dtype == dtype
    rounding = 2e-6 if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stochastic_rounding_is_right_on_average(dtype):
    g = torch.Generator().manual_seed(0)
    for value in (0.7310586, -3.1415926, 1e-6, -2.9e-8, 12345.678):
        exact = torch.full((20000,), value)
        rounded = stochastic_round(exact, dtype, g)
        low, high = rounded.min().item(), rounded.max().item()
        assert low <= value <= high
        assert len(rounded.unique()) == 2
        assert high == torch.nextafter(rounded.min().float(), torch.tensor(1e9)).item() or high > low
        assert abs(rounded.double().mean() - value) <= 5 * (high - low) / 20000**0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_fits_is_not_changed(dtype):
    finite = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = finite[torch.isfinite(finite)]
    rounded = stochastic_round(finite.float(), dtype)
    assert torch.equal(rounded.float(), finite.float())
    assert torch.isfinite(stochastic_round(torch.tensor([3e38, -3e38]), torch.float16)).all()


def test_slow_changes_survive_stochastic_rounding():
    """Decay e^-0.001 and input 0.001 for 4000 steps: to nearest, a 16-bit state stalls below its true value."""
    g = torch.Generator().manual_seed(0)
    nearest, stochastic = torch.zeros(2000).half(), torch.zeros(2000).half()
    for _ in range(4000):
        nearest = (nearest.float() * math.exp(-0.001) + 0.001).half()
        stochastic = stochastic_round(stochastic.float() * math.exp(-0.001) + 0.001, torch.float16, g)
    assert nearest[0].item() == pytest.approx(0.756, abs=1e-3)
    assert stochastic.float().mean().item() == pytest.approx(0.982, abs=2e-3)
