"""DiffusionGemma's two modes against transformers, on a tiny random model loaded from a saved checkpoint."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DynamicCache

from sparing.kernels import entropy
from sparing.models.batch import Row
from sparing.models.diffusion_gemma import CanvasRow
from tests.conformance.reference import assert_same, load, multiply_as_torch_does, reload, rewrite, save_random
from tests.tiny import CONFIGS, FULL, SLIDING, VISION, VOCAB, WINDOW, denoiser_scale, random_ids

CANVAS = 8
TOLERANCE = 2e-4  # on logits of standard deviation 2
TEXT = CONFIGS["denoiser"]["text_config"] | {
    "num_hidden_layers": 4,
    "layer_types": [SLIDING, FULL] * 2,
    "global_head_dim": 16,
    "moe_intermediate_size": 16,  # the experts' product of the reference wants rows of a multiple of 16 bytes
    "use_bidirectional_attention": "vision",
}
IMAGE, TEXT_IDS = VOCAB - 1, VOCAB - 3  # the last three ids stand for images


def save_denoiser(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32):
    config = DiffusionGemmaConfig(
        text_config=TEXT,
        vision_config=VISION,
        canvas_length=CANVAS,
        image_token_id=IMAGE,
        boi_token_id=IMAGE - 1,
        eoi_token_id=IMAGE - 2,
    )
    return save_random(DiffusionGemmaForBlockDiffusion, config, folder, seed, dtype=dtype, scale=denoiser_scale)


@cache
def pair():
    """(the reference, our model loaded from its checkpoint)"""
    with TemporaryDirectory() as folder:
        return save_denoiser(Path(folder)), load(Path(folder))


@torch.no_grad()
def encode(theirs, *pieces):
    """The reference's cache after encoding token lists one after the other, and its last hidden states."""
    past, hidden = DynamicCache(config=theirs.config.get_text_config(decoder=True)), []
    for piece in pieces:
        positions = torch.arange(past.get_seq_length(), past.get_seq_length() + len(piece))[None]
        output = theirs.model.encoder(input_ids=piece[None], past_key_values=past, position_ids=positions)
        past, hidden = output.past_key_values, [*hidden, output.last_hidden_state[0]]
    return past, torch.cat(hidden)


@torch.no_grad()
def denoise(theirs, past, canvas, soft=None):
    soft = None if soft is None else soft[None]
    return theirs(decoder_input_ids=canvas[None], past_key_values=past, self_conditioning_logits=soft).logits[0]


def test_layer_scalars_of_both_modes_differ():
    scalars = pair()[1].state_dict()
    name = "layers.0.layer_scalar"
    assert scalars[f"model.decoder.{name}"] != scalars[f"model.encoder.language_model.{name}"]


@pytest.mark.parametrize("length", [3, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW])
def test_encoding_and_denoising(length):
    theirs, ours = pair()
    prompt, canvas = random_ids(length), random_ids(CANVAS, seed=2)
    past, hidden = encode(theirs, prompt)
    memory = ours.memory()
    assert_same(ours.run([Row(prompt, memory)]), hidden, TOLERANCE)
    memory.commit(length)

    before = memory.entries(0).clone()
    expected, soft = denoise(theirs, past, canvas), None
    for step in range(3):
        logits = ours.denoise(canvas, memory, soft)
        assert_same(logits, expected, TOLERANCE)
        soft = expected / (0.8 - 0.1 * step)
        canvas = random_ids(CANVAS, seed=3 + step)
        expected = denoise(theirs, past, canvas, soft)
    assert memory.length == length
    assert memory.staged == 0
    assert torch.equal(memory.entries(0), before)


@pytest.mark.parametrize("length", [2, WINDOW, WINDOW + 3])
def test_after_committed_canvases(length):
    """Cached, the reference re-encoding everything, and ours re-encoding everything: one result."""
    theirs, ours = pair()
    pieces = [random_ids(length), random_ids(CANVAS, seed=2), random_ids(CANVAS, seed=3)]
    canvas, soft = random_ids(CANVAS, seed=4), random_ids(CANVAS * VOCAB, seed=5).view(CANVAS, VOCAB) / 20
    memory = ours.memory()
    for n, piece in enumerate(pieces):
        ours.logits(piece, memory)
        stepwise, _ = encode(theirs, *pieces[: n + 1])
        at_once, _ = encode(theirs, torch.cat(pieces[: n + 1]))
        fresh = ours.memory()
        ours.logits(torch.cat(pieces[: n + 1]), fresh)
        logits = ours.denoise(canvas, memory, soft)
        assert_same(logits, denoise(theirs, stepwise, canvas, soft), TOLERANCE)
        assert_same(logits, denoise(theirs, at_once, canvas, soft), TOLERANCE)
        assert_same(logits, ours.denoise(canvas, fresh, soft), TOLERANCE)


def test_rows_with_and_without_self_conditioning():
    """A batch padded on the left with a self-conditioning gate per row; for us, rows of which some have no signal."""
    theirs, ours = pair()
    prompts = [random_ids(length, seed=length) for length in (11, 4, 7)]
    canvases = [random_ids(CANVAS, seed=20 + i) for i in range(3)]
    soft = torch.randn(3, CANVAS, VOCAB, generator=torch.Generator().manual_seed(6)) * 2
    gate = torch.tensor([True, False, True])
    padded, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        padded[i, 11 - len(prompt) :], mask[i, 11 - len(prompt) :] = prompt, True
    with torch.no_grad():
        past = theirs.model.encoder(input_ids=padded, attention_mask=mask).past_key_values
        expected = theirs(
            decoder_input_ids=torch.stack(canvases),
            past_key_values=past,
            self_conditioning_logits=soft,
            self_conditioning_mask=gate,
            decoder_attention_mask=torch.nn.functional.pad(mask, (0, CANVAS), value=True),
        ).logits

    memories = [ours.memory() for _ in prompts]
    ours.run([Row(prompt, memory, wanted=0) for prompt, memory in zip(prompts, memories, strict=True)])
    for prompt, memory in zip(prompts, memories, strict=True):
        memory.commit(len(prompt))
    for i in range(3):
        logits = ours.denoise(canvases[i], memories[i], soft[i] if gate[i] else None)
        assert_same(logits, expected[i], TOLERANCE)

    # The pass over the vocabulary says of these logits what it should, all rows in one batch.
    temperature = 0.6
    z = expected.flatten(0, 1) / temperature
    signal = [ours.soft_embedding(s) if g else None for s, g in zip(soft, gate, strict=True)]
    rows = [CanvasRow(c, memory, soft=s) for c, memory, s in zip(canvases, memories, signal, strict=True)]
    result = ours.predict(ours.run(rows), torch.full((3 * CANVAS,), temperature))
    for memory in memories:
        memory.rollback()
    assert torch.equal(result.argmax, z.argmax(-1))
    assert torch.equal(result.sample, result.argmax)
    assert_same(result.entropy, entropy(z), TOLERANCE)
    assert_same(result.soft, torch.softmax(z, -1) @ theirs.lm_head.weight.detach(), TOLERANCE)
    assert [memory.length for memory in memories] == [11, 4, 7]


def test_what_a_canvas_sees():
    """Every canvas position depends on every other, on old text beyond the window, and changes nothing it read."""
    _, ours = pair()
    prompt, canvas = random_ids(3 * WINDOW, vocab_size=TEXT_IDS), random_ids(CANVAS, seed=2)
    memory = ours.memory()
    ours.logits(prompt, memory)
    logits = ours.denoise(canvas, memory)
    for position in (0, CANVAS - 1):
        other = canvas.clone()
        other[position] = (other[position] + 1) % VOCAB
        assert ((ours.denoise(other, memory) - logits).abs().amax(-1) > 1e-4).all()
    assert torch.equal(ours.denoise(canvas, memory), logits)
    changed = prompt.clone()
    changed[0] = (changed[0] + 1) % TEXT_IDS
    other_memory = ours.memory()
    ours.logits(changed, other_memory)
    assert ((ours.denoise(canvas, other_memory) - logits).abs().amax(-1) > 1e-5).all()


def test_noise_may_hold_any_id_and_text_may_not():
    _, ours = pair()
    memory = ours.memory()
    ours.logits(random_ids(4, vocab_size=TEXT_IDS), memory)
    image = torch.full((CANVAS,), IMAGE)
    assert ours.denoise(image, memory).isfinite().all()
    with pytest.raises(ValueError, match=f"token id {IMAGE} stands for an image"):
        ours.logits(image, memory)
    assert memory.length == 4


def test_bfloat16_file(tmp_path, monkeypatch):
    multiply_as_torch_does(monkeypatch)
    theirs = save_denoiser(tmp_path, dtype=torch.bfloat16)
    exact = reload(DiffusionGemmaForBlockDiffusion, tmp_path, torch.float32)
    ours = load(tmp_path)
    assert ours.dtype == torch.bfloat16
    prompt, canvas, memory = random_ids(9), random_ids(CANVAS, seed=2), ours.memory()
    ours.logits(prompt, memory)
    past, past32 = encode(theirs, prompt)[0], encode(exact, prompt)[0]
    soft = None
    for _ in range(2):
        logits = ours.denoise(canvas, memory, soft)
        expected, expected32 = denoise(theirs, past, canvas, soft), denoise(exact, past32, canvas, soft)
        assert logits.dtype == torch.float32
        # As close to the float32 logits as the reference in bfloat16 is.
        error, reference_error = (logits - expected32).abs(), (expected.float() - expected32).abs()
        assert error.mean() <= 1.5 * reference_error.mean()
        assert error.max() <= 2 * reference_error.max()
        soft = (expected / 0.7).to(torch.bfloat16)


def test_both_spellings_and_tied_duplicates(tmp_path):
    theirs = save_denoiser(tmp_path)
    prompt, canvas = random_ids(9), random_ids(CANVAS, seed=2)
    expected = denoise(theirs, encode(theirs, prompt)[0], canvas)

    def release(config):
        del config["text_config"]["per_layer_config"]
        config["text_config"] |= {"global_head_dim": 16, "num_global_key_value_heads": 1}

    def add_duplicates(tensors):
        tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"].clone()
        tensors["model.encoder.language_model.norm.weight"] = tensors["model.decoder.norm.weight"].clone()
        name = "layers.1.self_attn.q_proj.weight"
        tensors[f"model.encoder.language_model.{name}"] = tensors[f"model.decoder.{name}"].clone()
        return tensors

    for changes in ({}, {"config": release}, {"tensors": add_duplicates}):
        rewrite(tmp_path, **changes)
        ours = load(tmp_path)
        memory = ours.memory()
        ours.logits(prompt, memory)
        assert_same(ours.denoise(canvas, memory), expected, TOLERANCE)
