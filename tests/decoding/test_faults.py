"""Logits that are not finite: no token in any decoder, no trace in a memory, and a word on where they arose."""

import copy
import math

import pytest
import torch

import sparing
from sparing.decoding.sampling import Sampling
from sparing.kernels.vocabulary import vocabulary_softmax
from tests.tiny import VOCAB, model, near, random_ids, same, snapshot

DECODERS = {
    "plain": {},
    "look-up": {"draft": "ngram", "adaptive": False},
    "drafter": {"draft": "near", "adaptive": False},
}
DRAWS = {"greedy": {"temperature": 0.0}, "drawn": {"temperature": 0.8, "top_k": 9, "top_p": 0.9}}
NAMES = ("dense", "sliding", "shared", "hybrid", "recurrent")


def ids(events):
    return [token for event in events if isinstance(event, sparing.Commit) for token in event.ids]


def spoilt(name, value, part):
    """A copy of a model with one weight that is not finite in its second layer, or in its head."""
    found = copy.deepcopy(model(name))
    if part == "head":
        found.output_table().data[7] = value
    else:
        parameters = dict(found.named_parameters())
        keys = [key for key, p in parameters.items() if ".layers.1." in key and p.ndim > 1]
        parameters[next((key for key in keys if "down_proj" in key), keys[0])].data[..., 0] = value
    return found


def until_it_fails(events):
    """(ids, message of the error)."""
    found = []
    try:
        for event in events:
            found += event.ids if isinstance(event, sparing.Commit) else []
    except ValueError as error:
        return found, str(error)
    return found, ""


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_is_not_finite_raises(name, decoder, draw):
    options = DECODERS[decoder] | ({"draft": near(name)} if decoder == "drafter" else {})
    broken = spoilt(name, math.nan, "layer")
    memory = broken.memory()
    before = snapshot(memory)
    with pytest.raises(ValueError, match=r"row 0, after 5 tokens: .* NaN, first in the output of layer 1"):
        list(sparing.generate(broken, random_ids(5).tolist(), memory=memory, seed=0, **options, **draw))
    assert same(snapshot(memory), before)
    broken = spoilt(name, math.nan, "head")
    with pytest.raises(ValueError, match="which the final norm or the output head made"):
        list(sparing.generate(broken, [random_ids(4).tolist(), [3, 4]], seed=0, **options, **draw))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_step_that_fails_later_is_in_no_memory(decoder, draw, value, monkeypatch):
    """Logits go wrong after some tokens: what was said before is what plain decoding says, and all that is kept."""
    options = DECODERS[decoder] | ({"draft": near("dense")} if decoder == "drafter" else {})
    target = copy.deepcopy(model("dense"))
    head = target.head
    made = []

    def failing(hidden):
        logits = head(hidden)
        made.append(len(logits))
        if len(made) > 3:
            logits[..., 5] = value
        return logits

    monkeypatch.setattr(target, "head", failing)
    memory = target.memory()
    options |= {"memory": memory, "seed": 3, "max_new_tokens": 12}
    said, failure = until_it_fails(sparing.generate(target, [1, 2, 3, 1, 2], **options, **draw))
    assert "no token was chosen" in failure
    assert len(said) >= 3
    assert memory.length == 5 + len(said) - 1 and memory.staged == 0
    if draw["temperature"] == 0:
        assert said == ids(sparing.generate(model("dense"), [1, 2, 3, 1, 2], temperature=0))[: len(said)]


@pytest.mark.parametrize("draft", ["ngram", "near", "same"])
def test_drafts_before_a_fault_become_output(draft, monkeypatch):
    """The model fails after one text: each decoder says all of it, and no more."""
    target, prompt = copy.deepcopy(model("dense")), [1, 2, 3]
    said = ids(sparing.generate(target, prompt, temperature=0, max_new_tokens=20))
    last, forward = len(prompt) + 13, type(target).forward

    def failing(self, batch, trace=None, layers=None):
        hidden = forward(self, batch, trace, layers).clone()
        hidden[(batch.positions >= last)[-len(hidden) :]] = math.nan
        return hidden

    monkeypatch.setattr(type(target), "forward", failing)
    drafter = {"ngram": "ngram", "near": near("hybrid"), "same": model("dense")}[draft]
    memory = target.memory()
    options = {"temperature": 0, "max_new_tokens": 20, "draft": drafter, "adaptive": False, "draft_tokens": 5}
    found, failure = until_it_fails(sparing.generate(target, prompt, memory=memory, **options))
    assert found == said[:14]
    assert "after 17 tokens" in failure
    assert memory.length == last


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("part", ["layer", "head"])
def test_a_broken_drafter_drafts_nothing(part, draw, value):
    prompts = [random_ids(6).tolist(), [3, 4]]
    drafter = spoilt("dense", value, part)
    events = list(sparing.generate(model("dense"), prompts, draft=drafter, seed=1, max_new_tokens=9, **draw))
    plain = list(sparing.generate(model("dense"), prompts, seed=1, max_new_tokens=9, **draw))
    assert all(0 <= token < VOCAB for token in ids(events))
    if draw["temperature"] == 0:
        assert sorted(ids(events)) == sorted(ids(plain))
    if math.isnan(value):
        assert [event.stats["proposed"] for event in events if isinstance(event, sparing.Done)] == [0, 0]


@pytest.mark.parametrize("part", ["layer", "head"])
def test_a_canvas(part):
    broken = spoilt("denoiser", math.nan, part)
    memory = broken.memory()
    where = "layer 1" if part == "layer" else "output head"
    with pytest.raises(ValueError, match=rf"row 0, canvas position 0: .*{where}"):
        list(sparing.generate(broken, [3, 4, 5], memory=memory, seed=0))
    assert (memory.length, memory.staged) == (3, 0)


def test_the_vocabulary_pass_shows_them_wherever_they_stand():
    hidden, table = torch.randn(3, 4), torch.randn(5000, 4)
    bias = torch.zeros(5000)
    for at, value in ((0, math.nan), (4999, math.nan), (4999, math.inf), (2500, math.inf)):
        result = vocabulary_softmax(hidden, table, bias=bias.index_fill(0, torch.tensor([at]), value))
        assert not result.entropy.isfinite().any()
    assert not vocabulary_softmax(hidden, table, bias=torch.full_like(bias, -math.inf)).entropy.isfinite().any()
    masked = vocabulary_softmax(hidden, table, bias=bias.index_fill(0, torch.arange(4000), -math.inf))
    assert masked.entropy.isfinite().all() and (masked.argmax >= 4000).all()


def test_settings_that_leave_nothing():
    with pytest.raises(ValueError, match="no token is left to choose"):
        list(sparing.generate(model("dense"), [1], suppress_tokens=range(VOCAB)))
    with pytest.raises(ValueError, match="no token is left to choose"):
        list(sparing.generate(model("denoiser"), [1], suppress_tokens=range(VOCAB)))


def test_minus_infinity_alone_is_a_mask():
    logits = torch.full((1, 9), -math.inf)
    logits[0, 4] = -1e30
    for settings in DRAWS.values():
        sampling = Sampling(**settings)
        assert sampling.choose(sampling.process(logits, []), [torch.Generator()]).tolist() == [4]
