"""What is no number stays none in every kernel, and stays out where it is not seen."""

import pytest
import torch
from torch.nn import functional as F

from sparing.kernels import attention, experts, gated, linear, norm, routing, ssm
from sparing.kernels.code_layout import lay_out
from sparing.kernels.codes import Codes, attention_over_codes
from sparing.memory.turboquant.codebook import lloyd_max_codebook

INF, NAN = float("inf"), float("nan")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# NaN of every sign and with bits that rounding could carry over into the exponent
NANS = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001, -0x400000], dtype=torch.int32).view(torch.float32)


@dtypes
@pytest.mark.parametrize("width", [3, 40])
def test_activations(dtype, width, each_kernel_set):
    x = torch.tensor([NAN, INF, -INF, 2.0, -3.0, 90.0, -90.0, *NANS.tolist()])[:, None].to(dtype)
    one, other = torch.ones(width, 1).to(dtype), torch.ones(width, 1).to(dtype)
    for activation, of in (("silu", F.silu), ("gelu", lambda v: F.gelu(v, approximate="tanh"))):
        wanted = of(x.float()).expand(-1, width)
        for rows in (slice(0, 8), slice(None)):
            torch.testing.assert_close(
                linear(x[rows], one, None, activation).float(), wanted[rows], rtol=2e-2, atol=1e-5, equal_nan=True
            )
            found = gated(x[rows], one, other, activation).float()
            torch.testing.assert_close(found, wanted[rows] * x[rows].float(), rtol=3e-2, atol=1e-5, equal_nan=True)
            cut = of(x[rows].float().clamp(max=1.5)) * x[rows].float().clamp(-1.5, 1.5)
            found = gated(x[rows], one, other, activation, limit=1.5).float()
            torch.testing.assert_close(found, cut.expand(-1, width), rtol=3e-2, atol=1e-5, equal_nan=True)


@dtypes
@pytest.mark.parametrize("tokens", [1, 5, 12])
@pytest.mark.parametrize(
    ("activation", "limit"), [(experts.relu2, INF), (experts.gated_gelu, INF), (experts.gated_silu, 1.5)]
)
def test_experts(tokens, activation, limit, dtype, each_kernel_set):
    """An expert's NaN reaches the tokens that chose it, and no others."""
    gate = 1 if activation is experts.relu2 else 2
    up, down = torch.randn(3, 20 * gate, 16).to(dtype), torch.randn(3, 16, 20).to(dtype)
    up[1, 7] = NAN
    x, ids = torch.randn(tokens, 16).to(dtype), torch.arange(tokens)[:, None] % 3
    found = experts.grouped_experts(x, torch.ones(tokens, 1), ids, up, down, activation, limit)
    assert found.isnan().all(-1).tolist() == (ids[:, 0] == 1).tolist()
    assert found.isnan().any(-1).tolist() == (ids[:, 0] == 1).tolist()
    if activation is experts.relu2:
        assert experts.squared_mlp(x, up[1], down[1]).isnan().all()
        x[0] = NAN
        found = experts.squared_mlp(x, up[0], down[0])
        assert found[0].isnan().all() and not found[1:].isnan().any()


@pytest.mark.parametrize("scoring", ["sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("n_group", [1, 4])
def test_routing(n_group, scoring, each_kernel_set):
    """NaN is the largest of all, as torch sorts; of several the first."""
    x, gate, bias = torch.randn(4, 16), torch.randn(12, 16), torch.zeros(12)
    gate[7], gate[8, 3] = NAN, INF
    bias[2] = NAN
    x[3] = NAN
    ids, weights = routing.route(x, gate, bias, 3, n_group, max(1, n_group // 2), scoring=scoring)
    scores = torch.sigmoid(x @ gate.T) if scoring == "sigmoid" else F.softplus(x @ gate.T).sqrt()
    biased = scores + bias
    assert (ids[3] == torch.arange(3)).all()
    for row in range(3):
        assert {2, 7} <= set(ids[row].tolist())
        torch.testing.assert_close(weights[row].isnan().all(), torch.tensor(True))
        assert biased[row][ids[row]].isnan().sum() >= 2


def test_routing_by_shares(each_kernel_set):
    """A softmax has no number left beside one that is none or infinite; a token's are its own."""
    x, gate = torch.randn(4, 16), torch.randn(12, 16)
    x[1], x[2, 5] = NAN, INF
    ids, weights = routing.route(x, gate, None, 3, scoring="softmax")
    assert ids[1].tolist() == ids[2].tolist() == [0, 1, 2]
    assert weights.isnan().all(-1).tolist() == weights.isnan().any(-1).tolist() == [False, True, True, False]


@dtypes
def test_norms_and_scans(dtype, each_kernel_set):
    x = torch.randn(4, 24).to(dtype)
    x[1, 5], x[2, 3] = NAN, INF
    found = norm.rms_norm(x, torch.ones(24).to(dtype))
    assert found[1].isnan().all() and found[2, 3].isnan() and (found[2, 4:] == 0).all() and not found[0].isnan().any()
    x = torch.randn(8, 20).to(dtype)
    x[5, 3], x[6, 4] = NAN, -INF
    mixed = ssm.causal_conv(x, torch.ones(20, 1, 4).to(dtype), None)
    assert mixed[:, 3].isnan().tolist() == [False, False, True, True, True]
    assert not mixed[:3, 4].isnan().any() and mixed[3:, 4].isnan().all()  # -inf * sigmoid(-inf)


@dtypes
@pytest.mark.parametrize(
    "seen", [slice(0, 1), slice(0, 64), slice(64, 128), slice(0, 700), slice(699, 700), slice(None)]
)
def test_a_key_that_is_nan(seen, dtype, each_kernel_set):
    """However many of the keys are NaN, and wherever they stand."""
    q, k, v = torch.randn(2, 4, 24), torch.randn(2, 701, 24), torch.randn(2, 701, 24)
    k[1, seen] = NANS[torch.arange(701)[seen] % 5][:, None]
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    found = attention(q, k, v, scale=0.2)
    assert found[:, 2:].isnan().all() and not found[:, :2].isnan().any()


@dtypes
@pytest.mark.parametrize("tokens", [1, 2, 4, 20, 70])
@pytest.mark.parametrize("window", [None, 1, 5, 90])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_value_that_is_not_seen_stays_out(tokens, window, bad, dtype, each_kernel_set):
    keys = 130
    q, k, v = torch.randn(tokens, 4, 24), torch.randn(2, keys, 24), torch.randn(2, keys, 24)
    hidden = [keys - 1, keys - tokens, keys - tokens - 3, 5]
    v[:, hidden] = bad
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    found = attention(q, k, v, scale=0.2, window=window)
    for i in range(tokens):
        position = keys - tokens + i
        low = 0 if window is None else max(0, position + 1 - window)
        reads = any(low <= one <= position for one in hidden)
        assert found[i].isfinite().all() != reads and found[i].isfinite().any() != reads
        plain = attention(q[i : i + 1], k[:, : position + 1], v[:, : position + 1], scale=0.2, window=window)
        if not reads:
            torch.testing.assert_close(found[i], plain[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("what", ["query", "key scale", "all key scales", "value scale", "bias"])
def test_codes(bits, exact, what, each_kernel_set):
    heads, n, d = 2, 600, 32
    centroids = lloyd_max_codebook(d, bits)[0].float()

    def part(role: str) -> Codes:
        codes = torch.randint(0, 2**bits, (heads, n, d), dtype=torch.uint8)
        scale = torch.rand(heads, 640).add(0.5).half()
        return Codes(lay_out(codes, bits, role), scale.view(heads, 10, 64), centroids, d)

    keys, values, q, bias = part("keys"), part("values"), torch.randn(2, 4, d), torch.zeros(2, 4, n)
    if what == "query":
        q[:, 2] = NAN
    elif what == "bias":
        bias[:, 2, 100] = NAN
    elif what == "all key scales":
        keys.scale[1] = NAN
    else:
        (keys if what == "key scale" else values).scale[1, 4, 7] = NAN
    (out,), lse = attention_over_codes([q], [keys], [values], n, scale=0.2, bias=bias, exact=exact)
    assert out[:, 2].isnan().all() and not out[:, :2].isnan().any()
    assert what == "value scale" or lse[:, 2].isnan().all()
