"""Perplexity and KL between sides, against the definitions written out."""

import math

import pytest
import torch

from sparing.inspection.perplexity import perplexity
from tests.tiny import model, near, random_ids

CONTEXT = 24


def logs_of(net, ids: list[int], kv: str = "dense") -> torch.Tensor:
    """float64 log-probabilities, passage by passage of CONTEXT tokens."""
    passages = [ids[at : at + CONTEXT] for at in range(0, len(ids), CONTEXT)]
    return torch.cat([net.logits(p, net.memory(kv)).double().log_softmax(-1)[:-1] for p in passages])


def test_all_figures_are_their_definitions() -> None:
    net, other, ids = model("dense"), near("dense"), random_ids(60).tolist()
    found = perplexity([net, other], ids, context=CONTEXT)
    assert (found.passages, found.tokens) == (3, 60 - 3)
    following = torch.tensor([t for at in range(0, 60, CONTEXT) for t in ids[at : at + CONTEXT][1:]])
    ours, theirs = logs_of(net, ids), logs_of(other, ids)
    nats = -ours.gather(-1, following[:, None])[:, 0]
    first, second = found.predictions
    assert first.nats == pytest.approx(nats.mean().item(), rel=1e-5)
    assert first.perplexity == pytest.approx(math.exp(nats.mean().item()), rel=1e-5)
    assert first.nats_error == pytest.approx((nats.std() / len(nats) ** 0.5).item(), rel=1e-4)
    assert (first.kl, first.kl_error, first.same_first) == (0.0, 0.0, 1.0)
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    assert second.kl == pytest.approx(kl.mean().item(), rel=1e-3)
    assert second.kl_error == pytest.approx((kl.std() / len(kl) ** 0.5).item(), rel=1e-3)
    assert second.same_first == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).double().mean().item())


def test_policies_are_compared_with_the_first() -> None:
    net, ids = model("dense"), random_ids(40).tolist()
    found = perplexity([net], ids, ["dense", "turboquant:8,block=1", "dense"], context=CONTEXT)
    dense, coded, again = found.predictions
    assert again == dense and coded.kl > 0 and coded.memory_bytes < dense.memory_bytes
    assert "turboquant:8" in found.table() and found.to_dict()["predictions"][1]["kl"] == coded.kl


@pytest.mark.parametrize(
    ("ids", "context", "error"),
    [
        ([5], CONTEXT, "the text has 1 tokens"),
        ([5, 6], 1, "context is 1, expected 2 to"),
        ([5, 6], 10**6, "context is 1000000, expected 2 to"),
    ],
)
def test_what_cannot_be_predicted_is_refused(ids: list[int], context: int, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        perplexity([model("dense")], ids, context=context)


def test_models_of_other_vocabularies_are_refused() -> None:
    import copy

    other = copy.copy(model("dense"))
    other.config = copy.copy(other.config)
    object.__setattr__(other.config, "vocab_size", 7)
    with pytest.raises(ValueError, match="vocabularies of different sizes"):
        perplexity([model("dense"), other], [1, 2, 3], context=CONTEXT)
