"""Thoughts, answers and calls of tools, told apart however the answer arrives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from sparing.checkpoint.chat.template import ChatTemplate
from sparing.checkpoint.tokenizer import Tokenizer
from sparing.decoding.answer import AnswerParts, for_history
from sparing.decoding.events import Commit
from sparing.decoding.transcript import Transcript

SPECIAL = ["</s>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|other|>"]
WORDS = ["thought\n", "Let me see", "\n", "call:f{x:1}", "Yes", " and no", "<thi", "nk>", "</think>", "<", "|>"]
IDS = {text: i for i, text in enumerate([*SPECIAL, *WORDS])}


def tokenizer(template: str = "") -> Tokenizer:
    backend = Backend(models.BPE(IDS, []))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(SPECIAL)
    return Tokenizer(backend, eos_ids=[0], chat_template=ChatTemplate(template))


def split(pieces: list[str], group: int = 1, prompt: str = "", template: str = "") -> tuple[dict[str, str], str, list]:
    """(texts by kind, what history holds, kinds in order)."""
    tokens = tokenizer(template)
    transcript, parts = Transcript(tokens, [0], [], 99), AnswerParts(tokens, prompt)
    ids, found, history = [IDS[piece] for piece in pieces], [], ""
    for start in range(0, len(ids), group):
        taken, text = transcript.push(ids[start : start + group])
        event = Commit(0, taken, text, marks=transcript.marks)
        history += for_history(event, tokens)
        found += parts.push(event)
    found += parts.close()
    texts: dict[str, str] = {}
    for part in found:
        assert part.text
        texts[part.kind] = texts.get(part.kind, "") + part.text
    return texts, history, list(dict.fromkeys(part.kind for part in found))


GEMMA = ["<|channel>", "thought\n", "Let me see", "\n", "<channel|>", "Yes", " and no", "</s>"]
CALLS = ["<|channel>", "thought\n", "Let me see", "<channel|>", "<|tool_call>", "call:f{x:1}", "<tool_call|>", "</s>"]


@pytest.mark.parametrize("group", [1, 2, 3, 99])
def test_a_thought_is_no_part_of_the_answer_and_keeps_its_marks_in_history(group):
    template = "{{ messages[0].content.split('<channel|>')[-1] }}{{ '<|channel>' }}"
    texts, history, kinds = split(GEMMA, group, template=template)
    assert texts == {"reasoning": "Let me see", "content": "Yes and no"}
    assert kinds == ["reasoning", "content"]
    assert history == "<|channel>thought\nLet me see\n<channel|>Yes and no"
    shown = ChatTemplate(template).render(messages=[{"role": "assistant", "content": history}])
    assert shown.startswith("Yes and no")


@pytest.mark.parametrize("group", [1, 2, 99])
def test_calls_of_tools_are_apart(group):
    texts, _, kinds = split(CALLS, group)
    assert texts == {"reasoning": "Let me see", "tool_call": "call:f{x:1}"}
    assert kinds == ["reasoning", "tool_call"]


def test_marks_may_be_ordinary_text_and_cut_anywhere():
    pieces = ["<thi", "nk>", "Let me see", "</think>", "\n", "Yes"]
    assert split(pieces, template="<think>")[0] == {"reasoning": "Let me see", "content": "Yes"}
    assert split(["Yes", "<", "|>"], template="<think>")[0] == {"content": "Yes<|>"}


def test_a_thought_may_begin_in_the_prompt():
    pieces = ["Let me see", "\n", "</think>", "\n", "Yes"]
    for prompt, expected in {
        "<|im_start|>assistant\n<think>\n": {"reasoning": "Let me see", "content": "Yes"},
        "<|im_start|>assistant\n<think>\n\n</think>\n\n": {"content": "Let me see\n</think>\nYes"},
    }.items():
        assert split(pieces, prompt=prompt, template="<think>")[0] == expected


def test_an_unfinished_thought_is_one():
    assert split(GEMMA[:3])[0] == {"reasoning": "Let me see"}


def test_special_tokens_that_no_template_asks_for_are_left_out_of_history():
    texts, history, _ = split(["Yes", "<|other|>", " and no"])
    assert texts == {"content": "Yes and no"}
    assert history == "Yes and no"


@given(st.lists(st.sampled_from([*SPECIAL[1:], *WORDS]), max_size=12), st.integers(1, 5))
def test_nothing_is_lost_but_marks_and_blanks_and_pieces_do_not_matter(pieces, group):
    once, *_ = split(pieces, 99, template="<think>")
    texts, *_ = split(pieces, group, template="<think>")
    assert texts == once
    plain = "".join(piece for piece in pieces if piece not in SPECIAL)
    for text in texts.values():
        assert set(text) <= set(plain)
    if not any(mark in "".join(pieces) for mark in ("<|channel>thought\n", "<|tool_call>", "<think>")):
        assert texts == ({"content": plain} if plain else {})
