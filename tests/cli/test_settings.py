"""Settings of sampling on the command line: each is the library's, a file's can be switched off."""

import json
import shutil

import pytest

import sparing

LIMIT = ("--max-new-tokens", 24)


@pytest.fixture
def folder(folders, tmp_path):
    """A left-to-right model whose generation_config.json asks for several things."""
    shutil.copytree(folders / "causal", tmp_path / "model")
    stated = {"suppress_tokens": [40, 41], "no_repeat_ngram_size": 2, "stop_strings": ["q"], "max_new_tokens": 9}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(stated))
    return tmp_path / "model"


def ids(events):
    return [token for event in events if isinstance(event, sparing.Commit) for token in event.ids]


def printed(command, folder, *options):
    result = command("generate", folder, "Once", "--json", *options)
    assert result.code == 0, result
    events = [json.loads(line) for line in result.out.splitlines()]
    return [
        token
        for event in events
        if event.get("event", event.get("type")) in ("commit", "Commit")
        for token in event["ids"]
    ]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {}),
        (["--max-new-tokens", 12], {"max_new_tokens": 12}),
        (["--presence-penalty", 2, "--frequency-penalty", "0.5"], {"presence_penalty": 2.0, "frequency_penalty": 0.5}),
        (["--logit-bias", "50=100", "--logit-bias", "O=-3"], {"logit_bias": {50: 100.0, "O": -3.0}}),
        (["--min-new-tokens", 9, "--no-repeat-ngram-size", 0], {"min_new_tokens": 9, "no_repeat_ngram_size": 0}),
        (["--suppress-tokens", ""], {"suppress_tokens": []}),
        (["--suppress-tokens", "50, 51"], {"suppress_tokens": [50, 51]}),
        (["--set", "stop=[]", "--set", "bad_words_ids=[[1,2],[50]]"], {"stop": [], "bad_words_ids": [[1, 2], [50]]}),
        (
            ["--temperature", "0.9", "--seed", 2, "--set", "typical_p=0.5"],
            {"temperature": 0.9, "seed": 2, "typical_p": 0.5},
        ),
        (["--draft", "ngram", "--presence-penalty", 1], {"draft": "ngram", "presence_penalty": 1}),
    ],
)
def test_an_option_is_the_librarys(command, folder, arguments, options):
    expected = ids(sparing.generate(sparing.load(folder), "Once", **options))
    assert printed(command, folder, *arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--logit-bias", "5"], "--logit-bias '5': write ID=BIAS"),
        (["--logit-bias", "5=much"], "--logit-bias '5=much': write ID=BIAS"),
        (["--logit-bias", "9999999=1"], "logit_bias holds 9999999: the vocabulary has"),
        (["--suppress-tokens", "a"], "--suppress-tokens 'a': write token ids such as 4,7"),
        (["--set", "memory=1"], "--set memory: not known, use one of"),
        (["--set", "typical_p"], "write name=value"),
        (["--set", "stop=[2]", "--stop", "x"], "--set stop: given as an option, too"),
        (["--temperature", "0", "--set", "temperature=1"], "--set temperature: given as an option, too"),
        (["--presence-penalty", "nan"], "presence_penalty is nan"),
        (["--top-k", "-1"], "top_k is -1: use at least 0 (0: no limit)"),
        (["--seed", "-1"], "seed is -1"),
    ],
)
def test_what_is_not_written_right(refused, folder, arguments, message):
    assert message in refused("generate", folder, "Once", *arguments)
