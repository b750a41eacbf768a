"""Attention over codes against softmax over what they decode to, written out."""

import pytest
import torch

from sparing.kernels.code_layout import BLOCK, lay_out
from sparing.kernels.codes import Codes, attention_over_codes, decode_codes
from sparing.kernels.partial import merge_partials, partial_attention
from sparing.memory.turboquant.codebook import lloyd_max_codebook

KV_HEADS, GROUP = 2, 3


def part(n: int, dims: int, bits: int, role: str, seed: int, heads: int = KV_HEADS) -> tuple[Codes, torch.Tensor]:
    """Random codes, and the float64 vectors [kv_heads, n, dims] they stand for."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (heads, n, dims), generator=generator).to(torch.uint8)
    blocks = -(-n // BLOCK)
    scale = (0.2 + torch.rand(heads, blocks * BLOCK, generator=generator)).half()
    centroids = lloyd_max_codebook(max(dims, 2), bits)[0].float() * dims**0.5
    vectors = centroids.double()[codes.long()] * scale[:, :n, None].double()
    return Codes(lay_out(codes, bits, role), scale.unflatten(1, (blocks, BLOCK)), centroids, dims), vectors


def softmax_attention(q, k, v, scale, bias=None):
    k, v = k.repeat_interleave(GROUP, 0), v.repeat_interleave(GROUP, 0)
    scores = torch.einsum("thd,hnd->thn", q.double(), k) * scale
    scores = scores if bias is None else scores + bias
    return torch.einsum("thn,hnd->thd", scores.softmax(-1), v), scores.logsumexp(-1)


@pytest.mark.parametrize("bits", [(4, 4), (3, 3), (2, 2), (4, 3), (1, 8), (5, 6), (7, 1), (8, 5), (6, 4)])
@pytest.mark.parametrize("n", [1, 64, 65, 1024, 2200])
def test_one_part(each_kernel_set, bits, n):
    dims = (32, 48) if n != 65 else (80, 12)
    keys, k = part(n, dims[0], bits[0], "keys", 1)
    values, v = part(n, dims[1], bits[1], "values", 2)
    for tokens in (1, 5):
        q = torch.randn(tokens, KV_HEADS * GROUP, dims[0])
        bias = torch.randn(tokens, KV_HEADS * GROUP, n)
        for added in (None, bias):
            out, lse = attention_over_codes([q], [keys], [values], n, scale=0.7, bias=added)
            expected, expected_lse = softmax_attention(q, k, v, 0.7, added)
            torch.testing.assert_close(out[0].double(), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [(k, v) for k in (2, 3, 4) for v in (2, 3, 4)])
@pytest.mark.parametrize(("tokens", "dims"), [(1, (128, 128)), (3, (20, 64)), (2, (256, 70))])
def test_few_queries(each_kernel_set, bits, tokens, dims):
    """Every pair of widths; buffers longer than what is read, whose rest may hold anything."""
    n = 600
    keys, k = part(n + 100, dims[0], bits[0], "keys", 1)
    values, v = part(n + 100, dims[1], bits[1], "values", 2)
    for codes in (keys, values):
        codes.scale.flatten(1)[:, n:] = float("nan")
    keys = keys._replace(blocks=keys.blocks[:, :10], scale=keys.scale[:, :10])
    q = torch.randn(tokens, KV_HEADS * GROUP, dims[0])
    out, lse = attention_over_codes([q], [keys], [values], n, scale=0.1)
    expected, expected_lse = softmax_attention(q, k[:, :n], v[:, :n], 0.1)
    torch.testing.assert_close(out[0].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("queries", [1, 2, 3, 7])
def test_products_of_bytes(each_kernel_set, bits, queries):
    """Scores within 1.2 % of the exact ones, mixes within 0.8 %, where exactness is not asked for."""
    heads = 300  # each with one key: the log of the sum of a softmax over it is its score
    keys, k = part(1, 128, bits, "keys", 1, heads)
    values, v = part(1, 64, bits, "values", 2, heads)
    q = torch.randn(1, heads * queries, 128)
    _, scores = attention_over_codes([q], [keys], [values], 1, exact=False)
    exact = (q[0].double().unflatten(0, (heads, queries)) * k).sum(-1)
    assert (scores.view(heads, queries) - exact).norm() < 0.012 * exact.norm()
    keys, _ = part(500, 128, bits, "keys", 3)
    values, v = part(500, 64, bits, "values", 4)
    out, _ = attention_over_codes([torch.zeros(1, KV_HEADS * queries, 128)], [keys], [values], 500, exact=False)
    exact = v.mean(1).repeat_interleave(queries, 0)
    assert (out[0][0] - exact).norm() < 0.008 * exact.norm()


def test_one_token_with_all_the_weight(each_kernel_set):
    """In bytes too nothing of it is lost to the others: its weight has 16 bits."""
    keys, k = part(640, 64, 4, "keys", 1)
    values, v = part(640, 64, 4, "values", 2)
    q = 3 * k[:, 321].float().repeat_interleave(GROUP, 0)[None]
    out, _ = attention_over_codes([q], [keys], [values], 640, exact=False)
    exact = v[:, 321].repeat_interleave(GROUP, 0)
    assert (out[0][0] - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("bits", [(4, 4), (3, 2), (2, 3)])
@pytest.mark.parametrize(("n", "scale"), [(257, 0.05), (2200, -0.05), (8500, 0.05)])
def test_bytes_over_many_tokens(each_kernel_set, bits, n, scale):
    """Several spans and stretches of them, the last one part empty; a bias; factors of either sign.

    Scores differ by about 0.3 here, so that their relative error leaves that of the mix, and little in the sum.
    """
    keys, k = part(n, 64, bits[0], "keys", 1)
    values, v = part(n, 48, bits[1], "values", 2)
    q = torch.randn(3, KV_HEADS * GROUP, 64)
    bias = torch.randn(3, KV_HEADS * GROUP, n)
    for added in (None, bias):
        out, lse = attention_over_codes([q], [keys], [values], n, scale=scale, bias=added, exact=False)
        expected, expected_lse = softmax_attention(q, k, v, scale, added)
        assert (out[0] - expected).norm() < 0.01 * expected.norm()
        torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=0.005)


@pytest.mark.parametrize("exact", [True, False])
def test_what_is_not_finite_stays_so(each_kernel_set, exact):
    keys, _ = part(300, 32, 4, "keys", 1)
    values, _ = part(300, 32, 4, "values", 2)
    for bad in (float("nan"), float("inf")):
        q = torch.randn(1, KV_HEADS * GROUP, 32)
        q[0, 1, 5] = bad
        out, _ = attention_over_codes([q], [keys], [values], 300, exact=exact)
        assert out[0][0, 1].isnan().all() and out[0][0, [0, 2, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 64, 70, 1100])
@pytest.mark.parametrize("tokens", [1, 4, 30])
def test_parts_add_up(each_kernel_set, dtype, n, tokens):
    """Parts of any widths and sizes, one of 1 bit; drafts, and more rows than a kernel takes at a time."""
    keys, k = zip(*[part(n, dims, bits, "keys", dims) for dims, bits in ((12, 3), (48, 1), (16, 6))], strict=True)
    values, v = zip(*[part(n, dims, bits, "values", dims) for dims, bits in ((32, 2), (20, 7))], strict=True)
    q = [torch.randn(tokens, KV_HEADS * GROUP, part.dims, dtype=dtype) for part in keys]
    bias = torch.randn(tokens, KV_HEADS * GROUP, n, dtype=dtype)
    for added in (None, bias):
        out, lse = attention_over_codes(q, keys, values, n, scale=0.1, bias=added)
        expected, expected_lse = softmax_attention(torch.cat(q, -1), torch.cat(k, -1), torch.cat(v, -1), 0.1, added)
        torch.testing.assert_close(torch.cat(out, -1).double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_behind_buffers_that_hold_anything(each_kernel_set, bits):
    keys, k = part(300, 40, bits, "keys", 1)
    values, v = part(300, 24, bits, "values", 2)
    for codes in (keys, values):
        codes.scale.flatten(1)[:, 200:] = float("nan")
    q = torch.randn(2, KV_HEADS * GROUP, 40)
    out, lse = attention_over_codes([q], [keys], [values], 200, scale=0.3)
    expected, expected_lse = softmax_attention(q, k[:, :200], v[:, :200], 0.3)
    torch.testing.assert_close(out[0].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_decoding_a_stretch():
    values, v = part(200, 48, 3, "values", 4)
    torch.testing.assert_close(decode_codes(values, "values", 64, 150).double(), v[:, 64:150], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_parts_over_disjoint_keys_merge_exactly(causal):
    q = torch.randn(4, KV_HEADS * GROUP, 16, dtype=torch.float64)
    k, v = torch.randn(2, KV_HEADS, 20, 16, dtype=torch.float64)
    whole = partial_attention(q, k, v, scale=0.9, causal=causal)
    first = partial_attention(q, k[:, :9], v[:, :9], scale=0.9, causal=False)
    rest = partial_attention(q, k[:, 9:], v[:, 9:], scale=0.9, causal=causal)
    torch.testing.assert_close(merge_partials([first, rest]), whole[0])
    if not causal:
        expected, expected_lse = softmax_attention(q, k, v, 0.9)
        torch.testing.assert_close(whole[0], expected)
        torch.testing.assert_close(whole[1], expected_lse)
