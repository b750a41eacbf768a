"""GGUF files: names, order of rows and decoded weights; damaged and foreign files."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.checkpoint import open_checkpoint
from sparing.checkpoint.gguf.file import open_gguf
from sparing.checkpoint.gguf.header import read_header
from sparing.checkpoint.tensors import MappedFile
from sparing.errors import CheckpointError
from tests.checkpoint.gguf_files import gguf_name, interleaved, random_blocks, write_gguf

LLAMA = {
    "context_length": 64,
    "embedding_length": 256,
    "block_count": 2,
    "feed_forward_length": 256,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": 64,
}
KINDS = [
    Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K,
    Kind.F16, Kind.BF16,
]  # fmt: skip


def llama_model(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    } | changes  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**settings))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    return model


def convert(model, kind=gguf.MODEL_ARCH.LLAMA, permute=True):
    """Tensors of a model under GGUF's names and in its order of rows."""
    config, result = model.config, {}
    for name, tensor in model.state_dict().items():
        if permute and ".q_proj." in name:
            tensor = interleaved(tensor, config.num_attention_heads)
        if permute and ".k_proj." in name:
            tensor = interleaved(tensor, config.num_key_value_heads)
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            result[gguf_name(kind, config.num_hidden_layers, name)] = tensor
    return result


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_a_llama_comes_back_under_its_own_names(tmp_path, changes):
    model = llama_model(**changes)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", "llama", LLAMA, convert(model)))
    tensors = checkpoint.files
    expected = model.state_dict()
    if changes.get("tie_word_embeddings"):
        del expected["lm_head.weight"]
    assert set(tensors.names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(tensors.read(name), tensor)
        assert tensors.shape(name) == tuple(tensor.shape)
    assert tensors.is_mapped("model.layers.0.mlp.up_proj.weight")
    assert not tensors.is_mapped("model.layers.0.self_attn.q_proj.weight")
    for key in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        assert checkpoint.config[key] == changes.get(key, False)


def test_transformers_reads_the_same_weights(tmp_path):
    from transformers import LlamaForCausalLM

    vocabulary = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [chr(97 + i) for i in range(26)] + [f"<{i}>" for i in range(14)],
        "tokenizer.ggml.merges": ["a b"],
    }
    tensors = convert(llama_model())
    blocks = random_blocks(256, 256, Kind.Q4_K)
    tensors["blk.0.attn_q.weight"] = (blocks, Kind.Q4_K)
    path = write_gguf(tmp_path / "m.gguf", "llama", LLAMA | vocabulary, tensors)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ours = open_gguf(path)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.files.read(name), tensor), name
    assert theirs.config.rms_norm_eps == pytest.approx(ours.config["rms_norm_eps"])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_quantisation_is_decoded_as_the_package_does(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("sparing.checkpoint.gguf.file.PIECE_BYTES", 4 * 256 * 7)  # seven rows at a time
    tensors = convert(llama_model())
    blocks = random_blocks(256, 256, kind)
    tensors["blk.1.ffn_down.weight"] = (blocks, kind)
    source = open_gguf(write_gguf(tmp_path / "m.gguf", "llama", LLAMA, tensors)).files
    name = "model.layers.1.mlp.down_proj.weight"
    assert source.dtype(name) == kind.name
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
    assert expected.isfinite().all()
    assert torch.equal(source.read(name).float(), expected)
    assert torch.equal(torch.cat(list(source.pieces(name))).float(), expected.reshape(-1))
    source.release(name)
    assert torch.equal(source.read(name).float(), expected)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_qwen_rows_are_not_reordered(tmp_path, architecture):
    import transformers

    name = architecture.capitalize()
    config = getattr(transformers, f"{name}Config")(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, head_dim=16, max_position_embeddings=64, rope_theta=1e6,
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    metadata = LLAMA | {
        "embedding_length": 64, "feed_forward_length": 96, "rope.freq_base": 1e6, "attention.key_length": 16,
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.dimension_count": 16,
    }  # fmt: skip
    kind = getattr(gguf.MODEL_ARCH, architecture.upper())
    path = write_gguf(tmp_path / "m.gguf", architecture, metadata, convert(model, kind, permute=False))
    checkpoint = open_gguf(path)
    assert set(checkpoint.files.names()) == set(model.state_dict())
    for tensor_name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.files.read(tensor_name), tensor)
    again = getattr(transformers, f"{name}Config")(**checkpoint.config)
    for key in ("hidden_size", "head_dim", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "vocab_size"):
        assert getattr(again, key) == getattr(config, key), key


def test_the_header_is_read_as_the_package_reads_it(tmp_path):
    metadata = LLAMA | {
        "general.name": "nämè", "tokenizer.ggml.tokens": ["a", "ä", ""], "tokenizer.ggml.scores": [0.5, -1.25, 0.0],
        "tokenizer.ggml.token_type": [1, 2, 3], "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip
    path = write_gguf(tmp_path / "m.gguf", "llama", metadata, convert(llama_model()))
    ours, stored = read_header(MappedFile(path))
    theirs = gguf.GGUFReader(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert ours[key] == pytest.approx(field.contents()) if "eps" in key else ours[key] == field.contents(), key
    assert [(t.name, t.kind, t.shape, t.start, t.nbytes) for t in stored] == [
        (t.name, t.tensor_type, tuple(t.shape[::-1].tolist()), t.data_offset, t.n_bytes) for t in theirs.tensors
    ]


def test_an_unsupported_architecture_lists_what_is_supported(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "falcon", LLAMA, {"token_embd.weight": torch.ones(2, 4)})
    with pytest.raises(
        CheckpointError, match="'falcon' is not supported; supported: llama, qwen2, qwen3, gemma3, gemma4"
    ):
        open_checkpoint(path)


def test_an_unknown_tensor_is_named(tmp_path):
    tensors = convert(llama_model()) | {"blk.0.attn_rot_embd.weight": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"unexpected tensor 'blk\.0\.attn_rot_embd\.weight' \[3\]"):
        open_gguf(write_gguf(tmp_path / "m.gguf", "llama", LLAMA, tensors))


def test_a_quantisation_that_cannot_be_decoded_is_named(tmp_path):
    tensors = convert(llama_model())
    tensors["blk.0.ffn_up.weight"] = (np.zeros((256, 256 // 256 * 292), np.uint8), Kind.Q8_K)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight: quantised as Q8_K.*use a file of"):
        open_gguf(write_gguf(tmp_path / "m.gguf", "llama", LLAMA, tensors))


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    metadata = LLAMA | {"embedding_length": 32, "attention.head_count": 2, "block_count": 1, "rope.dimension_count": 16}
    tensors = {"token_embd.weight": torch.ones(3, 32), "blk.0.attn_norm.weight": torch.ones(32)}
    tokens = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [1, 1, 1], "tokenizer.chat_template": "x",
    }  # fmt: skip
    return write_gguf(folder / "good.gguf", "llama", metadata | tokens, tensors).read_bytes(), folder / "bad.gguf"


def read_all(path, content: bytes) -> None:
    """Reads a file to the last tensor and builds its tokenizer, or is told why not."""
    path.write_bytes(content)
    try:
        checkpoint = open_gguf(path)
        for name in checkpoint.files.names():
            checkpoint.files.read(name)
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.encode("ab")
    except CheckpointError as error:
        reason = str(error)
    else:
        reason = ""
    assert reason.isprintable()


def test_the_file_that_is_damaged_below_is_good(small_file):
    content, path = small_file
    path.write_bytes(content)
    assert open_gguf(path).files.names() == ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"]
    assert open_gguf(path).tokenizer.encode("abba") == [2, 1, 0]


@settings(max_examples=300)
@given(position=st.integers(0, 2**20), value=st.integers(0, 255))
def test_any_byte_changed(small_file, position, value):
    content, path = small_file
    damaged = bytearray(content)
    damaged[position % len(content)] = value
    read_all(path, bytes(damaged))


@settings(max_examples=100)
@given(length=st.integers(0, 2**20))
def test_any_truncation(small_file, length):
    content, path = small_file
    read_all(path, content[: length % len(content)])


@settings(max_examples=200)
@given(position=st.integers(0, 2**20), value=st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]))
def test_any_absurd_count(small_file, position, value):
    content, path = small_file
    damaged = bytearray(content)
    at = position % (len(content) - 8)
    damaged[at : at + 8] = value.to_bytes(8, "little")
    read_all(path, bytes(damaged))


@settings(max_examples=100)
@given(content=st.binary(max_size=100))
def test_any_bytes(small_file, content):
    read_all(small_file[1], b"GGUF\x03\0\0\0" + content)
    read_all(small_file[1], content)


def split(folder, tensors, count=3, **changes):
    """A llama in that many pieces, as gguf-split writes them; changes: of the metadata of a piece, by its number."""
    names, metadata = list(tensors), {"split.count": count, "split.tensors.count": len(tensors)}
    paths = []
    for i in range(count):
        own = {name: tensors[name] for name in names[i::count]}
        own_metadata = (LLAMA if i == 0 else {}) | metadata | {"split.no": i} | changes.get(f"piece_{i}", {})
        paths.append(write_gguf(folder / f"m-{i + 1:05}-of-{count:05}.gguf", "llama", own_metadata, own))
    return paths


@pytest.mark.parametrize("given", [0, 2])
def test_pieces_are_one_model_whichever_is_given(tmp_path, given):
    model = llama_model()
    tensors = convert(model)
    blocks = random_blocks(256, 256, Kind.Q4_K)
    tensors["blk.1.ffn_down.weight"] = (blocks, Kind.Q4_K)
    paths = split(tmp_path, tensors)
    checkpoint = open_checkpoint(paths[given])
    assert checkpoint.path == paths[0]
    expected = model.state_dict() | {
        "model.layers.1.mlp.down_proj.weight": torch.from_numpy(gguf.quants.dequantize(blocks, Kind.Q4_K))
    }
    assert set(checkpoint.files.names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.files.read(name), tensor)
    assert open_checkpoint(tmp_path).path == paths[0]  # the only model of its folder


def test_pieces_that_are_missing_or_of_another_model(tmp_path):
    tensors = convert(llama_model())
    paths = split(tmp_path, tensors)
    paths[1].unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf: is missing, one of the 3 pieces of m-00001"):
        open_gguf(paths[0])
    split(tmp_path, tensors, piece_1={"split.no": 2})
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf: says that it is piece 2 \(from 0\) of 3"):
        open_gguf(paths[0])
    split(tmp_path, tensors, piece_0={"split.tensors.count": 9})
    with pytest.raises(CheckpointError, match=r"m-00001-of-00003\.gguf: its pieces hold \d+ tensors and not 9"):
        open_gguf(paths[2])
    split(tmp_path, tensors)
    renamed = paths[1].rename(tmp_path / "middle.gguf")
    with pytest.raises(CheckpointError, match=r"middle\.gguf: is one of 3 pieces and not named as one"):
        open_gguf(renamed)
    cut = paths[2].read_bytes()[:-1000]
    renamed.rename(paths[1])
    paths[2].write_bytes(cut)
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003\.gguf: .*truncated: download it again"):
        open_gguf(paths[0])


def test_a_folder_of_one_model(tmp_path):
    path = write_gguf(tmp_path / "m-Q4_K_M.gguf", "llama", LLAMA, convert(llama_model()))
    (tmp_path / "mmproj-m-f16.gguf").write_bytes(b"GGUF")  # of its images
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path).path == path
    (tmp_path / "m-Q8_0.gguf").write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"holds several GGUF models, give one of them: m-Q4_K_M\.gguf, m-Q8_0"):
        open_checkpoint(tmp_path)
