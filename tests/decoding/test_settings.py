"""Settings of generation_config.json and of the caller: against transformers' generate, live, and across decoders."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import sparing
from sparing.checkpoint.tokenizer import Tokenizer
from sparing.config.generation import parse_generation_config
from sparing.decoding.settings import resolve_sampling
from tests.conformance.reference import load, save_random
from tests.tiny import ENDLESS, LLAMA, near, random_ids
from tests.tiny import model as tiny_model

VOCAB, CONTEXT = 29, 96
PROMPTS = [random_ids(length, vocab_size=VOCAB, seed=length).tolist() for length in (1, 3, 11)]

FILES = {
    "bans": {"suppress_tokens": [4, 5, 9], "begin_suppress_tokens": [2, 3, 11], "bad_words_ids": [[7], [1, 2], [8, 8]]},
    "n-grams": {"no_repeat_ngram_size": 2},
    "n-grams of the prompt": {"encoder_no_repeat_ngram_size": 1},
    "penalties": {"repetition_penalty": 1.6, "encoder_repetition_penalty": 0.7},
    "biases": {"sequence_bias": [[[3], 2.0], [[5, 6], 4.0], [[9], -5.0]]},
    "least": {"min_new_tokens": 9},
    "least in all": {"min_length": 9},
    "both": {"min_length": 30, "min_new_tokens": 2},
    "most": {"max_new_tokens": 5},
    "most in all": {"max_length": 14},
    "both limits": {"max_length": 4, "max_new_tokens": 6},
    "forced": {"forced_bos_token_id": 8, "forced_eos_token_id": 6, "max_new_tokens": 7},
    "pulled to the end": {"exponential_decay_length_penalty": [2, 1.4]},
    "filters of draws": {"temperature": 0.3, "top_k": 3, "top_p": 0.5, "typical_p": 0.2},
    "neutral": {"num_beams": 1, "top_k": 50, "length_penalty": 1.0, "guidance_scale": 1.0, "penalty_alpha": None},
    "all": {
        "suppress_tokens": [4, 5],
        "bad_words_ids": [[7], [1, 2]],
        "no_repeat_ngram_size": 3,
        "repetition_penalty": 1.2,
        "sequence_bias": [[[3], 1.0], [[2, 6], 4.0]],
        "min_new_tokens": 6,
        "exponential_decay_length_penalty": [4, 1.5],
        "forced_eos_token_id": [6],
    },
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("llama")
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT}
    config = LlamaConfig(**LLAMA | ENDLESS | sizes)
    return save_random(LlamaForCausalLM, config, folder, seed=3), load(folder), folder


@pytest.fixture
def model(both, monkeypatch):
    """Our model, whose generation_config a test sets."""
    monkeypatch.setattr(both[1], "generation_config", {})
    return both[1]


def answer(model, prompt, **options):
    """(ids, text, reason)."""
    events = list(sparing.generate(model, prompt, **options))
    commits = [event for event in events if isinstance(event, sparing.Commit)]
    return [i for event in commits for i in event.ids], "".join(event.text for event in commits), events[-1].reason


@pytest.mark.parametrize("stated", FILES.values(), ids=FILES)
def test_a_file_gives_what_transformers_gives(both, model, stated):
    reference = both[0]
    model.generation_config.update(stated, eos_token_id=[6, 12])
    options = {} if {"max_new_tokens", "max_length"} & stated.keys() else {"max_new_tokens": 24}
    for prompt in PROMPTS:
        config = GenerationConfig(**stated, eos_token_id=[6, 12], pad_token_id=0)
        if "max_length" in stated and len(prompt) >= stated["max_length"] and "max_new_tokens" not in stated:
            with pytest.raises(ValueError, match="max_length"):
                reference.generate(torch.tensor([prompt]), generation_config=config)
            with pytest.raises(ValueError, match="give max_new_tokens"):
                answer(model, prompt)
            continue
        expected = reference.generate(torch.tensor([prompt]), generation_config=config, **options)
        found = answer(model, prompt, **options)[0]
        assert found == expected[0, len(prompt) :].tolist()
        for draft in ("ngram", model):
            assert answer(model, prompt, draft=draft, adaptive=False, **options)[0] == found


def test_limits(model):
    assert len(answer(model, [1, 2], temperature=0)[0]) == CONTEXT - 1  # 256 where nobody says, up to the context
    model.generation_config.update(max_new_tokens=5)
    assert len(answer(model, [1, 2])[0]) == 5
    assert len(answer(model, [1, 2], max_new_tokens=7)[0]) == 7


def test_the_caller_switches_off_what_the_file_asks_for(model):
    plain = answer(model, PROMPTS[1], max_new_tokens=20)
    drawn = answer(model, PROMPTS[1], max_new_tokens=20, temperature=1.0, seed=5)
    off = {
        "suppress_tokens": [],
        "begin_suppress_tokens": [],
        "bad_words_ids": [],
        "sequence_bias": {},
        "repetition_penalty": 1,
        "encoder_repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "encoder_no_repeat_ngram_size": 0,
        "min_new_tokens": 0,
        "forced_bos_token_id": [],
        "forced_eos_token_id": [],
        "exponential_decay_length_penalty": [],
    }
    for stated in FILES.values():
        model.generation_config.update({name: value for name, value in stated.items() if name in off})
    model.generation_config.update(min_length=15)
    assert answer(model, PROMPTS[1], max_new_tokens=20) != plain
    assert answer(model, PROMPTS[1], max_new_tokens=20, **off) == plain
    filters = {"top_k": 1, "top_p": 0.01, "min_p": 1.0, "typical_p": 0.01, "epsilon_cutoff": 0.9, "eta_cutoff": 0.9}
    model.generation_config.update(filters, do_sample=True, top_h=0.01)
    wide = {"top_k": 0, "top_p": 1.0, "min_p": 0, "typical_p": 1.0, "epsilon_cutoff": 0, "eta_cutoff": 0, "top_h": 0}
    assert answer(model, PROMPTS[1], max_new_tokens=20, seed=5, **off, **wide) == drawn


@pytest.mark.parametrize("stated", [{"top_k": 0}, {"top_p": 0}, {"top_p": 0.0, "top_k": -1}, {"top_k": None}])
def test_no_limit_in_a_file(model, stated):
    expected = answer(model, PROMPTS[1], temperature=1.0, seed=2)
    model.generation_config.update(stated, do_sample=True)
    assert answer(model, PROMPTS[1], seed=2) == expected


def test_what_is_not_obeyed_is_named_once(model):
    model.generation_config.update(num_beams=4, guidance_scale=1.5, watermarking_config={"bias": 2}, penalty_alpha=0.6)
    with pytest.warns(UserWarning, match="not obeyed here") as caught:
        answer(model, [[1, 2], [3]], max_new_tokens=2)
    assert len(caught) == 1
    for named in ("num_beams=4", "guidance_scale=1.5", "watermarking_config", "penalty_alpha=0.6"):
        assert named in str(caught[0].message)


def test_stop_texts_of_the_file(model, monkeypatch):
    model.generation_config.update(stop_strings="zz", max_new_tokens=3)
    with pytest.warns(UserWarning, match="stop_strings"):  # without a tokenizer there are no texts
        answer(model, [1, 2])
    letters = [chr(ord("a") + i % 26) * (1 + i // 26) for i in range(VOCAB)]
    backend = Backend(models.BPE({text: i for i, text in enumerate(letters)}, []))
    backend.decoder = decoders.Fuse()
    monkeypatch.setattr(model, "tokenizer", Tokenizer(backend))
    _, text, reason = answer(model, [1, 2], max_new_tokens=12, stop=[])
    assert reason == "length"
    model.generation_config.update(stop_strings=["??", text[3:5]])
    assert answer(model, [1, 2], max_new_tokens=12)[1:] == (text[: text.find(text[3:5])], "stop")
    assert answer(model, [1, 2], max_new_tokens=12, stop=[])[1:] == (text, "length")


def test_settings_that_change_nothing_are_named(model):
    with pytest.warns(UserWarning, match="give a temperature: top_k=5"):
        answer(model, [1], top_k=5, max_new_tokens=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer(model, [1], top_k=5, temperature=0, max_new_tokens=1)


def test_logit_bias(model, monkeypatch):
    free = answer(model, PROMPTS[1], max_new_tokens=10)[0]
    assert set(answer(model, PROMPTS[1], max_new_tokens=10, logit_bias={"5": 100})[0]) == {5}
    assert answer(model, PROMPTS[1], max_new_tokens=10, logit_bias=dict.fromkeys(range(VOCAB), 3.0))[0] == free
    assert free[0] not in answer(model, PROMPTS[1], max_new_tokens=10, logit_bias={free[0]: float("-inf")})[0]
    monkeypatch.setattr(model, "tokenizer", Tokenizer(Backend(models.BPE({"a": 0, "b": 1, "7": 2}, []))))
    assert set(answer(model, PROMPTS[1], max_new_tokens=4, logit_bias={"b": 100})[0]) == {1}
    with pytest.raises(ValueError, match="'ab', which is 2 tokens"):
        answer(model, PROMPTS[1], logit_bias={"ab": 1})


@pytest.mark.parametrize("name", ["dense", "hybrid", "shared"])
@pytest.mark.parametrize(
    "settings",
    [
        {"presence_penalty": 1.5, "frequency_penalty": 0.4},
        {"logit_bias": {3: 4.0, 7: -9.0}, "no_repeat_ngram_size": 2},
        {"bad_words_ids": [[3, 4], [9]], "suppress_tokens": [1, 2], "min_new_tokens": 5, "repetition_penalty": 1.3},
    ],
)
def test_a_round_obeys_them_at_each_of_its_places(name, settings):
    """Greedy, drafted by a near copy and by look-up: the text of plain decoding."""
    prompt = random_ids(7).tolist()
    plain = answer(tiny_model(name), prompt, max_new_tokens=30, **settings)
    assert answer(tiny_model(name), prompt, max_new_tokens=30, draft=near(name), adaptive=False, **settings) == plain
    assert answer(tiny_model(name), prompt, max_new_tokens=30, draft="ngram", **settings) == plain


def test_penalties_are_of_a_row_and_of_what_it_generated(model):
    prompts = [PROMPTS[2], PROMPTS[1]]
    for settings in ({"presence_penalty": 2.0}, {"frequency_penalty": 1.0, "temperature": 0.9}):
        found = {}
        for event in sparing.generate(model, prompts, max_new_tokens=12, seed=1, **settings):
            if isinstance(event, sparing.Commit):
                found.setdefault(event.row, []).extend(event.ids)
        assert found[0] == answer(model, prompts[0], max_new_tokens=12, seed=1, **settings)[0]
        drawn = list(answer(model, prompts[1], max_new_tokens=12, seed=1, **settings)[0])
        assert "temperature" in settings or found[1] == drawn
    assert len(set(answer(model, PROMPTS[1], max_new_tokens=20, presence_penalty=1e6)[0])) == 20


def test_a_memory_named_with_another_policy(model):
    memory = model.memory("turboquant:8", sink_tokens=2)
    kept = {"max_new_tokens": 2, "memory": memory}
    answer(model, [1], **kept)
    answer(model, [2], kv="int8", sink_tokens=2, **kept)
    for options in ({"kv": "window:8"}, {"kv": "int8"}, {"kv": "turboquant:8", "sink_tokens": 3}):
        with pytest.raises(ValueError, match="the memory was made with kv='turboquant:8,sink_tokens=2'"):
            answer(model, [1], **options, **kept)


REFUSED = (11, 12, 40)


@pytest.mark.parametrize("options", [{}, {"draft": "ngram"}, {"draft": "near"}, {"temperature": 5.0, "seed": 1}])
def test_placeholders_are_never_chosen(options, monkeypatch):
    if options.get("draft") == "near":
        options = {"draft": near("dense"), "adaptive": False}
    favourite = answer(tiny_model("dense"), [1, 2, 3], max_new_tokens=40, temperature=0)[0]
    refused = (*REFUSED, favourite[0])
    monkeypatch.setattr(type(tiny_model("dense").config), "refused_token_ids", refused)
    assert not {*answer(tiny_model("dense"), [[1, 2, 3]] * 2, max_new_tokens=40, **options)[0]} & {*refused}


def test_a_canvas_obeys_what_looks_at_an_id_alone():
    denoiser = tiny_model("denoiser")
    prompt, seeds = [3, 4, 5], range(2)
    common = {t for seed in seeds for t in answer(denoiser, prompt, seed=seed, max_new_tokens=8)[0]}
    banned = sorted(common)[: len(common) // 2]
    for settings in (
        {"suppress_tokens": banned},
        {"bad_words_ids": [[i] for i in banned]},
        {"logit_bias": dict.fromkeys(banned, float("-inf"))},
    ):
        for seed in seeds:
            events = list(sparing.generate(denoiser, prompt, seed=seed, max_new_tokens=8, **settings))
            shown = [i for event in events if not isinstance(event, sparing.Done) for i in event.ids]
            assert not {*shown} & {*banned}
    assert set(answer(denoiser, prompt, seed=0, max_new_tokens=8, logit_bias={9: 1e6})[0]) == {9}


@pytest.mark.parametrize(
    ("name", "value", "off"),
    [
        ("presence_penalty", 1, 0),
        ("repetition_penalty", 2, 1),
        ("no_repeat_ngram_size", 1, 0),
        ("min_new_tokens", 1, 0),
        ("begin_suppress_tokens", [3], []),
        ("min_p", 1, 0),
        ("typical_p", 0.5, 1),
        ("top_k", 1, 0),
        ("top_p", 0.5, 1.0),
    ],
)
def test_a_canvas_refuses_what_is_not_defined_there(name, value, off):
    denoiser = tiny_model("denoiser")
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value}: ") + "(a canvas|block diffusion)"):
        sparing.generate(denoiser, [3], **{name: value})
    plain = answer(denoiser, [3], seed=0, max_new_tokens=8)
    assert answer(denoiser, [3], seed=0, max_new_tokens=8, **{name: off}) == plain


def test_a_canvas_needs_a_token_to_choose():
    denoiser = tiny_model("denoiser")
    with pytest.raises(ValueError, match="no token is left to choose: suppress_tokens"):
        sparing.generate(denoiser, [3], suppress_tokens=list(range(denoiser.config.vocab_size)))


@pytest.mark.parametrize("name", ["forced_bos_token_id", "forced_eos_token_id", "suppress_tokens"])
def test_minus_one_is_no_token(model, name):
    for value in ([-1],) if name == "suppress_tokens" else ([-1], -1):
        model.generation_config = {name: value, "max_new_tokens": 6}
        assert answer(model, [1]) == answer(model, [1], **{name: []})


def test_a_canvas_refuses_sequences_of_ids():
    with pytest.raises(ValueError, match="only single ids"):
        sparing.generate(tiny_model("denoiser"), [3], bad_words_ids=[[3, 4]])


def test_a_canvas_names_what_its_file_asks_for_in_vain(monkeypatch):
    denoiser = tiny_model("denoiser")
    stated = {"repetition_penalty": 1.2, "suppress_tokens": [9], "bad_words_ids": [[8], [4, 5]]}
    monkeypatch.setattr(denoiser, "generation_config", stated)
    with pytest.warns(UserWarning, match="repetition_penalty=1.2, bad_words_ids"):
        found = answer(denoiser, [3], seed=0, max_new_tokens=16)[0]
    assert not {8, 9} & {*found}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer(denoiser, [3], seed=0, max_new_tokens=8, repetition_penalty=1.0, bad_words_ids=[[8]])


@pytest.mark.parametrize(
    ("key", "value"),
    [("top_p", "x"), ("repetition_penalty", -1), ("sampler_config", 3), ("do_sample", "yes"), ("bad_words_ids", [3])],
)
def test_a_file_with_a_bad_value_does_not_load(both, key, value):
    path = both[2] / "generation_config.json"
    before = path.read_text() if path.exists() else None
    path.write_text(json.dumps({key: value}))
    try:
        with pytest.raises(sparing.CheckpointError, match=f"generation_config.json: {key} is"):
            load(both[2])
    finally:
        path.unlink() if before is None else path.write_text(before)


def test_a_files_least_length_speaks_of_the_ends_that_it_names():
    """As in transformers: the end that config.json alone names is not held back by a file that names none."""
    model = tiny_model("dense")
    config = parse_generation_config({"min_new_tokens": 3})
    try:
        model.generation_config = {"min_new_tokens": 3}
        assert resolve_sampling(model, config, (1,), {}).eos_ids == ()
        assert resolve_sampling(model, config, (1,), {"min_new_tokens": 2}).eos_ids == (1,)
        model.generation_config = {"min_new_tokens": 3, "eos_token_id": [1, 2]}
        assert resolve_sampling(model, config, (1, 2, 7), {}).eos_ids == (1, 2)
    finally:
        model.generation_config = {}
