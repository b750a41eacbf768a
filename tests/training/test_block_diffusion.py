"""The forward process, and the loss against a literal, one-canvas-at-a-time computation through the decoding path."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from sparing.config import parse_config
from sparing.decoding.canvas import uniform_corrupt
from sparing.models.loading import build
from sparing.training import RECIPES
from sparing.training.block_diffusion import Examples, block_diffusion_loss, fill_response
from sparing.training.cross_entropy import capped_cross_entropy


def test_no_noise_keeps_everything_and_full_noise_forgets_it() -> None:
    x0 = torch.randint(50, (4, 300), generator=torch.Generator().manual_seed(0))
    xt, replaced = uniform_corrupt(x0, torch.zeros(4), 50)
    assert torch.equal(xt, x0)
    assert not replaced.any()
    ones = torch.ones(4)
    a, _ = uniform_corrupt(x0, ones, 50, torch.Generator().manual_seed(1))
    b, _ = uniform_corrupt(torch.zeros_like(x0), ones, 50, torch.Generator().manual_seed(1))
    assert torch.equal(a, b)
    assert set(a.flatten().tolist()) == set(range(50))  # all ids, special ones included


def test_the_share_that_differs() -> None:
    x0 = torch.zeros(1, 200_000, dtype=torch.long)
    xt, replaced = uniform_corrupt(x0, torch.tensor([0.5]), 4, torch.Generator().manual_seed(0))
    assert (xt == x0).float().mean().item() == pytest.approx(0.625, abs=5e-3)  # 1 - t + t / V
    assert (replaced & (xt == x0)).any()
    with pytest.raises(ValueError, match="t must lie in 0"):
        uniform_corrupt(x0, torch.tensor([1.5]), 4)


def test_kernels_compose() -> None:
    """Keep (1 - s), then (1 - t)/(1 - s), is keep (1 - t)."""
    v, s, t = 7, 0.3, 0.8

    def kernel(keep: float) -> torch.Tensor:
        return keep * torch.eye(v, dtype=torch.float64) + (1 - keep) / v

    torch.testing.assert_close(kernel(1 - s) @ kernel((1 - t) / (1 - s)), kernel(1 - t), atol=1e-12, rtol=0)


def test_a_response_is_filled_to_whole_canvases() -> None:
    assert fill_response([7, 8], [3, 4, 5], 4, 1) == [7, 8, 3, 4, 5, 1]
    assert fill_response([7], [3, 4], 2, 1) == [7, 3, 4]
    assert fill_response([7], [], 2, 1) == [7, 1, 1]


@pytest.mark.parametrize("cap", [None, 3.0])
def test_fused_cross_entropy(cap: float | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(40, 8, requires_grad=True)
    table = torch.randn(23, 8, requires_grad=True)
    targets, weights = torch.randint(23, (40,)), torch.rand(40)
    ours = capped_cross_entropy(hidden, table, targets, weights, cap)
    mine = torch.autograd.grad(ours, (hidden, table))
    logits = hidden.double() @ table.double().T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    literal = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
    theirs = torch.autograd.grad(literal, (hidden, table))
    torch.testing.assert_close(ours.double(), literal)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def model():
    recipe = RECIPES["recipes/tales"].with_settings(
        {
            "vocab_size": 41,
            "canvas_length": 4,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_global_key_value_heads": 1,
            "head_dim": 8,
            "global_head_dim": 16,
            "moe_intermediate_size": 8,
            "sliding_window": 6,
        }
    )
    model = build(parse_config(recipe.config)).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.3 * noise if tensor.ndim == 1 else 0.3 * noise)
    return model


def test_loss_is_what_decoding_computes(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every canvas alone against a real memory gives the same mean loss as all canvases under the training masks."""
    import sparing.training.block_diffusion as module

    ids = torch.randint(41, (2, 3 + 12), generator=torch.Generator().manual_seed(1))
    examples = Examples(ids, 3, torch.tensor([[True, True, True], [True, True, False]]))
    noisy: list[torch.Tensor] = []
    original = uniform_corrupt

    def recording(*arguments):
        result = original(*arguments)
        noisy.append(result[0])
        return result

    monkeypatch.setattr(module, "uniform_corrupt", recording)
    generator = torch.Generator().manual_seed(2)
    losses = block_diffusion_loss(model, examples, generator)
    replay = torch.Generator().manual_seed(2)  # draws of the step in their order: t, mask, ids, gate
    torch.rand(6, generator=replay)
    torch.rand(6, 4, generator=replay)
    torch.randint(41, (6, 4), generator=replay)
    gate = (torch.rand(2, generator=replay) < 0.5).tolist()

    total, count, following, pairs = 0.0, 0, 0.0, 0
    for row, blocks in enumerate((3, 2)):
        clean = ids[row, : 3 + 4 * blocks]
        logits = model.logits(clean).double()
        following += F.cross_entropy(logits[:-1], clean[1:], reduction="sum").item()
        pairs += len(clean) - 1
        for block in range(blocks):
            memory = model.memory()
            model.logits(clean[: 3 + 4 * block], memory)
            canvas = noisy[0].view(2, 3, 4)[row, block]
            logits = model.denoise(canvas, memory)
            if gate[row]:
                logits = model.denoise(canvas, memory, logits)
            target = clean[3 + 4 * block : 7 + 4 * block]
            total += F.cross_entropy(logits.double(), target, reduction="sum").item()
            count += 4
    assert losses.diffusion.item() == pytest.approx(total / count, abs=2e-4)
    assert losses.autoregressive.item() == pytest.approx(following / pairs, abs=2e-4)
    assert math.isclose(losses.total.item(), losses.diffusion.item() + losses.autoregressive.item(), rel_tol=1e-6)


def test_every_trained_tensor_gets_a_gradient(model) -> None:
    ids = torch.randint(41, (8, 3 + 8), generator=torch.Generator().manual_seed(1))
    examples = Examples(ids, 3, torch.ones(8, 2, dtype=torch.bool))
    block_diffusion_loss(model, examples, torch.Generator().manual_seed(0)).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
