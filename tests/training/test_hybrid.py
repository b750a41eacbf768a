"""The hybrid's training pass is the model that decodes; its head learns what drafting asks of it; runs resume."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sparing
from sparing import kernels
from sparing.checkpoint.source import ASSETS, BUNDLED
from sparing.config import parse_config
from sparing.config.nemotron3 import Nemotron3Config
from sparing.models.base import LanguageModel
from sparing.models.batch import Row
from sparing.models.loading import build
from sparing.models.nemotron3 import LatentMoELayer, Nemotron3
from sparing.models.nemotron3_mtp import MTPHead
from sparing.training import RECIPES, export, train
from sparing.training.balance import RATE, balance_experts, correction_biases, watch_experts
from sparing.training.block_diffusion import Examples
from sparing.training.initialise import initialise
from sparing.training.masters import BFloat16Training, MasterWeight, use_bfloat16, use_dense
from sparing.training.next_token import CausalPass, next_token_loss
from sparing.training.nvfp4 import NVFP4Training
from sparing.training.run import new_state
from sparing.training.state import read_run
from tests.tiny import randomise

pytestmark = pytest.mark.usefixtures("small_corpus")

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "head_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_latent_size": 16,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "length": 40,
    "batch_size": 2,
    "warmup": 2,
    "validate_every": 4,
}


def hybrid(dtype: torch.dtype = torch.float32) -> tuple[Nemotron3, MTPHead]:
    recipe = RECIPES["recipes/hybrid"].with_settings({k: v for k, v in SMALL.items() if k != "length"})
    model = build(parse_config(recipe.config)).to_empty(device="cpu")
    assert isinstance(model, Nemotron3)
    randomise(model, seed=1)
    head = MTPHead(model)
    randomise(head, seed=2)
    return model.to(dtype), head.to(dtype)


def examples(rows: int = 2, tokens: int = 37) -> Examples:
    ids = torch.randint(300, (rows, tokens), generator=torch.Generator().manual_seed(3))
    valid = torch.ones(rows, tokens - 1, dtype=torch.bool)
    valid[-1, tokens // 2 :] = False
    return Examples(ids, 1, valid)


@pytest.mark.parametrize("tokens", [1, 3, 32, 33, 70])
def test_rows_side_by_side_give_what_each_gives_when_it_is_decoded(tokens: int) -> None:
    model, _ = hybrid()
    ids = torch.randint(300, (3, tokens), generator=torch.Generator().manual_seed(tokens))
    with torch.no_grad():
        hidden = model(CausalPass(ids, model.config))
    together = model.head(hidden).unflatten(0, (3, tokens))
    for row, logits in zip(ids, together, strict=True):
        torch.testing.assert_close(logits, model.logits(row), rtol=1e-4, atol=1e-4)


def test_recording_gradients_changes_no_value() -> None:
    model, _ = hybrid()
    batch = examples()
    with torch.no_grad():
        plain = model(CausalPass(batch.ids, model.config))
    torch.testing.assert_close(model(CausalPass(batch.ids, model.config)), plain, rtol=1e-5, atol=1e-5)


def test_the_scan_has_the_gradients_of_its_recurrence() -> None:
    g = torch.Generator().manual_seed(0)
    x, b, c, d, state = (
        torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True)
        for shape in ((7, 4, 2), (7, 2, 3), (7, 2, 3), (4,), (4, 2, 3))
    )
    dt = torch.rand(7, 4, generator=g, dtype=torch.float64).requires_grad_()
    a = (-torch.rand(4, generator=g, dtype=torch.float64)).requires_grad_()

    def scan(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return kernels.ssd_scan(*inputs, chunk=3)

    assert torch.autograd.gradcheck(scan, (x, dt, a, b, c, d, state))


def test_the_convolution_has_the_gradients_of_its_formula() -> None:
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=g, requires_grad=True) for shape in ((9, 6), (6, 1, 4), (6,)))
    rows = torch.nn.functional.conv1d(x.T[None], weight, bias, groups=6)[0].T
    expected = torch.autograd.grad(torch.nn.functional.silu(rows).square().sum(), (x, weight, bias))
    found = torch.autograd.grad(kernels.causal_conv(x, weight, bias).square().sum(), (x, weight, bias))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_the_loss_is_what_decoding_and_drafting_would_pay() -> None:
    """Depth 1 from the model's own states, depth 2 from the head's, over the tokens that belong to the text."""
    model, head = hybrid()
    batch = examples(1, 24)
    losses = next_token_loss(model, head, batch, depth=2, scale=0.3)
    ids = batch.ids[0, : 1 + int(batch.valid.sum())]
    n = len(ids)

    def mean(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits[: len(targets)], targets)

    hidden = model.run([Row(ids, model.memory())])
    torch.testing.assert_close(losses.next_token, mean(model.head(hidden), ids[1:]), rtol=1e-4, atol=1e-4)
    for depth in (1, 2):
        outcomes = []
        # Every entry's prediction, as the head gives it while it drafts: the last one of a run over those before.
        for end in range(1, n - depth + 1):
            logits, states = head.run([Row(ids[depth : depth + end], head.memory())], hidden[:end])
            outcomes.append((logits, states))
        found = torch.cat([logits for logits, _ in outcomes])
        torch.testing.assert_close(losses.mtp[depth - 1], mean(found, ids[depth + 1 :]), rtol=1e-4, atol=1e-4)
        hidden = torch.cat([states for _, states in outcomes])
    expected = losses.next_token + 0.3 * (losses.mtp[0] + losses.mtp[1]) / 2
    torch.testing.assert_close(losses.total, expected)
    assert list(losses.parts) == ["next_token", "mtp_1", "mtp_2"]


def test_what_follows_the_end_of_a_text_is_not_learned() -> None:
    model, head = hybrid()
    batch = examples()
    other = batch.ids.clone()
    other[-1, -10:] = 7
    with torch.no_grad():
        a = next_token_loss(model, head, batch)
        b = next_token_loss(model, head, Examples(other, 1, batch.valid))
    for name, value in a.parts.items():
        torch.testing.assert_close(b.parts[name], value, rtol=1e-5, atol=1e-5)


def test_everything_gets_a_gradient_also_the_model_from_its_head() -> None:
    model, head = hybrid()
    losses = next_token_loss(model, head, examples())
    losses.total.backward()
    missing = [name for part in (model, head) for name, p in part.named_parameters() if p.grad is None]
    assert missing == []
    embeddings = model.backbone.embeddings.weight
    losses = next_token_loss(model, head, examples())
    assert torch.autograd.grad(losses.mtp[1], embeddings)[0].abs().max() > 0


def test_matrices_multiply_in_bfloat16_and_come_back_whole() -> None:
    model, _ = hybrid()
    names = list(dict(model.named_parameters()))
    tokens = torch.arange(20)
    exact = model.logits(tokens)
    use_bfloat16(model)
    replaced = {name for name, module in model.named_modules() if isinstance(module, BFloat16Training)}
    assert "backbone.layers.0.mixer.in_proj.weight" in replaced
    assert "backbone.layers.1.mixer.experts.up_proj" in replaced
    assert not any(re.search(r"embeddings|lm_head|\.gate\.|conv1d", name) for name in replaced)
    rounded = model.logits(tokens)
    # Of the median token: now and then a router decides otherwise.
    assert 0 < (rounded - exact).norm(dim=-1).median() < 0.05 * exact.norm(dim=-1).median()
    use_dense(model)
    assert torch.equal(model.logits(tokens), exact)
    assert sorted(dict(model.named_parameters())) == sorted(names)


def test_the_bias_of_a_busy_expert_falls_and_that_of_an_idle_one_rises() -> None:
    model, _ = hybrid()
    watch_experts(model)
    before = {name: bias.clone() for name, bias in correction_biases(model).items()}
    model(CausalPass(examples().ids, model.config))
    mixture = next(m for m in model.modules() if isinstance(m, LatentMoELayer))
    load = mixture.load.clone()  # type: ignore[operator]
    assert load.sum() == examples().ids.numel() * mixture.k
    balance_experts(model)
    name = next(iter(before))
    moved = correction_biases(model)[name] - before[name]
    torch.testing.assert_close(moved, RATE * (load.float().mean() - load).sign(), rtol=0, atol=1e-6)
    assert mixture.load.sum() == 0  # type: ignore[operator]
    with torch.no_grad():
        model(CausalPass(examples().ids, model.config))
    assert mixture.load.sum() == 0, "validating counts"  # type: ignore[operator]


def test_first_weights_decay_and_step_as_mamba_wants() -> None:
    model, _ = hybrid()
    initialise(model, torch.Generator().manual_seed(0))
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    a, dt = tensors["backbone.layers.0.mixer.A_log"].exp(), tensors["backbone.layers.0.mixer.dt_bias"]
    torch.testing.assert_close(a, torch.arange(1.0, 9.0))
    steps = torch.nn.functional.softplus(dt)
    assert steps.min() > 0.99e-3 and steps.max() < 0.101
    assert not tensors["backbone.layers.1.mixer.gate.e_score_correction_bias"].any()


def run(out: Path, steps: int, settings: dict[str, Any], **options) -> dict[str, torch.Tensor]:
    train(RECIPES["recipes/hybrid"], out, steps=steps, set=SMALL | settings, log=lambda record: None, **options)
    return load_file(out / "state.safetensors")


def greedy(model: LanguageModel, prompt: str, tokens: int, **options: Any) -> tuple[list[int], dict[str, Any]]:
    """(new ids, stats)"""
    events = list(sparing.generate(model, prompt, max_new_tokens=tokens, temperature=0, **options))
    assert isinstance(events[-1], sparing.Done)
    return [i for event in events if isinstance(event, sparing.Commit) for i in event.ids], events[-1].stats


class Stopped(Exception):
    pass


def stop(record: dict) -> None:
    """At the first validation, step 4, before it is saved."""
    raise Stopped


@pytest.mark.parametrize(("products", "optimizer"), [("bfloat16", "adamw"), ("nvfp4", "adamw"), ("nvfp4", "muon")])
def test_a_run_resumes_to_the_bit_and_exports_with_its_head(
    products: str, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"products": products, "optimizer": optimizer}
    whole = run(tmp_path / "whole", 6, settings)
    monkeypatch.setattr("sparing.training.run.SAVE_SECONDS", 0.0)  # after every step
    with pytest.raises(Stopped):
        train(RECIPES["recipes/hybrid"], tmp_path / "parts", steps=6, set=SMALL | settings, log=stop)
    assert read_run(tmp_path / "parts")["step"] == 3
    parts = run(tmp_path / "parts", 6, settings, resume=True)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    biases = [name for name in whole if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2 * 4 and any(whole[name].any() for name in biases)  # weights and averages, the head's too
    folder = export(tmp_path / "whole", tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    model = sparing.load(folder, dtype="float32")
    assert isinstance(model.config, Nemotron3Config)
    stored = load_file(folder / "model.safetensors")
    exponents = [t for name, t in stored.items() if name.endswith(("A_log", "dt_bias", "correction_bias"))]
    assert exponents and all(t.dtype == torch.float32 for t in exponents)
    assert not any("master" in name for name in stored) and any(name.startswith("mtp.") for name in stored)
    assert greedy(model, "The fox", 12)[0] == greedy(model, "The fox", 12, draft="mtp")[0]


def test_products_keep_what_the_recipe_keeps_out_of_nvfp4() -> None:
    state = new_state(RECIPES["recipes/hybrid"].with_settings({"products": "nvfp4"}), 0)
    kinds = {name: type(m) for name, m in state.model.named_modules() if isinstance(m, MasterWeight)}
    nvfp4 = {name for name, kind in kinds.items() if kind is NVFP4Training}
    mixer = "backbone.layers.{}.mixer."
    expected = {mixer.format(i) + "in_proj.weight" for i in (0, 2, 5)}
    for i in (1, 4):
        expected |= {mixer.format(i) + f"experts.{part}" for part in ("up_proj", "down_proj")}
        expected |= {mixer.format(i) + f"shared_experts.{part}.weight" for part in ("up_proj", "down_proj")}
    assert nvfp4 == expected
    assert {"mtp.layers.0.eh_proj.weight", mixer.format(0) + "out_proj.weight"} <= kinds.keys() - nvfp4
    dense = [name for name, p in state.model.named_parameters() if p.ndim > 1 and not name.endswith(".master")]
    assert all(re.search(r"embeddings|lm_head|\.gate\.|conv1d", name) for name in dense)


def test_other_products_are_refused() -> None:
    with pytest.raises(ValueError, match="products is 'int8', use bfloat16, nvfp4, float32"):
        new_state(RECIPES["recipes/hybrid"].with_settings({"products": "int8"}), 0)


def test_the_hybrid_that_ships_drafts_what_it_would_say() -> None:
    model = sparing.load("hybrid", dtype="float32")
    prompt = "There was once a king who had three sons, and the eldest of them"
    output, stats = greedy(model, prompt, 60, draft="mtp", adaptive=False)
    assert output == greedy(model, prompt, 60)[0]
    assert stats["rounds"] < 40, "fewer than one draft a round is right"


def test_all_that_ships_takes_at_most_16_mib() -> None:
    files = [file for name in BUNDLED for file in (ASSETS / name).iterdir()]
    assert sum(file.stat().st_size for file in files) <= 16 * 2**20
