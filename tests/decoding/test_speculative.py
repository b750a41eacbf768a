"""Speculation changes how fast tokens come, never which: greedy token for token, sampled in distribution."""

import copy
from itertools import chain

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

import sparing
from sparing.checkpoint.tokenizer import Tokenizer
from sparing.decoding.drafters import ModelDrafter, NGramDrafter
from sparing.decoding.rules import Seen
from sparing.decoding.sampling import Sampling
from sparing.decoding.speculative import verify_greedy, verify_sample
from tests.tiny import CONFIGS, LLAMA, VOCAB, built, model, near, random_ids, same, snapshot, takes

names = pytest.mark.parametrize("name", CONFIGS)
PROMPTS = [random_ids(n, seed=n).tolist() for n in (3, 11, 30)]
LOOP = [7, 8, 9, 10, 7, 8, 9, 10, 7, 8]  # look-up always finds something here


def drafter(name, kind):
    return {"ngram": "ngram", "near": near(name), "itself": model(name)}[kind]


def run(name, prompt, **options):
    """Per row: (ids, reason, stats)."""
    events = list(sparing.generate(model(name), prompt, **({"max_new_tokens": 24, "temperature": 0} | options)))
    done = {e.row: e for e in events if isinstance(e, sparing.Done)}
    found = {row: [t for e in events if isinstance(e, sparing.Commit) and e.row == row for t in e.ids] for row in done}
    return [(found[row], done[row].reason, done[row].stats) for row in sorted(done)]


def ids_of(outcome):
    return [row[:2] for row in outcome]


def assert_greedy(name, drafted, plain, kv="dense", prompts=PROMPTS):
    """The same rows, except for what follows a tie: a pass over several tokens rounds otherwise than one over one."""
    for (ids, reason, _), (expected, ending, _), prompt in zip(drafted, plain, prompts, strict=True):
        if (ids, reason) != (expected, ending):
            at = next(i for i, (a, b) in enumerate(zip(ids, expected, strict=True)) if a != b)
            logits = model(name).logits(prompt + expected[:at], model(name).memory(kv))[-1]
            assert abs(logits[ids[at]] - logits[expected[at]]) < 1e-5


@pytest.fixture(autouse=True)
def _endless(monkeypatch):
    for name in CONFIGS:
        monkeypatch.setitem(model(name).generation_config, "eos_token_id", [])


# --- the two rules ---


P, Q = torch.tensor([0.25, 0.25, 0.4, 0.1]), torch.tensor([0.1, 0.2, 0.3, 0.4])


def test_worked_numbers():
    bonus = torch.tensor([0.0, 1.0, 0.0, 0.0])
    p, draft = torch.stack([P, bonus]), torch.tensor([3])
    assert verify_sample(draft, Q[None], p, torch.tensor([0.249, 0.5])) == (1, 1)
    residual = []
    for u in torch.arange(0.0005, 1, 0.001):
        accepted, token = verify_sample(draft, Q[None], p, torch.tensor([0.251, u]))
        assert accepted == 0
        residual.append(token)
    shares = torch.tensor(residual).bincount(minlength=4) / len(residual)
    assert torch.allclose(shares, torch.tensor([1 / 2, 1 / 6, 1 / 3, 0]), atol=2e-3)
    for token in range(3):  # p >= q: always accepted
        assert verify_sample(torch.tensor([token]), Q[None], p, torch.tensor([0.9999, 0.5]))[0] == 1


def test_a_certain_draft_is_accepted_with_its_probability():
    p = torch.stack([P, P])
    draft = torch.tensor([2])
    assert verify_sample(draft, None, p, torch.tensor([0.39, 0.0])) == (1, 0)
    rejected = [verify_sample(draft, None, p, torch.tensor([0.41, u]))[1] for u in torch.arange(0.0005, 1, 0.001)]
    shares = torch.tensor(rejected).bincount(minlength=4) / len(rejected)
    assert torch.allclose(shares, torch.tensor([0.25, 0.25, 0, 0.1]) / 0.6, atol=2e-3)


def test_without_drafts_a_token_is_drawn_from_p():
    nothing = torch.empty(0, dtype=torch.int64)
    drawn = [verify_sample(nothing, None, P[None], torch.tensor([u])) for u in torch.arange(0.0005, 1, 0.001)]
    assert all(accepted == 0 for accepted, _ in drawn)
    shares = torch.tensor([token for _, token in drawn]).bincount(minlength=4) / len(drawn)
    assert torch.allclose(shares, P, atol=2e-3)
    assert verify_greedy(nothing, P[None]) == (0, 2)


def test_impossible_tokens_never_come_out():
    p = torch.tensor([[0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 1.0, 0.0]])
    for u in (0.0, 0.5, 1 - 2**-53):
        assert verify_sample(torch.tensor([0]), None, p, torch.tensor([0.0, u], dtype=torch.float64))[1] in (1, 2)
        assert verify_sample(torch.tensor([1]), None, p, torch.tensor([0.0, u], dtype=torch.float64)) == (1, 2)
    equal = p[:1]  # p and q differ in nothing: the draft is accepted whatever u
    assert verify_sample(torch.tensor([2]), equal, p, torch.tensor([0.99999, 0.1]))[0] == 1


def test_greedy_rule():
    logits = torch.eye(5)[[1, 2, 3, 4]]
    assert verify_greedy(torch.tensor([1, 2, 3]), logits) == (3, 4)
    assert verify_greedy(torch.tensor([1, 0, 3]), logits) == (1, 2)
    assert verify_greedy(torch.tensor([0, 2, 3]), logits) == (0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.rand(2)}, r"u has shape \[2\]: 2 drafts take \[3\] uniform numbers"),
        ({"u": torch.rand(4)}, r"u has shape \[4\]"),
        ({"u": torch.rand(3, 1)}, r"u has shape \[3, 1\]"),
        ({"q": Q[None]}, r"q has shape \[1, 4\]: 2 drafts take \[2, V\]"),
        ({"p": P.expand(2, 4), "u": torch.rand(2)}, r"p has shape \[2, 4\]: 2 drafts take \[3, V\]"),
        ({"p": P}, r"p has shape \[4\]"),
        ({"drafts": torch.tensor([[1, 2]])}, r"drafts have shape \[1, 2\]: give a list of ids"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    given = {"drafts": torch.tensor([1, 2]), "q": Q.expand(2, 4), "p": P.expand(3, 4), "u": torch.rand(3)}
    verify_sample(**given)
    with pytest.raises(ValueError, match=message):
        verify_sample(**(given | change))
    if not {"u", "q"} & change.keys():
        arguments = given | change
        with pytest.raises(ValueError, match=message.replace("p has", "logits has")):
            verify_greedy(arguments["drafts"], arguments["p"])


@pytest.mark.parametrize("certain", [False, True])
def test_frequencies_of_the_rule(certain):
    """Chi-square; 16.3 is the 99.9 % quantile of 3 degrees of freedom."""
    draws, generator = 10000, torch.Generator().manual_seed(1)
    drafted = torch.multinomial(Q, draws, replacement=True, generator=generator)
    u = torch.rand(draws, 2, generator=generator, dtype=torch.float64)
    p, q = torch.stack([P, P]), None if certain else Q[None]
    outcomes = [verify_sample(d[None], q, p, v) for d, v in zip(drafted, u, strict=True)]
    first = torch.tensor([int(d) if a else t for d, (a, t) in zip(drafted, outcomes, strict=True)])
    expected = P.double() * draws
    assert ((first.bincount(minlength=4) - expected) ** 2 / expected).sum() < 16.3
    if not certain:
        assert sum(a for a, _ in outcomes) / draws == pytest.approx(torch.minimum(P, Q).sum().item(), abs=0.015)


# --- greedy ---


@pytest.mark.parametrize("kind", ["ngram", "near"])
@pytest.mark.parametrize(
    ("name", "kv"), [(name, kv) for name in CONFIGS for kv in ("dense", "window:4") if takes(name, kv)]
)
def test_greedy_output_is_that_of_plain_decoding(name, kind, kv):
    plain = run(name, PROMPTS, kv=kv, decoder="autoregressive")
    drafted = run(name, PROMPTS, kv=kv, draft=drafter(name, kind), adaptive=False)
    assert_greedy(name, drafted, plain, kv)
    for (ids, _, stats), prompt in zip(drafted, PROMPTS, strict=True):
        assert stats["new_tokens"] == len(ids) == 1 + stats["rounds"] + stats["accepted"]
        assert stats["forwards"] == 1 + stats["rounds"]
        assert stats["prompt_tokens"] == len(prompt)


@pytest.mark.parametrize("name", ["dense", "value-only", "shared", "hybrid"])
@pytest.mark.parametrize("block", [1, 16])
def test_codes_read_in_a_round_are_those_of_plain_decoding(name, block):
    """Drafts are exact until accepted, and yet a query reads as codes what it would read as codes alone."""
    settings = {"kv": "turboquant:3", "block": block, "prefill": "stream"}
    plain = run(name, PROMPTS, decoder="autoregressive", **settings)
    assert ids_of(run(name, PROMPTS, draft=near(name), adaptive=False, **settings)) == ids_of(plain)


def test_rows_of_one_round_accept_differently():
    """Each row of a pass keeps its own number of drafts, as if it were alone."""
    options = {"draft": near("dense"), "adaptive": False, "temperature": 0, "max_new_tokens": 24}
    drafts = [e for e in sparing.generate(model("dense"), PROMPTS, **options) if isinstance(e, sparing.Draft)]
    by_round: dict[int, list[int]] = {}
    for event in drafts:
        by_round.setdefault(event.step, []).append(sum(event.accepted))
    assert any(len(set(kept)) == len(PROMPTS) for kept in by_round.values())
    for row, prompt in enumerate(PROMPTS):
        alone = [e for e in sparing.generate(model("dense"), prompt, **options) if isinstance(e, sparing.Draft)]
        assert [(e.ids, e.accepted) for e in drafts if e.row == row] == [(e.ids, e.accepted) for e in alone]


def test_drafts_that_are_always_right():
    plain = run("shared", PROMPTS, decoder="autoregressive")
    drafted = run("shared", PROMPTS, draft=model("shared"), adaptive=False)
    assert ids_of(drafted) == ids_of(plain)
    for _, _, stats in drafted:  # 24 tokens: one of the prompt's pass, five rounds of four, one of three
        assert (stats["rounds"], stats["proposed"], stats["accepted"]) == (6, 17, 17)


@pytest.mark.parametrize("kind", ["ngram", "near"])
def test_an_adaptive_length_changes_no_token(kind):
    plain = run("dense", [*PROMPTS, LOOP], decoder="autoregressive", max_new_tokens=60)
    drafted = run("dense", [*PROMPTS, LOOP], draft=drafter("dense", kind), max_new_tokens=60, draft_tokens=6)
    assert_greedy("dense", drafted, plain, prompts=[*PROMPTS, LOOP])


@names
@pytest.mark.parametrize("draft_tokens", [1, 7])
def test_any_number_of_drafts(name, draft_tokens):
    plain = run(name, PROMPTS, decoder="autoregressive", repetition_penalty=1.3)
    drafted = run(name, PROMPTS, draft=near(name), draft_tokens=draft_tokens, adaptive=False, repetition_penalty=1.3)
    assert ids_of(drafted) == ids_of(plain)
    assert all(stats["proposed"] > 0 for _, _, stats in drafted)


@pytest.mark.parametrize("kind", ["ngram", "near"])
@pytest.mark.parametrize(
    ("name", "kv"), [(name, kv) for name in CONFIGS for kv in ("dense", "window:3") if takes(name, kv)]
)
def test_the_memory_ends_as_after_plain_decoding(name, kind, kv, monkeypatch):
    states, opened = [], ModelDrafter.open
    monkeypatch.setattr(ModelDrafter, "open", lambda self, row: states.append(opened(self, row)) or states[-1])
    memories = [model(name).memory(kv) for _ in range(2)]
    plain = run(name, LOOP, memory=memories[0], decoder="autoregressive")
    drafted = run(name, LOOP, memory=memories[1], draft=drafter(name, kind), adaptive=False)
    assert ids_of(drafted) == ids_of(plain)
    assert same(snapshot(memories[0]), snapshot(memories[1]), 5e-5)
    of_drafter = sum(state.memory.nbytes for state in states)
    assert drafted[0][2]["memory_bytes"] == plain[0][2]["memory_bytes"] + of_drafter == memories[1].nbytes + of_drafter
    assert (of_drafter > 0) == (kind == "near")
    again = run(name, [3, 4], memory=memories[1], draft=drafter(name, kind))
    assert ids_of(again) == ids_of(run(name, [3, 4], memory=memories[0], decoder="autoregressive"))


def test_the_limit_may_fall_inside_a_round():
    plain = run("dense", LOOP, decoder="autoregressive")[0][0]
    for limit in range(1, 11):
        for kind in ("ngram", "itself"):
            ids, reason, stats = run("dense", LOOP, draft=drafter("dense", kind), adaptive=False, max_new_tokens=limit)[
                0
            ]
            assert (ids, reason) == (plain[:limit], "length")
            assert stats["proposed"] < limit  # never more than could still become output


def test_the_context_may_end_inside_a_round(monkeypatch):
    small = copy.copy(model("dense"))
    small.config = copy.copy(small.config)
    object.__setattr__(small.config, "max_position_embeddings", 16)
    for length in (9, 15, 16):
        prompt = random_ids(length).tolist()

        def answer(prompt=prompt, **options):
            events = sparing.generate(small, prompt, temperature=0, max_new_tokens=50, **options)
            return [(e.ids if isinstance(e, sparing.Commit) else e.reason) for e in events if not hasattr(e, "step")]

        plain, drafted = answer(), answer(draft=model("dense"), adaptive=False)
        assert list(chain(*plain[:-1])) == list(chain(*drafted[:-1]))
        assert plain[-1] == drafted[-1] == "length"


# --- ends inside an accepted prefix ---


@pytest.mark.parametrize("place", range(8))
def test_an_end_inside_an_accepted_prefix(place, monkeypatch):
    plain = run("sliding", PROMPTS[1], decoder="autoregressive")[0][0]
    end = plain[place]
    expected = plain[: plain.index(end) + 1]
    memories = [model("sliding").memory() for _ in range(2)]
    monkeypatch.setitem(model("sliding").generation_config, "eos_token_id", [end])
    run("sliding", PROMPTS[1], decoder="autoregressive", memory=memories[0])
    drafted = run("sliding", PROMPTS[1], draft=model("sliding"), adaptive=False, memory=memories[1])
    assert ids_of(drafted) == [(expected, "eos")]
    stats = drafted[0][2]
    assert memories[1].length == memories[0].length == len(PROMPTS[1]) + len(expected) - 1
    assert same(snapshot(memories[0]), snapshot(memories[1]), 5e-5)
    assert stats["accepted"] <= len(expected) - 1
    monkeypatch.setitem(model("sliding").generation_config, "eos_token_id", [])
    assert ids_of(run("sliding", PROMPTS[1], draft=model("sliding"), stop=end)) == [(expected, "stop")]


def test_a_stop_string_inside_an_accepted_prefix(monkeypatch):
    letters = [chr(ord("a") + i % 26) * (1 + i // 26) for i in range(VOCAB)]
    backend = Backend(models.BPE({text: i for i, text in enumerate(letters)}, []))
    backend.decoder = decoders.Fuse()
    monkeypatch.setattr(model("dense"), "tokenizer", Tokenizer(backend))

    def text(**options):
        events = list(sparing.generate(model("dense"), PROMPTS[1], temperature=0, max_new_tokens=12, **options))
        return "".join(e.text for e in events if isinstance(e, sparing.Commit)), events[-1].reason

    whole, _ = text()
    for start in range(len(whole) - 2):
        stop = whole[start : start + 3]
        assert text(stop=stop, draft=model("dense"), adaptive=False) == text(stop=stop)
        assert text(stop=stop, draft="ngram") == text(stop=stop)


# --- sampled ---


def joint(settings, length):
    """Probability of every continuation of LOOP under plain sampling, exactly."""
    sampling = Sampling(**settings)
    found = {(): 1.0}
    for _ in range(length):
        longer = {}
        for continuation, probability in found.items():
            sequence = [*LOOP, *continuation]
            logits = model("dense").logits(sequence)[-1:]
            p = sampling.process(logits, [Seen(sequence)])[0].double().softmax(-1)
            longer |= {(*continuation, t): probability * p[t].item() for t in p.nonzero()[:, 0].tolist()}
        found = longer
    return found


SETTINGS = {"temperature": 1.2, "top_k": 3, "repetition_penalty": 1.2}


class Certain(ModelDrafter):
    """Proposes the most likely tokens of its model, without a distribution, as look-up does."""

    def propose(self, rows, counts, sampling):
        return super().propose(rows, counts, Sampling())


@pytest.mark.parametrize("kind", [ModelDrafter, Certain])
def test_sampled_output_is_distributed_as_plain_sampling(kind, monkeypatch):
    """Chi-square over all continuations of four tokens; bound: mean plus four deviations of its distribution."""
    monkeypatch.setattr("sparing.decoding.generate.make_drafter", lambda target, draft: kind(draft, target))
    expected = joint(SETTINGS, 4)
    assert len(expected) == 81
    counts = dict.fromkeys(expected, 0)
    stats = {"proposed": 0, "accepted": 0}
    rows, batches = 150, 6
    for batch in range(batches):
        options = {"draft": near("dense"), "adaptive": False, "seed": batch, "max_new_tokens": 4}
        for ids, _, row in run("dense", [LOOP] * rows, **options, **SETTINGS):
            counts[tuple(ids)] += 1
            stats = {key: stats[key] + row[key] for key in stats}
    draws = rows * batches
    chi = sum((counts[c] - draws * p) ** 2 / (draws * p) for c, p in expected.items())
    assert chi < 80 + 4 * (2 * 80) ** 0.5
    assert 0.1 < stats["accepted"] / stats["proposed"] < 0.9


@names
def test_rows_and_seeds(name):
    options = {"draft": near(name), "temperature": 0.9, "top_k": 20, "adaptive": True}
    for i, prompt in enumerate(PROMPTS):
        batch = run(name, [prompt, *PROMPTS[:i]], seed=4, **options)
        alone = run(name, prompt, seed=4, **options)
        assert ids_of(batch)[0] == ids_of(alone)[0]
        assert {k: batch[0][2][k] for k in ("rounds", "proposed", "accepted")} == {
            k: alone[0][2][k] for k in ("rounds", "proposed", "accepted")
        }
    assert ids_of(run(name, PROMPTS, seed=5, **options)) != ids_of(run(name, PROMPTS, seed=6, **options))


def test_sampling_from_one_token_is_greedy():
    plain = run("shared", PROMPTS, decoder="autoregressive")
    for kind in ("ngram", "near"):
        assert ids_of(run("shared", PROMPTS, draft=drafter("shared", kind), temperature=0.7, top_k=1)) == ids_of(plain)


# --- events ---


def test_events_of_a_round():
    events = list(
        sparing.generate(model("dense"), LOOP, draft=near("dense"), temperature=0, max_new_tokens=30, adaptive=False)
    )
    output, pending = [], None
    for event in events:
        if isinstance(event, sparing.Draft):
            pending = event
            assert len(event.ids) == len(event.accepted) == len(event.entropy)
            kept = sum(event.accepted)
            assert event.accepted == [True] * kept + [False] * (len(event.ids) - kept)
            sequence = [*LOOP, *output]
            logits = model("dense").logits(sequence + event.ids)[len(sequence) - 1 : -1]
            p = logits.softmax(-1)
            assert torch.allclose(torch.tensor(event.entropy), -(p * p.log()).sum(-1), atol=1e-4)
        elif isinstance(event, sparing.Commit):
            if pending is not None:
                kept = sum(pending.accepted)
                assert event.ids[:kept] == pending.ids[:kept]
                assert len(event.ids) == kept + 1
            output += event.ids
    steps = [event.step for event in events if isinstance(event, sparing.Draft)]
    stats = events[-1].stats
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= stats["rounds"] - 1
    drafts = [event for event in events if isinstance(event, sparing.Draft)]
    assert sum(len(event.ids) for event in drafts) == stats["proposed"]
    assert sum(sum(event.accepted) for event in drafts) == stats["accepted"]


def test_logprobs_are_those_of_plain_decoding():
    def scores(**options):
        events = sparing.generate(model("dense"), LOOP, temperature=0, max_new_tokens=20, logprobs=True, **options)
        return [s for e in events if isinstance(e, sparing.Commit) for s in e.logprobs or ()]

    assert scores(draft=near("dense"), adaptive=False) == pytest.approx(scores(), abs=1e-4)


# --- drafters ---


@pytest.mark.parametrize(
    ("history", "count", "drafts"),
    [
        ([1, 2, 3, 4, 1, 2], 2, [3, 4]),
        ([1, 2, 3, 4, 1, 2], 5, [3, 4, 1, 2, 3]),  # runs on into its own drafts
        ([1, 2, 3, 9, 2, 3, 7, 1, 2, 3], 1, [9]),  # three tokens agree there, two elsewhere
        ([2, 3, 5, 2, 3, 7, 8, 2, 3], 2, [7, 8]),  # the latest of equals
        ([5, 5, 5], 3, [5, 5, 5]),
        ([1, 2, 3, 4], 3, []),
        ([1, 2], 3, []),
        ([1], 3, []),
        ([1, 2, 3, 1, 2], 0, []),
    ],
)
def test_look_up(history, count, drafts):
    drafter = NGramDrafter()
    assert drafter._look_up(history, drafter.open(None), count) == drafts
    grown = drafter.open(None)
    for length in range(1, len(history)):  # entered token by token it finds the same
        drafter._look_up(history[:length], grown, length % 2)
    assert drafter._look_up(history, grown, count) == drafts


def test_a_drafter_that_fails_or_a_stream_that_is_closed_leaves_nothing_staged(monkeypatch):
    memory = model("dense").memory()
    stream = sparing.generate(model("dense"), LOOP, draft=near("dense"), temperature=0, adaptive=False, memory=memory)
    for event in stream:
        if isinstance(event, sparing.Draft):
            break
    stream.close()
    assert memory.staged == 0
    held = memory.length
    stream = sparing.generate(model("dense"), [1], draft=near("dense"), temperature=0, adaptive=False, memory=memory)
    next(stream)

    def fail(hidden):
        raise MemoryError

    monkeypatch.setattr(model("dense"), "head", fail)
    with pytest.raises(MemoryError):
        list(stream)
    assert memory.staged == 0
    assert memory.length == held + 1


def test_a_drafter_whose_context_ends_first():
    short = copy.copy(near("dense"))
    short.config = copy.copy(short.config)
    object.__setattr__(short.config, "max_position_embeddings", 14)
    drafted = run("dense", LOOP, draft=short, adaptive=False)
    assert ids_of(drafted) == ids_of(run("dense", LOOP, decoder="autoregressive"))
    assert 0 < drafted[0][2]["proposed"] <= 14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draft": "small"}, "draft='small' is no drafter"),
        ({"draft": 3}, "draft=3"),
        ({"draft": "ngram", "decoder": "autoregressive"}, "takes no drafter, use decoder='speculative'"),
        ({"draft": "ngram", "draft_tokens": 0}, "draft_tokens is 0"),
        ({"draft": "ngram", "draft_tokens": 1.5}, "draft_tokens is 1.5"),
        ({"draft": "ngram", "draft_tokens": True}, "draft_tokens is True"),
        ({"draft": "ngram", "canvas": [1]}, "has no canvas: leave out 'canvas'"),
        ({"draft_tokens": 2}, "autoregressive takes no option 'draft_tokens'"),
        ({"draft": "ngram", "temperature": -1}, "temperature is -1"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        sparing.generate(model("dense"), [1, 2], **arguments)


def with_vocabulary(vocab_size):
    """A random model like "dense" of another vocabulary."""
    return built(LLAMA | {"vocab_size": vocab_size}, seed=3)


@pytest.mark.parametrize("size", [VOCAB - 3, VOCAB + 5])
def test_another_vocabulary(size, monkeypatch):
    """Refused, but where the tokenizers are one: tables of a family are padded to different sizes."""
    other = with_vocabulary(size)
    message = f"vocabulary has {size} entries, the model's {VOCAB}"
    with pytest.raises(ValueError, match=message):
        sparing.generate(model("dense"), LOOP, draft=other)
    letters = [chr(ord("a") + i % 26) * (1 + i // 26) for i in range(VOCAB - 4)]
    backend = Backend(models.BPE({text: i for i, text in enumerate(letters)}, []))
    monkeypatch.setattr(model("dense"), "tokenizer", Tokenizer(backend))
    other.tokenizer = Tokenizer(backend)
    for settings in ({}, {"temperature": 3.0, "seed": 2}):
        plain = run("dense", [*LOOP, VOCAB - 1], decoder="autoregressive")  # an id that the smaller table lacks
        drafted = run("dense", [*LOOP, VOCAB - 1], draft=other, adaptive=False, **settings)
        assert settings or ids_of(drafted) == ids_of(plain)
        assert drafted[0][2]["proposed"] > 0
    other.tokenizer = Tokenizer(Backend(models.BPE({text: i for i, text in enumerate(letters[::-1])}, [])))
    with pytest.raises(ValueError, match="tokenizer is another than the model's"):
        sparing.generate(model("dense"), LOOP, draft=other)


def test_look_up_and_penalties_see_what_a_memory_holds():
    """With its ids named, a continued memory answers as the whole text does, and finds drafts in it."""
    half = len(LOOP) // 2
    for options in ({"draft": "ngram", "adaptive": False}, {"repetition_penalty": 1.5}, {"draft": near("dense")}):
        memory = model("dense").memory()
        model("dense").logits(LOOP[:half], memory)
        whole = run("dense", LOOP, **options)
        continued = run("dense", LOOP[half:], memory=memory, context=LOOP[:half], **options)
        assert ids_of(continued) == ids_of(whole)
        if "draft" in options:
            assert continued[0][2]["proposed"] == whole[0][2]["proposed"]
    for context, memory in (([1], None), ([1], model("dense").memory())):
        with pytest.raises(ValueError, match="context names 1 ids, the memory holds 0"):
            sparing.generate(model("dense"), [1], memory=memory, context=context)
