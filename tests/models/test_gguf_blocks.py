"""Models of GGUF files: blocks stay as they lie in the file, plans say so, and outputs are those of their numbers."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

import sparing
from sparing.checkpoint.gguf.file import open_gguf
from sparing.config.formats import BLOCKS
from sparing.kernels import dispatch
from sparing.weights.blocks import BlockWeight
from sparing.weights.weight import PackedWeight
from tests.checkpoint.gguf_files import write_gguf
from tests.checkpoint.test_gguf import LLAMA, convert, llama_model
from tests.checkpoint.test_gguf_config import GEMMA4, gemma4_file, gemma4_model
from tests.kernel_sets import using
from tests.weights.test_blocks import blocks

TOKENS = torch.arange(12)
MAPS = Path("/proc/self/maps")


def in_blocks(kind, seed=0):
    """What a matrix becomes in a file: blocks of about its numbers' size, where its rows are made of whole ones."""
    block = BLOCKS[kind][0]

    def held(name, tensor):
        nonlocal seed
        if tensor.ndim < 2 or tensor.shape[-1] % block or "ffn_gate_inp" in name:
            return tensor
        seed += 1
        raw = blocks(kind, tensor.numel() // tensor.shape[-1], tensor.shape[-1], seed)
        numbers = gguf.quants.dequantize(raw, Kind[kind.upper()]).astype(np.float32)
        for at in range(0, BLOCKS[kind][1] if kind in ("f16", "bf16") else 0, 2):
            raw.reshape(-1, 2)[:, at + 1] &= 0xBF  # small
        assert np.isfinite(numbers).all()
        return raw.reshape(*tensor.shape[:-1], -1), Kind[kind.upper()]

    return held


def llama_file(path, kind, tied=True, **changes):
    tensors = convert(llama_model(tie_word_embeddings=tied, **changes))
    held = in_blocks(kind)
    return write_gguf(path, "llama", LLAMA, {name: held(name, tensor) for name, tensor in tensors.items()})


def dense(model):
    """The same model with numbers in place of its weights."""
    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, PackedWeight):
                delattr(module, name)
                module.register_parameter(name, torch.nn.Parameter(part.dequantize(), requires_grad=False))
    return model


def close(ours, theirs, within=2e-3):
    # random blocks make activations of all sizes, so sums differ by more than a rounding of the result
    return torch.allclose(ours, theirs, atol=within * theirs.abs().max().item(), rtol=0)


def held_bytes(model):
    return sum(part.nbytes for _, role, _, part in model.parts() if role is not None and role.kind is not None)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_a_llama_stays_in_its_blocks(tmp_path, kind, tied):
    path = llama_file(tmp_path / "m.gguf", kind, tied)
    model = sparing.load(path, device="cpu")
    packed = [part for part in model.modules() if isinstance(part, PackedWeight)]
    assert len(packed) == (15 if tied else 16) and {part.format for part in packed} == {kind}
    assert held_bytes(model) == sparing.plan(path, context=8).weight_bytes <= path.stat().st_size
    for name in ("self_attn.q_proj", "self_attn.o_proj"):  # of which the first has its rows in another order
        numbers = open_gguf(path).files.read(f"model.layers.0.{name}.weight").float()
        assert torch.equal(model.get_submodule(f"model.layers.0.{name}.weight").dequantize(), numbers)
    ours = model.logits(TOKENS[:3]), model.logits(TOKENS)  # few rows, and many
    plain = dense(sparing.load(path, device="cpu"))
    assert plain.logits(TOKENS).isfinite().all()
    assert close(ours[0], plain.logits(TOKENS[:3])) and close(ours[1], plain.logits(TOKENS))


def test_few_rows_and_many_say_the_same(tmp_path):
    model = sparing.load(llama_file(tmp_path / "m.gguf", "q4_1"), device="cpu")
    memory = model.memory()
    steps = torch.cat([model.logits(token[None], memory) for token in TOKENS])
    assert close(steps, model.logits(TOKENS))


@pytest.mark.skipif(not MAPS.exists(), reason="needs Linux to say what is mapped where")
def test_blocks_lie_in_the_file(tmp_path):
    """Nothing is copied but rows that have another order, so a loaded model is as large as its file."""
    path = llama_file(tmp_path / "m.gguf", "q6_k")
    model = sparing.load(path, device="cpu")
    lines = [line.split()[0] for line in MAPS.read_text().splitlines() if line.endswith(path.name)]
    ranges = [range(*(int(end, 16) for end in line.split("-"))) for line in lines]
    for name, part in model.named_modules():
        if isinstance(part, BlockWeight):
            is_view = any(part.codes.data_ptr() in own for own in ranges)
            assert is_view != name.endswith(("q_proj.weight", "k_proj.weight")), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["q4_k", "f16", "bf16"])
def test_in_another_type(tmp_path, kind, dtype):
    """What has that type already is plain there."""
    path = llama_file(tmp_path / "m.gguf", kind)
    model = sparing.load(path, dtype=dtype, device="cpu")
    is_plain = (kind, dtype) in {("f16", "float16"), ("bf16", "bfloat16")}
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, BlockWeight) != is_plain
    assert model.dtype == getattr(torch, dtype)
    assert model.model.embed_tokens(TOKENS).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_packed_anew(tmp_path, weights):
    """From the numbers of the file; what is planned for it is what it holds."""
    path = llama_file(tmp_path / "m.gguf", "q5_k", tied=False)
    model = sparing.load(path, weights=weights, device="cpu")
    assert not any(isinstance(part, BlockWeight) for part in model.modules())
    assert held_bytes(model) == sparing.plan(path, context=8, weights=weights).weight_bytes


@pytest.mark.parametrize("split_experts", [True, False])
@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "bf16"])
@pytest.mark.parametrize("variant", sorted(GEMMA4))
def test_a_gemma_4_stays_in_its_blocks(tmp_path, variant, kind, split_experts):
    changes = GEMMA4[variant] | {"intermediate_size": 64}
    changes |= {"moe_intermediate_size": 32} if "moe_intermediate_size" in changes else {}
    path = gemma4_file(tmp_path / "m.gguf", *gemma4_model(changes), split_experts, in_blocks(kind))
    model = sparing.load(path, device="cpu")
    assert held_bytes(model) == sparing.plan(path, context=8).weight_bytes <= path.stat().st_size
    formats = {name: part.format for name, part in model.named_modules() if isinstance(part, PackedWeight)}
    assert set(formats.values()) == {kind} and "model.embed_tokens.weight" in formats
    if variant == "experts":
        assert "model.layers.0.experts.gate_up_proj" in formats
    if variant == "shared":
        assert "model.embed_tokens_per_layer.weight" in formats
    plain = dense(sparing.load(path, device="cpu"))
    assert close(model.logits(TOKENS), plain.logits(TOKENS)) and close(
        model.logits(TOKENS[:3]), plain.logits(TOKENS[:3])
    )


def test_a_damaged_scale_is_named(tmp_path):
    path = llama_file(tmp_path / "m.gguf", "q4_1")
    source = open_gguf(path).files
    at = source._parts["model.layers.1.mlp.up_proj.weight"][0].start
    content = bytearray(path.read_bytes())
    content[at + 1] = 0x7C  # infinity
    path.write_bytes(content)
    for used in ("reference", dispatch.available()[-1]):
        with (
            using(used),
            pytest.raises(sparing.CheckpointError, match=r"m\.gguf: model\.layers\.1\.mlp\.up_proj\.weig"),
        ):
            sparing.load(path, device="cpu")
