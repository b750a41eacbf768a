"""Our memories inside transformers' `generate`: the same logits as ours, token for token."""

import warnings
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import sparing
from sparing.plugins.transformers_cache import TriAttentionCache, TurboQuantCache
from tests.checkpoint import tokenizer_files
from tests.conformance.reference import load, save_random
from tests.conformance.test_triattention import MODELS, SHAPE
from tests.fetched import fetched
from tests.real.reading import read_model
from tests.tiny import random_ids, randomise

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
QWEN2 = {name: value for name, value in SHAPE.items() if name != "head_dim"} | ROPE
SOME_WINDOWS = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
OURS: dict[str, tuple[Any, Any]] = {
    **MODELS,
    "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, **ROPE, sliding_window=None)),
    "qwen2, some windows": (
        Qwen2ForCausalLM,
        Qwen2Config(**QWEN2, **SOME_WINDOWS, use_sliding_window=True, max_window_layers=1),
    ),
}
OTHERS: dict[str, tuple[Any, Any]] = {
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SHAPE, **SOME_WINDOWS)),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**SHAPE, **SOME_WINDOWS)),
}
EXACT = {"window": 1000}  # nothing becomes a code
NEW = 34
# Beside an attention mask: transformers takes ids equal to `pad_token_id` for padding where there is none.
UNPADDED: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module", params=OURS)
def pair(request, tmp_path_factory) -> tuple[Any, Any]:
    """(theirs, ours)"""
    folder = tmp_path_factory.mktemp("model")
    theirs = save_random(*OURS[request.param], folder)
    return theirs, load(folder, "float32")


@pytest.fixture(scope="module", params=[*OURS, *OTHERS])
def theirs(request) -> Any:
    model_class, config = {**OURS, **OTHERS}[request.param]
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    randomise(model, 0)
    return model


def generated(theirs: Any, prompt: Tensor, cache: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """(all ids [T], logits [NEW, V]) of greedy decoding."""
    settings = UNPADDED | {
        "max_new_tokens": NEW,
        "output_logits": True,
        "attention_mask": torch.ones_like(prompt[None]),
    }
    out = theirs.generate(prompt[None], past_key_values=cache, return_dict_in_generate=True, **settings | options)
    return out.sequences[0], torch.cat(out.logits)


def ours_over(ours: Any, sequence: Tensor, prompt: int, memory: Any) -> Tensor:
    """Our logits where theirs were taken, for the same tokens."""
    logits = [ours.logits(sequence[:prompt], memory)[-1:]]
    logits += [ours.logits(token[None], memory, prompt=False) for token in sequence[prompt:-1]]
    return torch.cat(logits)


def assert_same_over_codes(found: Tensor, expected: Tensor, cached: Any, memory: Any) -> None:
    """Equal logits over equal codes. Keys of the two models differ by rounding, which now and then, on one CPU and not
    on another, takes a scale or a number between two codes to either side: then logits are apart by as much as that is.
    """
    apart = total = 0
    for theirs, ours in zip(cached.layers, memory.layers, strict=True):
        if theirs is not None:
            coded = [name for name in theirs.state() if "codes" in name or "scale" in name]
            apart += sum(int((theirs.state()[name] != ours.state()[name]).sum()) for name in coded)
            total += sum(theirs.state()[name].numel() for name in coded)
    assert apart <= total / 500
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 if apart else 2e-4)


def test_nothing_quantised_is_their_own_cache(theirs):
    for attention in ["eager", "sdpa"] if theirs._supports_sdpa else ["eager"]:
        theirs.set_attn_implementation(attention)
        expected, logits = generated(theirs, random_ids(6), None)
        cache = TurboQuantCache(theirs, 3, **EXACT)
        sequence, found = generated(theirs, random_ids(6), cache)
        assert torch.equal(sequence, expected)
        torch.testing.assert_close(found, logits, rtol=0, atol=2e-5)
    dense = DynamicCache(config=theirs.config)
    generated(theirs, random_ids(6), dense)
    held = {i: layer.keys.nbytes for i, layer in enumerate(dense.layers) if getattr(layer, "keys", None) is not None}
    tied = getattr(theirs.config, "attention_k_eq_v", False)  # of full layers values alone
    single = [tied and kind == "full_attention" for kind in getattr(theirs.config, "layer_types", None) or [""] * 99]
    assert cache.nbytes == sum((1 if single[i] else 2) * nbytes for i, nbytes in held.items())
    assert cache.get_seq_length() == 6 + NEW - 1


def test_every_model_in_codes(theirs):
    """Bytes go down, and more bits come closer."""
    expected, logits = generated(theirs, random_ids(70), None)
    errors, sizes = [], []
    for bits in (2, 8):
        cache = TurboQuantCache(theirs, bits, block=16)
        theirs(expected[None, :70], past_key_values=cache)
        out = [theirs(token[None, None], past_key_values=cache).logits[:, -1] for token in expected[70:80]]
        errors.append(float((torch.cat(out) - logits[1:11]).detach().pow(2).mean() / logits.pow(2).mean()))
        sizes.append(cache.nbytes)
    assert errors[1] < min(errors[0], 1e-3)
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", ["global", "per_head", "per_layer_per_head"])
def test_pruned(pair, attention, mode):
    theirs, ours = pair
    theirs.set_attn_implementation(attention)
    options = {"interval": 4, "mode": mode}
    statistics = sparing.calibrate(ours, random_ids(100, seed=5))
    cache = TriAttentionCache(theirs, 12, statistics, **options)
    sequence, found = generated(theirs, random_ids(6), cache)
    memory = ours.memory("triattention:12", statistics=statistics, **options)
    torch.testing.assert_close(found, ours_over(ours, sequence, 6, memory), rtol=0, atol=1e-4)
    assert cache.evictions == memory.evictions[: len(cache.evictions)] and len(cache.evictions) >= 5
    layer = next(i for i, spec in enumerate(ours.config.memory_specs()) if spec.window is None)
    assert cache.get_seq_length() == 6 + NEW - 1 and 12 <= cache.memories[0].entries(layer).shape[1] < 17


@pytest.mark.parametrize("bits", [4, "k3v2"])
def test_in_codes(pair, bits):
    theirs, ours = pair
    theirs.set_attn_implementation("sdpa")
    cache = TurboQuantCache(theirs, bits, block=16)
    sequence, found = generated(theirs, random_ids(6), cache)
    memory = ours.memory(f"turboquant:{bits}", block=16, prefill="exact")
    assert_same_over_codes(found, ours_over(ours, sequence, 6, memory), cache.memories[0], memory)
    statistics = sparing.calibrate(ours, random_ids(100, seed=5))
    cache = TriAttentionCache(theirs, 12, statistics, bits=bits, interval=4, block=16)
    sequence, found = generated(theirs, random_ids(6), cache)
    memory = ours.memory(
        f"triattention:12+turboquant:{bits}", statistics=statistics, interval=4, block=16, prefill="exact"
    )
    assert_same_over_codes(found, ours_over(ours, sequence, 6, memory), cache.memories[0], memory)
    assert cache.evictions


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("model")
    theirs = save_random(*OURS["llama"], folder)
    return theirs, load(folder, "float32")


def test_a_second_turn(llama):
    """A longer prompt over the same cache: what is new is read without a round."""
    theirs, ours = llama
    statistics = sparing.calibrate(ours, random_ids(100))
    cache = TriAttentionCache(theirs, 12, statistics, interval=4)
    first, _ = generated(theirs, random_ids(6), cache)
    question = torch.cat([first, random_ids(9, seed=8)])
    second, logits = generated(theirs, question, cache)
    memory = ours.memory("triattention:12", statistics=statistics, interval=4)
    ours_over(ours, first, 6, memory)
    expected = [ours.logits(question[memory.length :], memory, prompt=True)[-1:]]
    expected += [ours.logits(token[None], memory, prompt=False) for token in second[len(question) : -1]]
    torch.testing.assert_close(logits, torch.cat(expected), rtol=0, atol=1e-4)


def test_rows_are_as_if_alone(pair):
    """Padding on the left is not remembered: codes and blocks begin with each row's first token."""
    theirs, _ = pair
    theirs.set_attn_implementation("sdpa")
    rows = [random_ids(5, seed=2), random_ids(40, seed=3), random_ids(23, seed=4)]
    mask = torch.tensor([[0] * (40 - len(row)) + [1] * len(row) for row in rows])
    batch = torch.stack([torch.cat([torch.zeros(40 - len(row), dtype=torch.long), row]) for row in rows])
    cache = TurboQuantCache(theirs, 4, attention_mask=mask, block=16)
    settings = UNPADDED | {"max_new_tokens": 20}
    out = theirs.generate(
        batch,
        attention_mask=mask,
        past_key_values=cache,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    logits = torch.stack(out.logits, 1)
    for row, sequence, found, memory in zip(rows, out.sequences, logits, cache.memories, strict=True):
        alone = TurboQuantCache(theirs, 4, block=16)
        expected, expected_logits = generated(theirs, row, alone, **settings)
        assert torch.equal(sequence[-len(expected) :], expected)
        torch.testing.assert_close(found, expected_logits, rtol=0, atol=2e-4)
        assert memory.length == alone.memories[0].length and memory.nbytes == alone.memories[0].nbytes


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_a_prompt_in_pieces(llama, chunk):
    """Also where a piece is padding alone."""
    theirs, _ = llama
    rows = [random_ids(4, seed=2), random_ids(11, seed=3)]
    mask = torch.tensor([[0] * 7 + [1] * 4, [1] * 11])
    batch = torch.stack([torch.cat([torch.zeros(7, dtype=torch.long), rows[0]]), rows[1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = TurboQuantCache(theirs, 4, attention_mask=mask, **EXACT)
    for start in range(0, 11, chunk):
        piece = slice(start, start + chunk)
        out = theirs(
            batch[:, piece],
            attention_mask=mask[:, : start + chunk],
            position_ids=positions[:, piece],
            past_key_values=cache,
        )
    for row, logits in zip(rows, out.logits[:, -1], strict=True):
        torch.testing.assert_close(logits, theirs(row[None]).logits[0, -1], rtol=0, atol=2e-5)


def pruned(theirs: Any, ours: Any, **options: Any) -> TriAttentionCache:
    statistics = sparing.calibrate(ours, random_ids(100))
    return TriAttentionCache(theirs, 12, statistics, interval=4, **options)


def test_rows_of_one_length_are_pruned_alone(llama):
    theirs, ours = llama
    batch = random_ids(12).view(2, 6)
    settings = UNPADDED | {"max_new_tokens": NEW, "attention_mask": torch.ones_like(batch)}
    cache = pruned(theirs, ours, attention_mask=torch.ones_like(batch))
    sequences = theirs.generate(batch, past_key_values=cache, **settings)
    for row, sequence, memory in zip(batch, sequences, cache.memories, strict=True):
        alone = pruned(theirs, ours)
        assert torch.equal(generated(theirs, row, alone)[0], sequence)
        assert torch.equal(memory.entries(1), alone.memories[0].entries(1))


def test_beams(pair):
    """Rows are forked and dropped with their beams."""
    theirs, _ = pair
    theirs.set_attn_implementation("sdpa")
    prompts = random_ids(12).view(2, 6)
    settings = UNPADDED | {"num_beams": 3, "max_new_tokens": 20, "attention_mask": torch.ones_like(prompts)}
    expected = theirs.generate(prompts, **settings)
    cache = TurboQuantCache(theirs, 3, attention_mask=torch.ones_like(prompts), **EXACT)
    assert torch.equal(theirs.generate(prompts, past_key_values=cache, **settings), expected)
    assert len(cache.memories) == 6


@pytest.mark.parametrize("prune", [False, True])
def test_beams_that_forget(llama, prune):
    """The score of a beam is that of its tokens, decoded alone."""
    theirs, ours = llama
    mask = torch.ones(1, 6, dtype=torch.long)

    def cache() -> Any:
        return (
            pruned(theirs, ours, attention_mask=mask)
            if prune
            else TurboQuantCache(theirs, 3, attention_mask=mask, block=1)
        )

    settings = UNPADDED | {"num_beams": 3, "max_new_tokens": 20, "attention_mask": mask}
    out = theirs.generate(
        random_ids(6)[None], past_key_values=cache(), return_dict_in_generate=True, output_scores=True, **settings
    )
    alone, sequence = cache(), out.sequences[0]
    logits = [theirs(sequence[None, :6], past_key_values=alone).logits[0, -1]]
    logits += [theirs(token[None, None], past_key_values=alone).logits[0, -1] for token in sequence[6:-1]]
    chosen = torch.stack(logits).log_softmax(-1).gather(1, sequence[6:, None])
    torch.testing.assert_close(chosen.mean(), out.sequences_scores[0], rtol=0, atol=1e-4)


def test_rejected_drafts_leave_no_trace(llama):
    theirs, _ = llama
    prompt = random_ids(4).repeat(5)
    expected, _ = generated(theirs, prompt, None)
    settings = {"prompt_lookup_num_tokens": 3, "output_logits": False, "return_dict_in_generate": False}
    for options in (EXACT, {"block": 16, "window": 16}):
        cache = TurboQuantCache(theirs, 8, **options)
        base = UNPADDED | {"max_new_tokens": NEW, "attention_mask": torch.ones_like(prompt[None])}
        sequence = theirs.generate(prompt[None], past_key_values=cache, **base | settings)[0]
        if options is EXACT:
            assert torch.equal(sequence, expected)
        plain = TurboQuantCache(theirs, 8, **options)
        theirs(sequence[None, : cache.get_seq_length()], past_key_values=plain)
        plain.settle()
        cache.settle()
        # Keys of the first layer are those of the tokens, whatever was drafted in between.
        mine, same = (c.memories[0].layers[0].read() for c in (cache, plain))
        torch.testing.assert_close(mine[0], same[0], rtol=0, atol=1e-5)


def test_only_the_last_forward_can_be_taken_back(llama):
    theirs, _ = llama
    cache = TurboQuantCache(theirs, 4, block=1)
    theirs(random_ids(9)[None], past_key_values=cache)
    cache.crop(-2)
    assert cache.get_seq_length() == 7
    with pytest.raises(ValueError, match="cannot crop by -1: the 0 tokens of the last forward"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="cannot crop by 3"):
        cache.crop(3)
    found = theirs(random_ids(9)[None, 7:], past_key_values=cache).logits
    other = TurboQuantCache(theirs, 4, block=1)
    theirs(random_ids(9)[None, :7], past_key_values=other)
    assert torch.equal(found, theirs(random_ids(9)[None, 7:], past_key_values=other).logits)
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0
    again = theirs(random_ids(9)[None], past_key_values=cache).logits
    torch.testing.assert_close(again, theirs(random_ids(9)[None]).logits, rtol=0, atol=1e-5)


def test_what_is_refused(llama):
    theirs, ours = llama
    with pytest.raises(ValueError, match="the prompt has 20 tokens and is protected"):
        generated(theirs, random_ids(20), pruned(theirs, ours))
    with pytest.raises(ValueError, match=r"has 2 rows: pass attention_mask="):
        theirs(random_ids(12).view(2, 6), past_key_values=TurboQuantCache(theirs))
    with pytest.raises(ValueError, match="prompts of a batch differ in length"):
        pruned(theirs, ours, attention_mask=torch.tensor([[0, 1], [1, 1]]))
    with pytest.raises(ValueError, match="padding_side='left'"):
        TurboQuantCache(theirs, attention_mask=torch.tensor([[1, 0], [1, 1]]))
    with pytest.raises(ValueError, match="drafts cannot be told from a prompt"):
        generated(theirs, random_ids(6), pruned(theirs, ours), prompt_lookup_num_tokens=3, output_logits=False)
    used = pruned(theirs, ours)
    generated(theirs, random_ids(6), used)
    with pytest.raises(ValueError, match="cannot be told"):
        used.crop(-1)
    with pytest.raises(ValueError, match="holds 1 rows, the batch has 2"):
        theirs(random_ids(2).view(2, 1), past_key_values=used)
    with pytest.raises(ValueError, match="prefill='stream'"):
        TurboQuantCache(theirs, prefill="stream")
    with pytest.raises(ValueError, match="takes no option 'mode'"):
        TurboQuantCache(theirs, mode="global")
    windows = MistralForCausalLM(MistralConfig(**SHAPE, **ROPE, sliding_window=7))
    with pytest.raises(ValueError, match="no layer of MistralForCausalLM grows without bound"):
        TurboQuantCache(windows)
    gemma = Gemma2ForCausalLM(OTHERS["gemma2"][1])
    with pytest.raises(ValueError, match=r"how the model rotates its keys.*gemma2"):
        TriAttentionCache(gemma, 12, sparing.Statistics({}))


def test_statistics_of_a_fine_tune(llama):
    theirs, ours = llama
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned(theirs, ours)
        pruned(theirs.bfloat16(), ours)
    theirs.float()
    with torch.no_grad():
        theirs.model.layers[0].self_attn.q_proj.weight.mul_(2)
    with pytest.warns(UserWarning, match="made with other weights"):
        pruned(theirs, ours)
    with torch.no_grad():
        theirs.model.layers[0].self_attn.q_proj.weight.div_(2)


def test_a_forward_that_stopped_half_way(llama):
    theirs, _ = llama
    cache = TurboQuantCache(theirs)
    hook = theirs.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        theirs(random_ids(4)[None], past_key_values=cache)
    hook.remove()
    with pytest.raises(ValueError, match="stopped half-way"):
        theirs(random_ids(4)[None], past_key_values=cache)


def test_the_example_of_the_documentation(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()
    script = text.split("```python\n")[1].split("```")[0]
    tokenizer_files.write_folder(tmp_path, tokenizer_class="PreTrainedTokenizerFast", pad_token="<pad>")
    model_class, config = MODELS["llama"]
    save_random(model_class, type(config)(**config.to_dict() | {"vocab_size": 600, "eos_token_id": None}), tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(" ".join(tokenizer_files.SENTENCES * 20))
    found: dict[str, Any] = {}
    exec(script.replace("Qwen/Qwen3-0.6B", str(tmp_path)), found)
    assert found["cache"].evictions and len(found["cache"].memories) == 2


@pytest.mark.real
def test_smollm2():
    ours = sparing.load(fetched("smollm2"), dtype="float32", device="cpu")
    theirs = read_model(LlamaForCausalLM, LlamaConfig, fetched("smollm2"))
    prompt = torch.tensor(ours.tokenizer.encode("Once upon a time there was a king who had three daughters."))
    statistics = sparing.calibrate(ours, prompt)
    with pytest.warns(UserWarning, match="made with other weights"):  # in blocks: the same numbers in other bytes
        cache = TriAttentionCache(theirs, 24, statistics, interval=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sequence, logits = generated(theirs, prompt, cache, max_new_tokens=24)
    memory = ours.memory("triattention:24", statistics=statistics, interval=4)
    expected = ours_over(ours, sequence, len(prompt), memory)
    assert (logits - expected).abs().max() <= 1e-3 * expected.abs().max()
    assert cache.evictions
    cache = TurboQuantCache(theirs, 4, block=16)
    sequence, logits = generated(theirs, prompt, cache, max_new_tokens=12)
    expected = ours_over(ours, sequence, len(prompt), ours.memory("turboquant:4", block=16, prefill="exact"))
    assert (logits - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("bits", "options"), [(4, {}), (2.5, {"block": 16}), (3.5, {"window": 4, "sink_tokens": 3})])
def test_what_is_cropped_leaves_nothing(bits, options, seed):
    """Random drafts that are taken back, beside a cache that only ever saw what was kept."""
    model_class, config = MODELS["llama"]
    model = model_class(config).eval()
    randomise(model, seed=0)
    random = Random(seed)
    busy, plain = (TurboQuantCache(model, bits, **options) for _ in range(2))
    length = 0
    while length < 60:
        kept, rejected = random.choice([1, 2, 5, 17]), random.choice([0, 2, 29])
        row = random_ids(kept, seed=length)[None]
        with torch.no_grad():
            drafted = torch.cat([row, random_ids(rejected, seed=99)[None]], 1)
            left = model(input_ids=drafted, past_key_values=busy).logits[:, :kept]
            right = model(input_ids=row, past_key_values=plain).logits
        busy.crop(-rejected)
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)
        length += kept
    plain.settle()
    assert busy.get_seq_length() == plain.get_seq_length() == length
    assert busy.nbytes == plain.nbytes
    for mine, other in zip(busy.memories[0].own, plain.memories[0].own, strict=True):
        for name, tensor in mine.state().items():
            torch.testing.assert_close(tensor, other.state()[name], rtol=1e-2, atol=2e-3)
