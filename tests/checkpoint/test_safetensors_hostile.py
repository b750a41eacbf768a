"""Damaged and malicious files: each is refused with a reason, and nothing but CheckpointError comes out."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.checkpoint.safetensors import BITS, SafetensorsFile
from sparing.checkpoint.tensors import TORCH_NAMES
from sparing.errors import CheckpointError

GOOD = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def pack(header: object, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(**changes: object) -> dict:
    return {"w": {**GOOD["w"], **changes}}


def bytes_entry(begin: int, end: int) -> dict:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


CASES = {
    "empty file": (b"", "0 bytes"),
    "short file": (b"\x01\x02", "2 bytes"),
    "absurd header length": (pack(GOOD, length=2**63), "header length"),
    "header past the end": (pack(GOOD, length=10_000), "truncated"),
    "no JSON": (pack(b"not json"), "not valid JSON"),
    "empty header": (pack(b""), "not valid JSON"),
    "not an object": (pack([1, 2]), "must be a JSON object"),
    "not UTF-8": (pack(b'{"\xff": 1}'), "not UTF-8"),
    "duplicate tensor": (
        pack(b'{"w":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"w":{"dtype":"U8","shape":[8]}}'),
        "w appears twice",
    ),
    "duplicate field": (
        pack(b'{"w":{"dtype":"U8","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
        "dtype appears twice",
    ),
    "deep nesting": (pack(b'{"w":' + b"[" * 100_000), "nested too deeply"),
    "a number of a million digits": (pack(b'{"w":' + b"1" * 1_000_000 + b"}"), "not valid JSON"),
    "NaN": (pack(b'{"w": NaN}'), "NaN is not JSON"),
    "missing field": (pack({"w": {"dtype": "F32", "shape": [2]}}), "exactly dtype, shape and data_offsets"),
    "extra field": (pack(entry(code="x")), "exactly dtype, shape and data_offsets"),
    "unknown dtype": (pack(entry(dtype="F33")), "unknown dtype F33"),
    "dtype no text": (pack(entry(dtype=["F32"])), "unknown dtype"),
    "negative size": (pack(entry(shape=[-2])), "sizes >= 0"),
    "fractional size": (pack(entry(shape=[2.0])), "sizes >= 0"),
    "boolean size": (pack(entry(shape=[True, 2])), "sizes >= 0"),
    "shape no list": (pack(entry(shape="2")), "sizes >= 0"),
    "too many sizes": (pack(entry(shape=[1] * 65)), "at most 64"),
    "size beyond int64": (pack(entry(shape=[0, 2**63], data_offsets=[0, 0]), b""), "sizes >= 0"),
    "strides beyond int64": (pack(entry(shape=[0, 2**40, 2**40], data_offsets=[0, 0]), b""), "too large"),
    "size does not fit dtype": (pack(entry(shape=[3])), r"takes 12 bytes, data_offsets span 8"),
    "half a byte": (pack(entry(dtype="F4", shape=[3], data_offsets=[0, 2]), bytes(2)), r"takes 1\.5 bytes"),
    "offsets reversed": (pack(entry(data_offsets=[8, 0])), "0 <= begin <= end"),
    "offsets negative": (pack(entry(data_offsets=[-8, 0])), "0 <= begin <= end"),
    "three offsets": (pack(entry(data_offsets=[0, 4, 8])), "0 <= begin <= end"),
    "data past the end": (pack(GOOD, bytes(7)), "truncated or its header wrong"),
    "bytes left over": (pack(GOOD, bytes(9)), "1 bytes after the last tensor"),
    "gap at the start": (pack(entry(data_offsets=[4, 12]), bytes(12)), "leaves a gap after the header"),
    "overlap": (
        pack({"a": bytes_entry(0, 6), "b": bytes_entry(4, 8)}),
        "b starts at byte .* and overlaps a",
    ),
    "metadata no object": (pack({"__metadata__": [1], **GOOD}), "__metadata__ must map text to text"),
    "metadata with numbers": (pack({"__metadata__": {"a": 1}, **GOOD}), "__metadata__ must map text to text"),
    "escape codes in a name": (pack({"\x1b[2J": GOOD["w"]}), "printable characters"),
    "half a surrogate in a name": (pack(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), "printable"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "reason"), CASES.values(), ids=CASES.keys())
def test_refused_with_a_reason(tmp_path, content, reason):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        SafetensorsFile(path)
    message = str(caught.value)
    assert str(path) in message
    assert message.isprintable()
    assert len(message) < 600


def test_the_case_all_others_are_made_from_is_good(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack(GOOD))
    assert SafetensorsFile(path).read("w").tolist() == [0.0, 0.0]


def test_a_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        SafetensorsFile(tmp_path)


def read_all(path, content: bytes) -> None:
    """Reads a file to the last tensor, or is told why not."""
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    for name in file.names():
        if file.dtype(name) in TORCH_NAMES:
            assert tuple(file.read(name).shape) == file.shape(name)
        else:
            with pytest.raises(CheckpointError, match="cannot be read as a tensor"):
                file.read(name)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


@settings(max_examples=200)
@given(content=st.binary(max_size=200))
def test_any_bytes(scratch, content):
    read_all(scratch, content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
near_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(list(BITS)) | json_values,
        "shape": st.lists(st.integers(0, 4), max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2) | json_values,
    }
)


@settings(max_examples=300)
@given(header=st.dictionaries(st.text(max_size=4), near_entries | json_values, max_size=3), data=st.binary(max_size=40))
def test_any_header(scratch, header, data):
    read_all(scratch, pack(header, data))


@settings(max_examples=200)
@given(position=st.integers(0, 200), value=st.integers(0, 255))
def test_any_byte_changed(scratch, position, value):
    tensors = {"a": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}, "b": bytes_entry(8, 11)}
    content = bytearray(pack(tensors, bytes(11)))
    content[position % len(content)] = value
    read_all(scratch, bytes(content))
