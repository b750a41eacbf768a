"""NVFP4 training products: each operand as the recipe says, unbiased gradients, and what stays dense."""

import copy

import pytest
import torch

from sparing import kernels
from sparing.config.roles import KEY, QUERY
from sparing.training.masters import use_dense
from sparing.training.next_token import CausalPass
from sparing.training.nvfp4 import SIGNS, Draws, NVFP4Training, nvfp4_product, use_nvfp4
from sparing.weights.nvfp4 import nvfp4_round
from tests.tiny import PACKABLE, built


def drawing(seed):
    draws = Draws()
    draws.generator = torch.Generator().manual_seed(seed)
    return draws


def turned(rows):
    """The transform as a matrix: 16 tokens at a time, signs first, then Sylvester's Hadamard matrix over 4."""
    h = torch.ones(1, 1)
    for _ in range(4):
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
    padded = torch.cat((rows, rows.new_zeros(-len(rows) % 16, rows.shape[1])))
    blocks = padded.view(-1, 16, rows.shape[1])
    return ((h / 4 * torch.tensor(SIGNS, dtype=torch.float32)) @ blocks).flatten(0, 1)


def test_the_three_products_are_those_of_the_recipe():
    x, w = torch.randn(40, 64, requires_grad=True), torch.randn(32, 64, requires_grad=True)
    y, dy = nvfp4_product(x, w), torch.randn(40, 32)
    y.backward(dy)
    square = nvfp4_round(w.detach(), "2d")
    assert x.grad is not None and w.grad is not None
    assert torch.allclose(y, nvfp4_round(x.detach()) @ square.T, atol=1e-5)
    assert torch.allclose(x.grad, nvfp4_round(dy) @ square, atol=1e-5)
    dw = nvfp4_round(turned(dy).T) @ nvfp4_round(turned(x.detach()).T).T
    assert torch.allclose(w.grad, dw, atol=1e-4)


def test_the_transform_cancels_and_spreads_an_outlier():
    dy, x = torch.randn(32, 16), torch.randn(32, 48)
    assert torch.allclose(turned(dy).T @ turned(x), dy.T @ x, atol=1e-4)
    x[5] *= 100
    assert turned(x).abs().max() < 0.5 * x.abs().max()


def test_gradients_are_unbiased():
    """The mean over many draws is that of the rounded other operand and the exact dy; rounding to nearest is not."""
    x, w, dy = torch.randn(16, 32), torch.randn(16, 32), torch.randn(16, 16)
    dx, dw = torch.zeros(16, 32), torch.zeros(16, 32)
    count = 400
    for seed in range(count):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        nvfp4_product(a, b, drawing(seed)).backward(dy)
        assert a.grad is not None and b.grad is not None
        dx, dw = dx + a.grad / count, dw + b.grad / count
    expected_dx = dy @ nvfp4_round(w, "2d")
    expected_dw = turned(dy).T @ nvfp4_round(turned(x).T).T
    # Saturation of the few largest, whose scaled value exceeds 6, is the only bias.
    assert (dx - expected_dx).norm() < 0.03 * expected_dx.norm()
    assert (dw - expected_dw).norm() < 0.03 * expected_dw.norm()
    nearest = (nvfp4_round(dy) @ nvfp4_round(w, "2d") - expected_dx).norm()
    assert nearest > 2 * (dx - expected_dx).norm()


def test_the_same_generator_gives_the_same_gradients():
    x, w = torch.randn(20, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    grads = [torch.autograd.grad(nvfp4_product(x, w, drawing(s)).square().sum(), (x, w)) for s in (1, 1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(grads[0], grads[1], strict=True))
    assert not torch.equal(grads[0][1], grads[2][1])


@pytest.mark.parametrize("tokens", [1, 15, 16, 33])
def test_any_number_of_tokens_and_any_type(tokens):
    x = torch.randn(1, tokens, 32, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(48, 32, dtype=torch.bfloat16, requires_grad=True)
    y = nvfp4_product(x, w, drawing(0))
    y.sum().backward()
    assert y.shape == (1, tokens, 48) and y.dtype == torch.bfloat16
    assert x.grad is not None and x.grad.dtype == torch.bfloat16 and w.grad is not None and w.grad.isfinite().all()


def test_numbers_that_nvfp4_holds_are_multiplied_exactly():
    values = torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6, -6])
    x = values[torch.randint(8, (16, 32))]
    w = values[torch.randint(8, (16, 32))]
    x[:, ::16] = 6
    w[::16, ::16] = 6
    assert torch.allclose(nvfp4_product(x, w), x @ w.T, rtol=1e-5, atol=1e-3)


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"multiples of 16, found \[24, 32\]"):
        nvfp4_product(torch.randn(4, 32), torch.randn(24, 32))


def model():
    return built(PACKABLE["gemma"] | {"num_kv_shared_layers": 0}).train().requires_grad_()


def replaced(whole):
    return {name for name, module in whole.named_modules() if isinstance(module, NVFP4Training)}


def test_chosen_layers_stay_dense_and_everything_trains():
    whole = model()
    names = dict(whole.named_parameters()).keys()
    draws = use_nvfp4(whole, dense=lambda name, role: role in (QUERY, KEY), last=0.2)
    chosen = replaced(whole)
    assert "model.layers.0.experts.gate_up_proj" in chosen and "model.layers.0.mlp.down_proj.weight" in chosen
    assert not any("q_proj" in name or "layers.4." in name or "embed" in name or "router" in name for name in chosen)
    draws.generator = torch.Generator().manual_seed(0)
    copied = copy.deepcopy(whole)
    whole.forward(CausalPass(torch.arange(9)[None], whole.config)).square().sum().backward()
    without = {name for name, p in whole.named_parameters() if p.grad is None}
    assert without == set()
    use_dense(whole)
    assert dict(whole.named_parameters()).keys() == names and not replaced(whole)
    assert replaced(copied) == chosen


def test_the_forward_is_close_to_the_dense_one():
    whole, tokens = model(), torch.arange(20)
    exact = whole.logits(tokens)
    use_nvfp4(whole, last=0.0)
    rounded = whole.logits(tokens)
    assert not torch.equal(rounded, exact)
    assert torch.nn.functional.cosine_similarity(rounded, exact, -1).mean() > 0.9
    use_dense(whole)
    assert torch.equal(whole.logits(tokens), exact)


def test_a_stack_multiplies_each_matrix():
    stack = NVFP4Training(torch.nn.Parameter(torch.randn(3, 16, 32)), Draws())
    x = torch.randn(5, 32)
    assert torch.equal(kernels.linear(x, stack[1]), nvfp4_product(x, stack.master[1]))
    kernels.linear(x, stack[1]).sum().backward()
    assert stack.master.grad is not None and (stack.master.grad[0] == 0).all() and (stack.master.grad[1] != 0).any()
