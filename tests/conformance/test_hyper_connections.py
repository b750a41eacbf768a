"""Streams read and mixed as by DeepSeek-V4 of transformers, with every parameter random: some start as constants."""

import pytest
import torch

from sparing.kernels.hyper_connections import hc_head, hc_post, hc_pre

deepseek = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")


def modules(n, size, **settings):
    """A hyper-connection and a head, every parameter random."""
    config = deepseek.DeepseekV4Config(hidden_size=size, hc_mult=n, **settings)
    connection, head = deepseek.DeepseekV4HyperConnection(config), deepseek.DeepseekV4HyperHead(config)
    with torch.no_grad():
        for module in (connection, head):
            for parameter in module.parameters():
                parameter.normal_(std=1.0 if parameter.ndim == 1 else (n * size) ** -0.5)
    return connection, head


@pytest.mark.parametrize("settings", [{}, {"hc_sinkhorn_iters": 3, "hc_eps": 1e-3, "rms_norm_eps": 0.1}])
@pytest.mark.parametrize(("n", "size"), [(2, 48), (3, 20), (4, 64)])
@torch.no_grad()
def test_float32(n, size, settings):
    connection, head = modules(n, size, **settings)
    iters, eps = connection.hc_sinkhorn_iters, connection.hc_eps
    norm_eps = connection.input_norm.eps
    X = torch.randn(2, 9, n, size) * 3
    post, comb, u = connection(X)
    ours = hc_pre(X, connection.fn, connection.base, connection.scale, iters, eps, norm_eps)
    for one, other in zip(ours, (u, post, comb), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)
    y = torch.randn(2, 9, size)
    mixed = post[..., None] * y[..., None, :] + comb.mT @ X  # as its decoder layer
    torch.testing.assert_close(hc_post(X, y, ours[1], ours[2]), mixed, rtol=1e-5, atol=2e-5)
    out = hc_head(X, head.hc_fn, head.hc_base, head.hc_scale, eps, norm_eps)
    torch.testing.assert_close(out, head(X), rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_bfloat16_streams_with_float32_weights():
    """What is mixed is rounded once here; transformers rounds the weights too, by up to 2^-9 of each."""
    connection, head = modules(4, 64)
    X = (torch.randn(2, 9, 4, 64) * 3).bfloat16()
    post, comb, u = connection(X)
    ours = hc_pre(X, connection.fn, connection.base, connection.scale)
    assert ours[0].dtype == u.dtype == torch.bfloat16
    torch.testing.assert_close(ours[0], u, rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(ours[1], post, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ours[2], comb, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(hc_head(X, head.hc_fn, head.hc_base, head.hc_scale), head(X), rtol=2**-7, atol=1e-5)
    y = torch.randn(2, 9, 64).bfloat16()
    theirs = post.to(y.dtype)[..., None] * y[..., None, :] + comb.to(y.dtype).mT @ X
    torch.testing.assert_close(hc_post(X, y, ours[1], ours[2]), theirs, rtol=2**-6, atol=0.15)
