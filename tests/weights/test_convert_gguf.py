"""A GGUF file as the source: the folder that comes out is one that anybody reads, with the numbers of the file."""

import json
import shutil

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

import sparing
from sparing.checkpoint import open_checkpoint
from sparing.config.formats import FORMATS
from sparing.weights.convert import quantize
from sparing.weights.stored import stored_weights
from tests.checkpoint.gguf_files import random_blocks, write_gguf
from tests.checkpoint.test_gguf import LLAMA, convert, llama_model
from tests.checkpoint.test_gguf_config import GEMMA4, gemma3_file, gemma3_model, gemma4_file, gemma4_model
from tests.checkpoint.test_gguf_tokenizer import metadata
from tests.checkpoint.tokenizer_files import CORNERS, SENTENCES

TOKENS = torch.arange(12)
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
TURN = [{"role": "user", "content": "the king"}]


def tokenizer_metadata():
    return metadata(pre="smollm", add_bos_token=True) | {"tokenizer.chat_template": TEMPLATE}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A llama with blocks of several kinds, norms in float32, a tokenizer, and ends of turns."""
    words = tokenizer_metadata()
    size = len(words["tokenizer.ggml.tokens"])
    tensors = convert(llama_model(vocab_size=size, tie_word_embeddings=True))
    tensors["token_embd.weight"] = (random_blocks(size, 256, Kind.Q8_0), Kind.Q8_0)
    tensors["blk.0.attn_q.weight"] = (random_blocks(256, 256, Kind.Q4_1, 1), Kind.Q4_1)
    tensors["blk.1.ffn_up.weight"] = (random_blocks(256, 256, Kind.Q6_K, 2), Kind.Q6_K)
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", "llama", LLAMA | words, tensors)


def same_matrices(stored, packed) -> bool:
    """All but the table: it is bfloat16 in the folder, and packed from the file's numbers where that is asked for."""
    theirs = dict(packed.named_buffers())
    return all(torch.equal(b, theirs[n]) for n, b in stored.named_buffers() if "embed_tokens." not in n)


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_the_folder_is_what_loading_the_file_packs(file, tmp_path, format):
    """Packed from the numbers of the file, not from their bfloat16; loaded in the type it states."""
    errors = quantize(file, tmp_path / "out", format, scales="max" if format == "nvfp4" else None)
    stored = sparing.load(tmp_path / "out")
    assert stored.dtype == torch.bfloat16 and len(errors) == 14
    packed = sparing.load(file, weights=format, dtype="bfloat16")
    if format != "nvfp4":  # of which some matrices share a scale in the file
        assert same_matrices(stored, packed)
    plain = stored_weights(open_checkpoint(tmp_path / "out"))
    embeddings = stored_weights(open_checkpoint(file)).read("model.embed_tokens.weight")
    assert torch.equal(plain.read("model.embed_tokens.weight"), embeddings.bfloat16())
    assert plain.dtype("model.norm.weight") == "F32"


def test_its_tokenizer_and_settings_become_files(file, tmp_path):
    quantize(file, tmp_path / "out", "int8")
    ours, theirs = open_checkpoint(tmp_path / "out"), open_checkpoint(file)
    assert ours.generation_config == theirs.generation_config
    assert ours.eos_ids == theirs.eos_ids != ()
    for key, value in theirs.config.items():
        assert ours.config[key] == value
    a, b = ours.tokenizer, theirs.tokenizer
    assert (a.bos_id, a.pad_id, a.eos_ids, a.special_ids) == (b.bos_id, b.pad_id, b.eos_ids, b.special_ids)
    for text in CORNERS + SENTENCES:
        ids = b.encode(text)
        assert a.encode(text) == ids and a.decode(ids) == b.decode(ids)
    assert a.encode_chat(TURN) == b.encode_chat(TURN)


def test_transformers_reads_the_folder(file, tmp_path):
    from transformers import AutoConfig, AutoTokenizer, CompressedTensorsConfig, LlamaForCausalLM

    quantize(file, tmp_path / "out", "int4")
    ours = sparing.load(tmp_path / "out", dtype="float32")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.architectures, config.dtype) == (["LlamaForCausalLM"], torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in CORNERS + SENTENCES:
        assert tokenizer.encode(text) == ours.tokenizer.encode(text)
    assert tokenizer.apply_chat_template(TURN, tokenize=False) == ours.tokenizer.apply_chat_template(TURN)
    options = CompressedTensorsConfig(dequantize=True)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=options)
    logits = theirs(TOKENS[None]).logits[0]  # of weights that were rounded to bfloat16 when they were dequantised
    torch.testing.assert_close(ours.logits(TOKENS), logits, atol=2e-2 * logits.abs().max().item(), rtol=0)


@pytest.mark.parametrize("variant", sorted(GEMMA4))
def test_a_gemma_4_with_all_its_parts(tmp_path, variant):
    path = gemma4_file(tmp_path / "m.gguf", *gemma4_model(GEMMA4[variant]), split_experts=True)
    errors = quantize(path, tmp_path / "out", "int8")
    assert "model.layers.0.mlp.up_proj.weight" in errors
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["Gemma4ForCausalLM"]
    stored, packed = sparing.load(tmp_path / "out"), sparing.load(path, weights="int8")
    assert same_matrices(stored, packed)
    assert stored.tokenizer is None and not (tmp_path / "out" / "tokenizer.json").exists()


def test_norms_of_gemma_3_are_written_as_its_folders_hold_them(tmp_path):
    model, settings = gemma3_model({})
    path = gemma3_file(tmp_path / "m.gguf", model, settings, {})
    quantize(path, tmp_path / "out", "int8")
    stored, packed = sparing.load(tmp_path / "out", dtype="float32"), sparing.load(path, weights="int8")
    assert same_matrices(stored, packed)
    plain = stored_weights(open_checkpoint(tmp_path / "out"))
    for name in ("model.norm.weight", "model.layers.1.self_attn.q_norm.weight"):
        torch.testing.assert_close(plain.read(name), model.state_dict()[name], rtol=0, atol=2e-7)


def test_a_float16_file_stays_float16(tmp_path):
    tensors = convert(llama_model(tie_word_embeddings=True))
    half = {n: (t.half().numpy(), Kind.F16) if t.ndim > 1 else t for n, t in tensors.items()}
    path = write_gguf(tmp_path / "m.gguf", "llama", LLAMA, half)
    quantize(path, tmp_path / "out", "int8")
    assert open_checkpoint(tmp_path / "out").config["dtype"] == "float16"
    ours, theirs = (
        stored_weights(open_checkpoint(p)).read("model.embed_tokens.weight") for p in (tmp_path / "out", path)
    )
    assert ours.dtype == torch.float16 and torch.equal(ours, theirs)


def test_another_file_of_the_same_sizes_is_told_from_this_one(file, tmp_path):
    quantize(file, tmp_path / "out", "int8")
    shutil.copy(file, tmp_path / "copy.gguf")
    quantize(tmp_path / "copy.gguf", tmp_path / "out", "int8")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    (tmp_path / "other.gguf").write_bytes(content)
    with pytest.raises(sparing.CheckpointError, match="holds a quantisation of another source"):
        quantize(tmp_path / "other.gguf", tmp_path / "out", "int8")
