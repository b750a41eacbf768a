"""generation_config.json: names, types and ranges, before anything is used."""

import random

import pytest

import sparing
from sparing.config.generation import CANVAS, NOT_OBEYED, RULES, WARPERS, parse_generation_config

BAD = [
    ("temperature", "hot"),
    ("temperature", -1),
    ("temperature", float("nan")),
    ("top_k", 2.5),
    ("top_k", True),
    ("top_p", 1.5),
    ("top_p", [0.9]),
    ("min_p", -0.1),
    ("top_h", 2),
    ("typical_p", 0),
    ("epsilon_cutoff", "0"),
    ("repetition_penalty", "x"),
    ("repetition_penalty", 0),
    ("no_repeat_ngram_size", -1),
    ("no_repeat_ngram_size", 1.5),
    ("bad_words_ids", [1, 2]),
    ("bad_words_ids", [[]]),
    ("bad_words_ids", [["a"]]),
    ("sequence_bias", [[1, 2]]),
    ("sequence_bias", [[[], 2.0]]),
    ("sequence_bias", [[[1], "x"]]),
    ("sequence_bias", 3),
    ("suppress_tokens", 3),
    ("suppress_tokens", [-2]),
    ("suppress_tokens", {"1": 2}),
    ("begin_suppress_tokens", ["a"]),
    ("min_new_tokens", "5"),
    ("forced_eos_token_id", "</s>"),
    ("exponential_decay_length_penalty", [1]),
    ("exponential_decay_length_penalty", ["a", 1.1]),
    ("max_new_tokens", 0),
    ("max_new_tokens", 1e9),
    ("max_length", "20"),
    ("stop_strings", [1]),
    ("stop_strings", ""),
    ("do_sample", 1),
    ("sampler_config", 3),
    ("entropy_bound", -1),
    ("max_denoising_steps", 0),
    ("t_max", "x"),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_a_bad_value_names_file_key_and_value(key, value):
    for do_sample in (True, False):
        with pytest.raises(sparing.CheckpointError, match=rf"^here.json: {key}"):
            parse_generation_config({"do_sample": do_sample, key: value}, "here.json")


def test_null_is_unset_and_unknown_keys_are_nothing():
    names = [
        *WARPERS,
        *RULES,
        *CANVAS,
        *NOT_OBEYED,
        "max_length",
        "max_new_tokens",
        "stop_strings",
        "do_sample",
        "eos_token_id",
    ]
    found = parse_generation_config(dict.fromkeys(names) | {"chat_format": "chatml", "transformers_version": 4})
    assert found == parse_generation_config({})
    assert not (found.warpers or found.rules or found.canvas or found.not_obeyed)


def test_any_value_anywhere_is_read_or_refused():
    chance = random.Random(0)
    values = [None, True, False, 0, 1, -1, 2.5, 1e308, float("inf"), float("-inf"), float("nan"), 10**40, "", "x", "1"]
    values += [
        [],
        {},
        [0],
        [[0]],
        [[1, 2]],
        [[[1], 2.0]],
        [None],
        {"a": 1},
        [[[[]]]],
        ["x"],
        [[], []],
        {"entropy_bound": "x"},
    ]
    names = [*WARPERS, *RULES, *CANVAS, *NOT_OBEYED, "max_length", "max_new_tokens", "stop_strings", "sampler_config"]
    for _ in range(3000):
        raw = {name: chance.choice(values) for name in chance.sample(names, 3)} | {"do_sample": chance.random() < 0.5}
        assert outcome(raw) is None or any(name in outcome(raw) for name in raw)


def outcome(raw):
    """None, or what is wrong with it."""
    try:
        parse_generation_config(raw).limit(0)
    except sparing.CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("stated", "prompt", "limit"),
    [
        ({}, 9, 256),
        ({"max_new_tokens": 7}, 9, 7),
        ({"max_length": 20}, 9, 11),
        ({"max_length": 20, "max_new_tokens": 7}, 30, 7),
    ],
)
def test_limits(stated, prompt, limit):
    assert parse_generation_config(stated).limit(prompt) == limit


def test_a_prompt_beyond_the_length():
    with pytest.raises(ValueError, match=r"the prompt makes 20 tokens.* max_length 20: give max_new_tokens"):
        parse_generation_config({"max_length": 20}).limit(20)


@pytest.mark.parametrize("name", NOT_OBEYED)
def test_what_is_not_obeyed_is_kept_apart(name):
    neutral = NOT_OBEYED[name]
    stated = 3 if neutral is None else neutral + 1
    assert parse_generation_config({name: stated}).not_obeyed == {name: stated}
    assert not parse_generation_config({name: neutral}).not_obeyed
