"""Where a row's text ends and when it is shown, against the plain reading of its pieces."""

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from sparing.checkpoint.tokenizer import Tokenizer
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
