"""Tokenizers of folders against transformers, and their special tokens."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, normalizers, processors
from tokenizers.models import BPE

from sparing.checkpoint import open_checkpoint, write_json
from sparing.checkpoint.tokenizer import Tokenizer, read_tokenizer
from sparing.decoding.tokenizer import MAX_HELD, TextStream
from sparing.errors import CheckpointError
from tests.checkpoint.tokenizer_files import SENTENCES, SPECIAL, texts, trained, write_folder


@pytest.fixture(scope="module")
def byte_level():
    return Tokenizer(trained(), bos_id=2, eos_ids=(1,), pad_id=0)


@pytest.fixture(scope="module")
def byte_fallback():
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "é", "▁a", "ab"]
    merges = [("▁", "a"), ("a", "b")]
    backend = Backend(
        BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(backend)


@pytest.fixture(scope="module", params=["byte_level", "byte_fallback"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_a_folder_is_read_as_transformers_reads_it(tmp_path):
    from transformers import AutoTokenizer

    folder = write_folder(tmp_path, tokenizer_class="PreTrainedTokenizerFast")
    ours, theirs = read_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in SENTENCES:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.eos_ids, ours.pad_id) == (
        theirs.bos_token_id,
        (theirs.eos_token_id,),
        theirs.pad_token_id,
    )
    assert ours.vocab_size == len(theirs)
    assert ours.token_to_id("<|turn>") == 3
    assert ours.id_to_token(3) == "<|turn>"
    assert ours.token_to_id("never seen") is None
    assert ours.id_to_token(10**6) is None
    assert ours.special_ids == frozenset(range(len(SPECIAL)))


def test_ends_of_text_come_from_the_model_first(tmp_path):
    folder = write_folder(tmp_path)
    write_json(folder / "config.json", {"eos_token_id": 3})
    assert open_checkpoint(folder).tokenizer.eos_ids == (3,)
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 4]})
    assert open_checkpoint(folder).tokenizer.eos_ids == (1, 4)
    write_json(folder / "config.json", {"text_config": {"eos_token_id": 4}})
    (folder / "generation_config.json").unlink()
    assert open_checkpoint(folder).tokenizer.eos_ids == (4,)


def test_an_end_of_text_that_the_tokenizer_names_is_known_beside_the_models(tmp_path):
    folder = write_folder(tmp_path)
    write_json(folder / "config.json", {"eos_token_id": 3})
    tokenizer = open_checkpoint(folder).tokenizer
    assert (tokenizer.eos_ids, tokenizer.eos_id) == ((3,), 1)
    for none in (-1, [-1]):
        write_json(folder / "config.json", {"eos_token_id": none})
        assert open_checkpoint(folder).eos_ids == ()
        assert open_checkpoint(folder).tokenizer.eos_ids == (1,)


def test_there_is_never_a_second_beginning(tmp_path):
    folder = write_folder(tmp_path, chat_template="{{ bos_token }}{{ messages[0].content }}")
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = read_tokenizer(folder)
    once = tokenizer.encode("abc")
    assert once[0] == 2
    assert tokenizer.encode("<bos>abc") == once
    assert tokenizer.encode_chat([{"role": "user", "content": "abc"}]) == once
    assert tokenizer.encode("abc", add_special_tokens=False) == once[1:]


def test_truncation_and_padding_left_from_training_are_dropped(tmp_path):
    folder = write_folder(tmp_path)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(folder / "tokenizer.json"))
    assert read_tokenizer(folder).encode(SENTENCES[0]) == Tokenizer(trained()).encode(SENTENCES[0])


def chat(folder):
    return open_checkpoint(folder).tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_chat_templates_are_found_in_their_places(tmp_path):
    folder = write_folder(tmp_path)
    write_json(folder / "config.json", {})
    with pytest.raises(CheckpointError, match="no chat template; give the prompt as plain text"):
        chat(folder)
    write_folder(tmp_path, chat_template="from config")
    assert chat(folder) == "from config"
    named = [{"name": "default", "template": "named"}, {"name": "tool_use", "template": "tools"}]
    write_folder(tmp_path, chat_template=named)
    assert chat(folder) == "named"
    tokenizer = open_checkpoint(folder).tokenizer
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tools=[{"name": "f"}]) == "tools"
    (folder / "chat_template.jinja").write_text("from file {{ eos_token }}")
    assert chat(folder) == "from file <eos>"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools from file")
    tokenizer = open_checkpoint(folder).tokenizer
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tools=[{"name": "f"}]) == "tools from file"


def test_names_of_special_tokens_never_hide_the_messages(tmp_path):
    names = {"messages": "<m>", "tools": "<t>", "image": "<|turn>"}
    folder = write_folder(tmp_path, chat_template="{{ image }}{{ messages[0].content }}", extra_special_tokens=names)
    messages = [{"role": "user", "content": "x"}]
    assert read_tokenizer(folder).apply_chat_template(messages) == "<|turn>x"
    assert read_tokenizer(folder).apply_chat_template(messages, image="y") == "yx"


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    write_json(tmp_path / "config.json", {})
    assert open_checkpoint(tmp_path).tokenizer is None


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json: cannot be read"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: not valid JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: must be a JSON object"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template must be a text"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "chat_template must be a text"),
        ("special_tokens_map.json", "nope", r"special_tokens_map\.json: not valid JSON"),
        ("chat_template.jinja", "\xff", r"chat_template\.jinja: cannot be read as UTF-8"),
        ("generation_config.json", '{"eos_token_id": "<eos>"}', "eos_token_id '<eos>' is not an id"),
    ],
)
def test_damaged_files_are_named(tmp_path, file, content, reason):
    folder = write_folder(tmp_path)
    write_json(folder / "config.json", {})
    (folder / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(folder).tokenizer  # noqa: B018


TEMPLATE = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
PATTERN = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
PREFIXED = {"type": "BPE", "continuing_subword_prefix": "#########", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}
BROKEN = {
    "post_processor": [
        TEMPLATE | {"single": [{"SpecialToken": {"id": "zz", "type_id": 0}}]},
        TEMPLATE | {"single": [{"Sequence": {"id": "B", "type_id": 0}}]},
    ],
    "pre_tokenizer": [{"type": "FixedLength", "length": 0}, PATTERN],
    "normalizer": [
        {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    ],
    "decoder": [{"type": "Strip", "content": "e", "start": 2, "stop": 2}],
    "model": [PREFIXED, [], None],
    "added_tokens": [[{"id": -1, "content": "a"}], [{"id": 2**32, "content": "a"}], {"a": 1}],
}


@pytest.mark.parametrize(("part", "value"), [(part, value) for part, values in BROKEN.items() for value in values])
def test_a_tokenizer_that_is_wrong_inside_never_panics(tmp_path, part, value, capfd):
    folder = write_folder(tmp_path)
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if part == "post_processor" and stored[part] is None:
        stored[part] = {"type": "Sequence", "processors": [value]}
    else:
        stored[part] = value
    write_json(folder / "tokenizer.json", stored)
    with pytest.raises(CheckpointError, match=r"tokenizer"):  # noqa: PT012
        tokenizer = read_tokenizer(folder)
        tokenizer.decode(tokenizer.encode("once upon a time"))
        tokenizer.decode([tokenizer.token_to_id("e")])
    if part == "post_processor":
        assert capfd.readouterr().err == ""


@pytest.mark.parametrize("text", ["\ud800", "a\udcffb", b"bytes", 5, None])
def test_what_is_not_text_is_refused(byte_level, text):
    with pytest.raises(ValueError, match="give a str without surrogates"):
        byte_level.encode(text)


@pytest.mark.parametrize("ids", [[-1], [2**40], [None], [1.5], ["a"]])
def test_what_are_not_ids_is_refused(byte_level, ids):
    with pytest.raises(ValueError, match="are not token ids: give whole numbers"):
        byte_level.decode(ids)


def stream(tokenizer, ids, **options) -> list[str]:
    text_stream = TextStream(tokenizer, **options)
    return [*(text_stream.push([token_id]) for token_id in ids), text_stream.flush()]


@given(text=texts)
def test_a_stream_gives_the_text_without_half_characters(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(text=texts, cuts=st.lists(st.integers(0, 30)))
def test_how_the_ids_arrive_does_not_matter(tokenizer, text, cuts):
    ids = tokenizer.encode(text)
    text_stream, shown = TextStream(tokenizer), ""
    edges = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    for begin, end in pairwise(edges):
        shown += text_stream.push(ids[begin:end])
    assert shown + text_stream.flush() == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, 599), max_size=MAX_HELD - 1))
def test_any_ids_stream_to_what_they_decode_to(byte_level, ids):
    assert "".join(stream(byte_level, ids)) == byte_level.decode(ids)
    whole = byte_level.decode(ids, skip_special_tokens=False)
    assert "".join(stream(byte_level, ids, skip_special_tokens=False)) == whole


@given(text=texts, cut=st.integers(0, 60))
def test_a_continuation_is_what_the_whole_text_has_more(tokenizer, text, cut):
    ids = tokenizer.encode(text)
    before, after = ids[:cut], ids[cut:]
    first, whole = tokenizer.decode(before), tokenizer.decode(ids)
    if whole.startswith(first):  # it is not where a cut goes through a character
        assert "".join(stream(tokenizer, after, after=before)) == whole[len(first) :]


def test_a_continuation_begins_with_the_blank_that_its_token_has(byte_fallback):
    blank_a, b = byte_fallback.token_to_id("▁a"), byte_fallback.token_to_id("b")
    assert stream(byte_fallback, [blank_a, b], after=[b])[0] == " a"
    assert stream(byte_fallback, [blank_a, b])[0] == "a"
    assert "".join(stream(byte_fallback, [blank_a], after=[b] * 500)) == " a"


def test_a_continuation_can_finish_a_character(byte_fallback):
    ids = byte_fallback.encode("a🙂")
    assert "".join(stream(byte_fallback, ids[-1:], after=ids[:-1])) == "🙂"


def test_tokens_that_do_not_show_are_not_a_beginning(byte_level):
    assert "".join(stream(byte_level, byte_level.encode("ab"), after=[2] * 500)) == "ab"


def test_a_character_of_several_tokens_appears_at_once(byte_fallback):
    ids = byte_fallback.encode("a🙂b")
    pieces = [piece for piece in stream(byte_fallback, ids) if piece]
    assert pieces == ["a", "🙂", "b"]


def test_an_unfinished_character_is_shown_as_such_at_the_end(byte_fallback):
    ids = byte_fallback.encode("a🙂")[:-1]
    pieces = stream(byte_fallback, ids)
    assert "".join(pieces[:-1]) == "a"
    assert set(pieces[-1]) == {"\ufffd"}


def test_endless_nonsense_is_shown_sooner_or_later(byte_fallback):
    nonsense = [byte_fallback.token_to_id("<0xFF>")] * 500
    text_stream = TextStream(byte_fallback)
    shown = "".join(text_stream.push([token_id]) for token_id in nonsense)
    assert len(shown) >= 500 - MAX_HELD
