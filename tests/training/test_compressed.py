"""Training DeepSeek-V4 on whole rows: what its experts and its indexer learn from."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparing.models.deepseek_v4 import Experts
from sparing.training import RECIPES, train
from sparing.training.balance import balance_experts, sequence_balance, sequence_balance_of, watch_experts
from sparing.training.next_token import causal_pass
from tests.tiny import model, random_ids

pytestmark = pytest.mark.usefixtures("small_corpus")

ROWS = 2
SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "q_lora_rank": 16,
    "moe_intermediate_size": 16,
    "length": 80,  # more entries than an indexer takes
    "batch_size": 2,
    "warmup": 1,
    "validate_every": 2,
}


def test_the_balance_loss_is_the_published_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 7, 5, generator=generator, dtype=torch.float64)
    ids = torch.rand(3, 7, 5, generator=generator).topk(2, -1).indices
    total = 0.0
    for text in range(3):
        for expert in range(5):
            f = 5 / (2 * 7) * sum(expert in ids[text, t].tolist() for t in range(7))
            p = sum((scores[text, t, expert] / scores[text, t].sum()).item() for t in range(7)) / 7
            total += f * p / 3
    assert sequence_balance(scores, ids).item() == pytest.approx(total, rel=1e-12)


def test_even_use_costs_one_and_one_expert_for_all_the_most() -> None:
    even = torch.arange(8).reshape(1, 8, 1)
    assert sequence_balance(torch.ones(1, 8, 8), even).item() == pytest.approx(1.0)
    one = torch.full((1, 8, 8), 1e-9).index_fill(-1, torch.tensor([3]), 1.0)
    assert sequence_balance(one, torch.full((1, 8, 1), 3)).item() == pytest.approx(8.0, rel=1e-6)


def test_a_watched_model_gives_its_routers_a_gradient_once() -> None:
    net = copy.deepcopy(model("compressed")).requires_grad_(True)
    watch_experts(net)
    ids = random_ids(ROWS * 12).reshape(ROWS, 12)
    net(causal_pass(ids, net.config))
    scored = [m for m in net.modules() if isinstance(m, Experts) and not m.is_hash]
    found = sequence_balance_of(net, ROWS)
    assert found is not None and all(len(m.routed) == 1 for m in scored)
    found.backward()
    assert all(m.gate.get_parameter("weight").grad.abs().sum() > 0 for m in scored)
    balance_experts(net)
    assert sequence_balance_of(net, ROWS) is None


def test_a_run_in_two_parts_is_the_same_to_the_bit(tmp_path: Path) -> None:
    records: list[dict] = []
    recipe, log = RECIPES["recipes/compressed"], records.append
    train(recipe, tmp_path / "whole", steps=2, set=SMALL, log=log)
    held_out = next(r for r in records if "validation_next_token" in r)
    assert all(0 < held_out[f"validation_{name}"] < 20 for name in ("next_token", "mtp_1", "indexer"))
    train(recipe, tmp_path / "parts", steps=1, set=SMALL | {"steps": 2}, log=log)
    train(recipe, tmp_path / "parts", steps=2, resume=True, log=log)
    whole, parts = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
