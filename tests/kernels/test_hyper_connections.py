"""Streams that are read as one, mixed and written back, in every set of kernels."""

import math

import pytest
import torch

from sparing.kernels import dispatch
from sparing.kernels.hyper_connections import hc_head, hc_post, hc_pre, hc_static, hyper_connection, sinkhorn

pytestmark = pytest.mark.usefixtures("each_kernel_set")


def literal_sinkhorn(logits, iters=20, eps=1e-6):
    """The definition, in its own order and type."""
    matrix = torch.softmax(logits, -1) + eps
    matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    return matrix


def literal_pre(X, fn, base, scale, iters, eps, norm_eps):
    """(u, post, comb) of one token's streams in float64, number by number."""
    X, fn, base, scale = X.double(), fn.double(), base.double(), scale.double()
    n, size = X.shape
    x = [X[j, h].item() for j in range(n) for h in range(size)]
    root = math.sqrt(sum(a * a for a in x) / len(x) + norm_eps)
    v = [sum(f * a / root for f, a in zip(row, x, strict=True)) for row in fn.tolist()]
    which = [0] * n + [1] * n + [2] * n * n
    z = [a * scale[w].item() + b for a, w, b in zip(v, which, base.tolist(), strict=True)]
    pre = [1 / (1 + math.exp(-a)) + eps for a in z[:n]]
    post = [2 / (1 + math.exp(-a)) for a in z[n : 2 * n]]
    comb = literal_sinkhorn(torch.tensor(z[2 * n :], dtype=torch.float64).view(n, n), iters, eps)
    return sum(p * X[j] for j, p in enumerate(pre)), torch.tensor(post, dtype=torch.float64), comb


def literal_post(X, y, post, comb):
    """X'_k = post_k y + sum_j comb[j, k] X_j, of one token in float64."""
    X, y, post, comb = X.double(), y.double(), post.double(), comb.double()
    n = len(X)
    return torch.stack([post[k] * y + sum(comb[j, k] * X[j] for j in range(n)) for k in range(n)])


def parameters(n, size, functions=None, scales=3):
    """fn, base and scale, all of them random: those of `hc_pre`, or with n functions and one scale of `hc_head`."""
    functions = functions or (2 + n) * n
    fn = torch.randn(functions, n * size) / (n * size) ** 0.5
    return fn, torch.randn(functions), torch.rand(scales) * 2 + 0.25


def test_worked_matrices():
    z = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    for iters, expected in (
        (1, [[0.2339, 0.8598], [0.7661, 0.1402]]),
        (2, [[0.2019, 0.8356], [0.7981, 0.1644]]),
        (20, [[0.182426, 0.817574], [0.817574, 0.182426]]),
    ):
        torch.testing.assert_close(
            sinkhorn(z, iters), torch.tensor(expected), rtol=0, atol=6e-5 if iters < 20 else 2e-6
        )
    z = torch.tensor([[1.0, 2, 3], [0, 0, 0], [3, 1, 2]])
    expected = torch.tensor([[0.0816, 0.3784, 0.5401], [0.2776, 0.4737, 0.2487], [0.6408, 0.1480, 0.2112]])
    torch.testing.assert_close(sinkhorn(z), expected, rtol=0, atol=6e-5)


def test_two_streams_have_a_closed_form():
    z = torch.randn(200, 2, 2, dtype=torch.float64)
    a = torch.sigmoid((z[:, 0, 0] + z[:, 1, 1] - z[:, 0, 1] - z[:, 1, 0]) / 2)
    expected = torch.stack([a, 1 - a, 1 - a, a], -1).view(-1, 2, 2)
    torch.testing.assert_close(sinkhorn(z, iters=200, eps=0.0), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(sinkhorn(z.float()).double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 3, 8, 33, 1000])
def test_tokens_last_or_matrices_one_by_one_gives_the_same_bits(n, tokens):
    z = torch.randn(tokens, n, n) * 4
    assert torch.equal(sinkhorn(z), literal_sinkhorn(z))
    assert torch.equal(sinkhorn(z)[-1], sinkhorn(z[-1]))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_matrices_of_the_limit(n):
    z = torch.randn(5, 2, n, n)
    matrix = sinkhorn(z)
    assert matrix.shape == z.shape
    torch.testing.assert_close(matrix.sum(-2), torch.ones(5, 2, n), rtol=0, atol=2e-6)
    torch.testing.assert_close(sinkhorn(z, 1000).sum(-1), torch.ones(5, 2, n), rtol=0, atol=2e-5)
    # What a softmax of rows does not see, and what gives the same rows.
    torch.testing.assert_close(sinkhorn(z + torch.randn(5, 2, n, 1)), matrix, rtol=0, atol=2e-6)
    torch.testing.assert_close(sinkhorn(torch.full((n, n), 3.0)), torch.full((n, n), 1 / n), rtol=0, atol=3e-6)
    torch.testing.assert_close(sinkhorn(50 * torch.eye(n)), torch.eye(n), rtol=0, atol=n * 2e-6)
    torch.testing.assert_close(sinkhorn(z.bfloat16()), sinkhorn(z.bfloat16().float()), rtol=0, atol=0)


@pytest.mark.parametrize("large", [50.0, 500.0])
def test_gradients_are_finite_at_large_logits(large):
    signs = torch.randint(0, 2, (64, 4, 4)) * 2 - 1
    z = (large * signs).requires_grad_()
    (sinkhorn(z) * torch.randn(64, 4, 4)).sum().backward()
    assert z.grad is not None and z.grad.isfinite().all()


def test_gradients_of_a_sinkhorn_are_its_derivative():
    z = torch.randn(3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: sinkhorn(z, 4), z)


def test_worked_connection():
    fn, base, scale = torch.zeros(8, 4), torch.zeros(8), torch.ones(3)
    base[5] = math.log(3)
    X = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    u, post, comb = hc_pre(X, fn, base, scale, 20, 1e-6, 1e-6)
    torch.testing.assert_close(u, torch.tensor([0.500001, 1.000002]), rtol=0, atol=2e-6)
    torch.testing.assert_close(post, torch.ones(2))
    torch.testing.assert_close(comb, torch.tensor([[0.366025, 0.633975], [0.633975, 0.366025]]), rtol=0, atol=2e-6)
    expected = torch.tensor([[1.366027, 3.267953], [1.633977, 2.732055]])
    mixed = hyper_connection(X, lambda u: 2 * u, fn, base, scale, 20, 1e-6, 1e-6)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=5e-6)


def test_the_first_index_of_comb_is_the_stream_that_gives():
    comb = torch.tensor([[0.1, 0.7, 0.2], [0.6, 0.1, 0.3], [0.3, 0.2, 0.5]])
    X, y, post = torch.eye(3), torch.tensor([10.0, 20.0, 30.0]), torch.tensor([1.0, 0.0, 2.0])
    expected = torch.tensor([[10.1, 20.6, 30.3], [0.7, 0.1, 0.2], [20.2, 40.3, 60.5]])
    torch.testing.assert_close(hc_post(X, y, post, comb), expected)
    # Made by hc_pre: logits that send stream 0 to 1, 1 to 2 and 2 to 0, which transposed is another way round.
    fn, base = torch.zeros(15, 6), torch.zeros(15)
    base[6 + 1] = base[6 + 5] = base[6 + 6] = 50.0
    X = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    mixed = hyper_connection(X, torch.zeros_like, fn, base, torch.ones(3))
    torch.testing.assert_close(mixed, X.roll(1, 0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "size"), [(1, 5), (2, 16), (3, 7), (4, 40), (5, 33), (8, 64), (9, 12)])
def test_against_the_definition_in_float64(n, size, dtype):
    X, (fn, base, scale) = (torch.randn(2, 3, n, size) * 2).to(dtype), parameters(n, size)
    y = torch.randn(2, 3, size).to(dtype)
    u, post, comb = hc_pre(X, fn, base, scale, 7, 1e-3, 1e-2)
    mixed, rounding = hc_post(X, y, post, comb), 2e-6 if dtype == torch.float32 else 0.6 * 2**-7
    assert u.dtype == mixed.dtype == dtype and post.dtype == comb.dtype == torch.float32
    for b in range(2):
        for t in range(3):
            expected = literal_pre(X[b, t], fn, base, scale, 7, 1e-3, 1e-2)
            torch.testing.assert_close(u[b, t].double(), expected[0], rtol=rounding, atol=5e-6)
            torch.testing.assert_close(post[b, t].double(), expected[1], rtol=2e-5, atol=2e-6)
            torch.testing.assert_close(comb[b, t].double(), expected[2], rtol=2e-5, atol=2e-6)
            after = literal_post(X[b, t], y[b, t], post[b, t], comb[b, t])
            torch.testing.assert_close(mixed[b, t].double(), after, rtol=rounding, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_is_pre_without_the_rest(dtype):
    X, (fn, base, scale) = torch.randn(6, 4, 24).to(dtype), parameters(4, 24)
    u, _, _ = hc_pre(X, fn, base, scale)
    torch.testing.assert_close(hc_head(X, fn[:4], base[:4], scale[:1]), u)


def test_means_over_streams():
    """A branch of zeros: the sum over streams changes by no more than the rows of comb are off."""
    X, (fn, base, scale) = torch.randn(9, 4, 20), parameters(4, 20)
    _, _, comb = hc_pre(X, fn, base, scale)
    mixed = hyper_connection(X, torch.zeros_like, fn, base, scale)
    torch.testing.assert_close(mixed.sum(-2), (comb.sum(-1, keepdim=True) * X).sum(-2), rtol=1e-5, atol=1e-5)
    # Each stream is a mean of streams: none gets larger than the largest was.
    assert (mixed.amax((-2, -1)) <= X.amax((-2, -1)) + 1e-5).all()


def test_fixed_weights_that_make_a_residual_network():
    def branch(u):
        return torch.tanh(2 * torch.nn.functional.layer_norm(u, u.shape[-1:]))

    x = torch.randn(5, 8)
    X = x[:, None].expand(5, 3, 8)
    for layer in range(4):
        X = hc_static(X, branch, torch.eye(3)[layer % 3], torch.eye(3), torch.ones(3))
        x = x + branch(x)
    torch.testing.assert_close(X, x[:, None].expand(5, 3, 8))
    A, b, a = torch.randn(3, 3), torch.randn(3), torch.randn(3)
    once = hc_static(X, branch, a, A, b)
    torch.testing.assert_close(once, A.T @ X + b[:, None] * branch(torch.einsum("j,tjh->th", a, X))[:, None])


def test_learned_weights_that_make_a_residual_network():
    """pre = e_0, post = 1 and comb = I: stream 0 is a plain residual stream."""
    fn, base, scale = torch.zeros(24, 4 * 6), torch.zeros(24), torch.ones(3)
    base[0], base[1:4], base[8:] = 50.0, -50.0, (50 * torch.eye(4)).flatten()
    X = torch.randn(3, 4, 6)
    mixed = hyper_connection(X, torch.tanh, fn, base, scale, 20, 0.0)
    torch.testing.assert_close(mixed, X + torch.tanh(X[:, :1]))


def test_gradients_reach_every_parameter():
    X, (fn, base, scale), y = torch.randn(5, 4, 12), parameters(4, 12), torch.randn(12, 12)
    leaves = [t.requires_grad_() for t in (X, fn, base, scale, y)]
    out = hyper_connection(X, lambda u: u @ y, fn, base, scale)
    (hc_head(out, fn[:4], base[:4], scale[:1]) * torch.randn(5, 12)).sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.any()


def test_gradients_are_derivatives():
    X, params = torch.randn(2, 3, 4).double().requires_grad_(), [p.double().requires_grad_() for p in parameters(3, 4)]
    assert torch.autograd.gradcheck(lambda X, *p: hyper_connection(X, torch.tanh, *p, iters=3), (X, *params))


def test_other_shapes_are_refused():
    X, (fn, base, scale) = torch.randn(5, 4, 6), parameters(4, 6)
    with pytest.raises(ValueError, match=r"logits has shape \[2, 3\], expected \[\.\.\., n, n\]"):
        sinkhorn(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="iters is 0, expected 1 or more"):
        sinkhorn(torch.zeros(2, 2), 0)
    with pytest.raises(ValueError, match=r"X has shape \[24\], expected \[\.\.\., n, H\]"):
        hc_pre(X[0].flatten(), fn, base, scale)
    with pytest.raises(ValueError, match=r"fn has shape \[24, 23\], expected \[24, 24\]"):
        hc_pre(X, fn[:, 1:], base, scale)
    with pytest.raises(ValueError, match=r"base has shape \[23\], expected \[24\]"):
        hc_pre(X, fn, base[1:], scale)
    with pytest.raises(ValueError, match=r"scale has shape \[1\], expected \[3\]"):
        hc_pre(X, fn, base, scale[:1])
    with pytest.raises(ValueError, match="iters is 0, expected 1 or more"):
        hc_pre(X, fn, base, scale, 0)
    with pytest.raises(ValueError, match=r"fn has shape \[24, 24\], expected \[4, 24\]"):
        hc_head(X, fn, base, scale)
    u, post, comb = hc_pre(X, fn, base, scale)
    with pytest.raises(ValueError, match=r"y has shape \[6\], expected \[5, 6\]"):
        hc_post(X, u[0], post, comb)
    with pytest.raises(ValueError, match=r"comb has shape \[4, 4\], expected \[5, 4, 4\]"):
        hc_post(X, u, post, comb[0])
    with pytest.raises(ValueError, match=r"a_m has shape \[3\], expected \[4\]"):
        hc_static(X, torch.tanh, torch.ones(3), torch.eye(4), torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "n", "size"), [(1, 4, 4099), (5, 4, 1031), (37, 3, 130), (64, 2, 16), (70, 8, 24)])
def test_a_token_is_the_same_in_any_company(tokens, n, size, dtype):
    """Alone or among others, whatever the threads and wherever sums were cut: the same bits, natively.

    Products of PyTorch add up in other orders for other numbers of rows: the reference is the same to rounding.
    """
    step = 0.0 if dispatch.active() != "reference" else 1e-4 if dtype == torch.float32 else 2e-2

    def same(one, other):
        return torch.allclose(one, other, rtol=step, atol=step)

    X, (fn, base, scale) = torch.randn(tokens, n, size).to(dtype), parameters(n, size)
    y, threads, found = torch.randn(tokens, size).to(dtype), torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            u, post, comb = hc_pre(X, fn, base, scale)
            found.append((u, post, comb, hc_post(X, y, post, comb), hc_head(X, fn[:n], base[:n], scale[:1])))
        finally:
            torch.set_num_threads(threads)
    for one, other in zip(*found, strict=True):
        assert same(one, other)
    u, post, comb, mixed, head = found[0]
    for t in sorted({0, tokens // 2, tokens - 1}):
        alone = hc_pre(X[t], fn, base, scale)
        assert all(same(one, other[t]) for one, other in zip(alone, (u, post, comb), strict=True))
        assert same(hc_post(X[t], y[t], post[t], comb[t]), mixed[t])
        assert same(hc_head(X[t], fn[:n], base[:n], scale[:1]), head[t])


def test_large_numbers_and_nan():
    X, (fn, base, scale) = torch.randn(20, 4, 12), parameters(4, 12)
    u, post, comb = hc_pre(X * 1e15, fn, base, scale)  # a norm takes the size away
    plain = hc_pre(X, fn, base, scale, norm_eps=0.0)
    torch.testing.assert_close((u / 1e15, post, comb), plain, rtol=1e-4, atol=1e-5)
    _, post, comb = hc_pre(X, fn, base + 500 * base.sign(), scale)  # sigmoids of 0 and 1
    assert post.isfinite().all() and comb.isfinite().all()
    X[3, 1, 5] = math.nan
    u, post, comb = hc_pre(X, fn, base, scale)
    mixed = hc_post(X, u, post, comb)
    for made in (u, post, comb, mixed, hc_head(X, fn[:4], base[:4], scale[:1])):
        assert made[3].isnan().all() and made[:3].isfinite().all() and made[4:].isfinite().all()


def test_no_tokens():
    (fn, base, scale), X = parameters(4, 6), torch.zeros(0, 4, 6)
    u, post, comb = hc_pre(X, fn, base, scale)
    assert (u.shape, post.shape, comb.shape) == ((0, 6), (0, 4), (0, 4, 4))
    assert hc_post(X, u, post, comb).shape == (0, 4, 6) and hc_head(X, fn[:4], base[:4], scale[:1]).shape == (0, 6)


def test_any_strides():
    X, (fn, base, scale) = torch.randn(7, 4, 12), parameters(4, 12)
    other = X.mT.contiguous().mT, fn.T.contiguous().T
    expected, found = hc_pre(X, fn, base, scale), hc_pre(other[0], other[1], base, scale)
    torch.testing.assert_close(found, expected)
    u, post, comb = found
    torch.testing.assert_close(hc_post(other[0], u, post, comb.mT), hc_post(X, u, post, comb.mT.contiguous()))
