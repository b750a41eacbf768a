"""Where a row's text ends and when it is shown, against the plain reading of its pieces."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from sparing.checkpoint.tokenizer import Tokenizer
from sparing.decoding.events import Commit
from sparing.decoding.stops import stop_entries
from sparing.decoding.transcript import Transcript

PIECES = ["a", "b", "ab", "ba", "aab", "c", "bc", "é", "abab"]
EOS = len(PIECES)


def tokenizer() -> Tokenizer:
    backend = Backend(models.BPE({text: i for i, text in enumerate([*PIECES, "</s>"])}, []))
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, eos_ids=[EOS])


TOKENIZER = tokenizer()


def plain_reading(ids: list[int], stops: list[str], limit: int) -> tuple[int, str, str | None]:
    """(ids taken, text, reason), looking at the whole text again after each id."""
    text = ""
    for n, token in enumerate(ids, 1):
        if token == EOS:
            return n, text, "eos"
        text += PIECES[token]
        if found := [at for stop in stops if (at := text.find(stop)) >= 0]:
            return n, text[: min(found)], "stop"
        if n == limit:
            return n, text, "length"
    return len(ids), text, None


@given(
    ids=st.lists(st.integers(0, EOS), max_size=14),
    stops=st.lists(st.text("abcé", min_size=1, max_size=5), max_size=3),
    limit=st.integers(1, 12),
    group=st.integers(1, 4),
)
def test_text_ends_where_a_plain_reading_ends_it(ids, stops, limit, group):
    taken, text, reason = plain_reading(ids, stops, limit)
    transcript = Transcript(TOKENIZER, [EOS], stops, limit)
    shown = ""
    for start in range(0, len(ids), group):
        if transcript.reason is None:
            shown += transcript.push(ids[start : start + group])[1]
            assert text.startswith(shown)  # nothing that a stop string takes back
            if transcript.reason is None:  # only the possible start of a stop string is held back
                read = "".join(PIECES[token] for token in ids[: start + group])
                assert len(read) - len(shown) <= max(map(len, stops), default=1) - 1
    assert (transcript.ids, transcript.reason) == (ids[:taken], reason)
    if reason is not None:
        assert shown == text


def test_a_character_of_several_ids_appears_whole():
    characters = {c: i for i, c in enumerate("Ã©x")}  # how a byte-level vocabulary spells the two bytes of é, and x
    backend = Backend(models.BPE(characters, []))
    backend.decoder = decoders.ByteLevel()
    transcript = Transcript(Tokenizer(backend), [], ["éx"], 10)
    assert [transcript.push([token])[1] for token in (2, 0, 1, 0, 1, 2)] == ["x", "", "", "", "é", ""]
    assert transcript.reason == "stop"


SPECIAL = {EOS + 1: "<x>", EOS + 2: "<yb>"}


def with_special_tokens() -> Tokenizer:
    backend = Backend(models.BPE({text: i for i, text in enumerate([*PIECES, "</s>", *SPECIAL.values()])}, []))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["</s>", *SPECIAL.values()])
    return Tokenizer(backend, eos_ids=[EOS])


MARKING = with_special_tokens()


def marked_reading(ids: list[int], stops: list[str], limit: int) -> tuple[int, str, str, str | None]:
    """(ids taken, text, text with whole special tokens, reason), looking at everything again after each id."""
    pieces: list[tuple[str, bool, str]] = []  # characters, whether they are shown, and what they are in history
    for n, token in enumerate(ids, 1):
        before = len(pieces)
        if token < EOS:
            pieces += [(c, True, c) for c in PIECES[token]]
        else:
            name = {EOS: "</s>", **SPECIAL}[token]
            pieces += [(c, False, "") for c in name[:-1]] + [(name[-1], False, name)]
        starts = [before] if token == EOS else []
        for places in (range(len(pieces)), [i for i, piece in enumerate(pieces) if piece[1]]):
            text = "".join(pieces[i][0] for i in places)
            starts += [places[at] for stop in stops if (at := text.find(stop)) >= 0]
        if starts or n == limit:
            end = min(starts, default=len(pieces))
            reason = "length" if not starts else "eos" if token == EOS and end >= before else "stop"
            break
    else:
        n, end, reason = len(ids), len(pieces), None
    return n, "".join(c for c, shown, _ in pieces[:end] if shown), "".join(h for *_, h in pieces[:end]), reason


@given(
    ids=st.lists(st.integers(0, EOS + 2), max_size=14),
    stops=st.lists(
        st.text("abé<>xy/s", min_size=1, max_size=5)
        | st.sampled_from(["<x>", "a<x>b", "<yb>", "b<x><yb>a", "</s>", "a</s>", "yb>a", "<x", "x>"]),
        max_size=3,
    ),
    limit=st.integers(1, 12),
    group=st.integers(1, 4),
)
def test_stop_text_is_found_in_special_tokens_and_around_them(ids, stops, limit, group):
    taken, text, marked, reason = marked_reading(ids, stops, limit)
    transcript, shown, history = Transcript(MARKING, [EOS], stops, limit), "", ""
    for start in range(0, len(ids), group):
        if transcript.reason is None:
            some, piece = transcript.push(ids[start : start + group])
            event = Commit(0, some, piece, marks=transcript.marks)
            shown, history = shown + event.text, history + event.marked
    assert (transcript.ids, transcript.reason) == (ids[:taken], reason)
    if reason is not None:
        assert (shown, history) == (text, marked)


@pytest.mark.parametrize(
    "stop", [2, [np.int64(2)], np.array([2]), torch.tensor(2), torch.tensor([2, 5]), (2,), {2}, np.uint8(2), [2, "x"]]
)
def test_stops_of_every_whole_number_are_ids(stop):
    assert stop_entries(stop)[0] == 2


@pytest.mark.parametrize(
    "stop",
    [
        [None],
        2.0,
        [2.5],
        True,
        [False],
        b"x",
        {"a": 1},
        -1,
        [""],
        [[2]],
        np.float32(2),
        np.bool_(1),
        torch.tensor(True),
    ],
    ids=repr,
)
def test_other_stops_are_refused_by_name(stop):
    with pytest.raises(ValueError, match="stop holds"):
        stop_entries(stop)


def test_no_stop_is_none():
    assert stop_entries(None) == stop_entries([]) == []
