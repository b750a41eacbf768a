"""`sparing generate`: prompts, options, canvases and output."""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path

import pytest

import sparing
from sparing.cli.options import canvas_ids, positions
from sparing.sudoku.text import parse_puzzle, prompt_text
from sparing.text import printable
from tests.cli.models import CANVAS, CONTEXT

SHORT = ("--max-new-tokens", 24, "--seed", 3)


@pytest.fixture
def model(folders: Path):
    return sparing.load(folders / "tales")


def written(model, prompt, **options) -> str:
    options = {"max_new_tokens": 24, "seed": 3} | options
    return "".join(e.text for e in sparing.generate(model, prompt, **options) if isinstance(e, sparing.Commit))


def answer(model, prompt, **options) -> str:
    text = written(model, prompt, **options)
    assert len(text) > 3
    return text


def shown(text: str) -> str:
    """What a pipe gets of an answer: a model of bytes also writes control characters."""
    text = printable(text)
    return text if text.endswith("\n") else text + "\n"


def test_the_text_alone_goes_to_standard_output(command, model):
    result = command("generate", "tales", "Once upon", *SHORT)
    assert result.code == 0
    assert result.out == shown(answer(model, "Once upon"))
    assert "tokens per forward pass" in result.err
    assert command("generate", "tales", "Once upon", *SHORT, "--quiet").err == ""


def test_prompts_come_from_arguments_a_file_or_standard_input(command, tmp_path):
    expected = command("generate", "tales", "Once upon", *SHORT).out
    (tmp_path / "prompt.txt").write_text("Once upon\n")
    assert command("generate", "tales", "--file", tmp_path / "prompt.txt", *SHORT).out == expected
    assert command("generate", "tales", *SHORT, stdin="Once upon\n").out == expected
    assert command("generate", "tales", "-", *SHORT, stdin="Once upon").out == expected


def test_several_prompts_are_answered_under_their_numbers(command, model):
    result = command("generate", "tales", "Once upon", "The old", *SHORT)
    texts = {0: "", 1: ""}
    for event in sparing.generate(model, ["Once upon", "The old"], max_new_tokens=24, seed=3):
        if isinstance(event, sparing.Commit):
            texts[event.row] += event.text
    assert all(f"[{row + 1}]\n{shown(text)}" in result.out for row, text in texts.items())


@pytest.mark.parametrize("decoder", ["autoregressive", "block_diffusion"])
def test_json_has_an_event_a_line(command, model, decoder):
    result = command("generate", "tales", "Once upon", *SHORT, "--decoder", decoder, "--json")
    expected = list(sparing.generate(model, "Once upon", max_new_tokens=24, seed=3, decoder=decoder))
    found = [json.loads(line) for line in result.out.splitlines()]
    assert [e["event"] for e in found] == [type(e).__name__.lower() for e in expected]
    assert [e["ids"] for e in found[:-1]] == [e.ids for e in expected[:-1]]  # type: ignore[union-attr]
    assert found[-1]["stats"]["new_tokens"] == expected[-1].stats["new_tokens"]  # type: ignore[union-attr]
    assert result.err == ""


def test_options_reach_the_decoder(command, model):
    left_to_right = {"decoder": "autoregressive", "temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
    left_to_right |= {"repetition_penalty": 1.2, "stop": ["e"]}
    flags = "--decoder autoregressive --temperature 0.9 --top-k 20 --top-p 0.9 --min-p 0.01 --repetition-penalty 1.2"
    result = command("generate", "tales", "Once", *SHORT, *flags.split(), "--stop", "e", "--logprobs")
    assert result.out == shown(answer(model, "Once", **left_to_right))
    assert "log-probability -" in result.err

    canvas = {"max_denoising_steps": 3, "entropy_bound": 5.0, "t_min": 0.2, "t_max": 0.5, "kv": "window:4"}
    canvas |= {"stability_threshold": 0, "confidence_threshold": 0.5}
    flags = "--steps 3 --entropy-bound 5 --t-min 0.2 --t-max 0.5 --kv window:4"
    flags += " --stability-threshold 0 --confidence-threshold 0.5"
    assert command("generate", "tales", "Once", *SHORT, *flags.split()).out == shown(answer(model, "Once", **canvas))


def test_a_canvas_starts_from_a_text_and_holds_what_is_fixed(command, model):
    result = command("generate", "tales", "The", "--canvas", "old <?2> went", "--fix", "given", "--json", "--seed", 2)
    given = canvas_ids(model, "old <?2> went")
    held = {i: token for i, token in enumerate(given) if token is not None}
    drafts = [e for e in map(json.loads, result.out.splitlines()) if e["event"] == "draft"]
    first = [drafts[0], *takewhile(lambda e: e["step"] > 1, drafts[1:])]  # of the canvas that was given
    assert len(first) > 1
    assert all({i: e["ids"][i] for i in held} == held for e in first)


def test_unknown_tokens_of_a_canvas(model):
    encode = model.tokenizer.encode
    parts = [encode(part, add_special_tokens=False) for part in ("The", " went")]
    assert canvas_ids(model, "The <?3> went") == [*parts[0], None, None, None, *parts[1]]
    assert canvas_ids(model, "<?>The") == [None, *parts[0]]
    assert canvas_ids(model, "a _ b?") == encode("a _ b?", add_special_tokens=False)


def test_a_canvas_needs_no_prompt(command, model):
    start = model.tokenizer.encode("")
    result = command("generate", "tales", "--canvas", "The old", *SHORT)
    assert result.out == shown(answer(model, start, canvas="The old"))


def test_positions():
    assert positions("0-2,5, 7", []) == [0, 1, 2, 5, 7]
    assert positions("given", [4, None, 6]) == [0, 2]


def test_a_puzzle_is_typed_as_digits(command, folders):
    puzzle = "1.3. ..1. .1.3 3.1."
    model, prompt = sparing.load(folders / "sudoku"), prompt_text(parse_puzzle(puzzle))
    # A random model may well begin with the end.
    seed, expected = next((s, text) for s in range(20) if len(text := written(model, prompt, seed=s)) > 3)
    result = command("generate", "sudoku", puzzle, "--max-new-tokens", 24, "--seed", seed)
    assert result.out == shown(expected)


BAD = {
    "empty prompt": (["generate", "tales", ""], "the prompt is empty"),
    "nothing piped in": (["generate", "tales"], "the prompt is empty"),
    "too long": (["generate", "tales", "word " * CONTEXT], f"the model's context of {CONTEXT}: shorten the prompt"),
    "no room for a canvas": (["generate", "tales", "x" * (CONTEXT - 5)], "shorten the prompt"),
    "temperature": (["generate", "tales", "x", "--temperature", "-1"], "temperature is -1.0"),
    "policy": (["generate", "tales", "x", "--kv", "windw:5"], "use dense, window:N"),
    "decoder": (
        ["generate", "tales", "x", "--decoder", "diffusion"],
        "use one of 'auto', 'autoregressive', 'speculative'",
    ),
    "no tokens": (["generate", "tales", "x", "--max-new-tokens", "0"], "use at least 1"),
    "steps": (["generate", "tales", "x", "--steps", "0"], "max_denoising_steps is 0"),
    "wrong decoder": (["generate", "tales", "x", "--top-k", "5"], "leave it out"),
    "fix": (["generate", "tales", "x", "--fix", "0"], "--fix needs --canvas"),
    "fix range": (["generate", "tales", "x", "--canvas", "a", "--fix", "1:3"], "write positions such as 0-5,9"),
    "fix a hole": (["generate", "tales", "x", "--canvas", "<?>", "--fix", "0"], "position 0, which has no given token"),
    "long canvas": (["generate", "tales", "x", "--canvas", "q" * 30], f"the model's canvas has {CANVAS}: shorten it"),
    "unknown name": (["generate", "talse", "x"], "did you mean tales?"),
    "missing file": (["generate", "tales", "-f", "nowhere.txt"], "'nowhere.txt' does not exist"),
    "two sources": (["generate", "tales", "x", "-f", __file__], "not both"),
    "dtype": (["generate", "tales", "x", "--dtype", "float8"], "use auto, float32"),
    "device": (["generate", "tales", "x", "--device", "quantum"], "device='quantum' is not there, use auto, cpu"),
    "option": (["generate", "tales", "x", "--tempature", "1"], "Did you mean '--temperature'?"),
    "no model": (["generate"], "Missing argument 'MODEL'"),
    "a prompt alone": (
        ["generate", "Once upon a time"],
        "not a model; give one before the prompt: sparing generate tales 'Once upon a time'",
    ),
    "a word alone": (["generate", "Hello"], "sparing generate tales Hello"),
    "a long prompt alone": (["generate", "a king. " * 999], "not a model; give one before the prompt"),
    "a name that is nearly one": (["generate", "talse"], "did you mean tales?"),
    "a path alone": (["generate", "models/mine.gguf"], "models/mine.gguf"),
    "command": (["generat"], "sparing --help"),
    "puzzle": (["generate", "sudoku", "12"], "16, 36 or 81 cells, found 2"),
    "puzzle size": (["generate", "sudoku", "." * 81], "solves 4x4 puzzles, the one given is 9x9"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_gets_one_clear_line(refused, case):
    arguments, message = BAD[case]
    assert message in refused(*arguments)


def test_a_model_without_canvas_says_so(refused, folders):
    assert "llama has no canvas" in refused("generate", folders / "causal", "x", "--decoder", "block_diffusion")
    assert "llama has no canvas: leave out 'canvas'" in refused("generate", folders / "causal", "x", "--canvas", "y")


def test_a_folder_without_config_says_so(refused, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    assert "no config.json; it holds notes.txt" in refused("generate", tmp_path, "x")


def test_a_prompt_must_be_text(refused):
    assert "standard input: not UTF-8 text, byte 1 is 0xff" in refused("generate", "tales", stdin=b"a\xff")


def test_speculation_changes_no_text(command, refused, model, folders):
    plain = ("generate", "tales", "Once upon a time", "--decoder", "autoregressive", "--temperature", 0, *SHORT)
    expected = command(*plain).out
    for drafter in ("ngram", folders / "tales", folders / "causal"):
        result = command("generate", "tales", "Once upon a time", "--draft", drafter, "--temperature", 0, *SHORT)
        assert (result.code, result.out) == (0, expected)
    events = command(
        "generate", "tales", "Once upon a time", "--draft", "ngram", *SHORT, "--draft-tokens", 2, "--json"
    ).out
    stats = json.loads(events.splitlines()[-1])["stats"]
    assert {"rounds", "proposed", "accepted"} <= stats.keys()
    assert "tokenizer is another" in refused("generate", "tales", "Once", "--draft", folders / "sudoku")
    assert "draft_tokens is 0" in refused("generate", "tales", "Once", "--draft", "ngram", "--draft-tokens", 0)
