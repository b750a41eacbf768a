"""TurboQuant storage against its definition: each token exact or coded by position alone, codes made once."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparing
from sparing.config.codes import TurboQuant
from sparing.config.memory import AttentionSpec
from sparing.config.policy import Policy
from sparing.config.rope import RopeParameters
from sparing.errors import CheckpointError
from sparing.kernels import KeysFromValues, apply_rope, inverse_frequencies
from sparing.memory.group import Reading, Share
from sparing.memory.sequence import Layout, Memory, resident_bytes
from sparing.memory.turboquant.codebook import lloyd_max_codebook
from sparing.memory.turboquant.coder import Coder
from sparing.memory.turboquant.definition import tq_dequantize, tq_quantize
from sparing.memory.turboquant.group import CodedGroup, coded_group
from sparing.memory.turboquant.key_bias import KeyBias
from sparing.memory.turboquant.rotation import random_rotation
from tests.memory.one_layer import OneLayer
from tests.tiny import filled, model, random_ids, same, snapshot

KV_HEADS, HEADS, DIM = 2, 4, 12
EXACT_SCALES = {"scale_dtype": "float32"}


keys_from_values = KeysFromValues(torch.full((DIM,), 1.5), RopeParameters("proportional", 100.0, 0.7))


def make(
    policy: TurboQuant,
    *,
    tied: bool = False,
    heads: int = KV_HEADS,
    d: int = DIM,
    dtype: torch.dtype = torch.float32,
    bias: KeyBias | None = None,
) -> OneLayer:
    spec, device = AttentionSpec(heads, d, value_only=tied, codes=policy.for_layer()), torch.device("cpu")
    group = coded_group(
        "turboquant",
        policy,
        {0: spec},
        dtype=dtype,
        device=device,
        keys_from_values=[keys_from_values if tied else None],
        key_biases=[bias],
    )
    return OneLayer(Memory(Policy("turboquant", None, policy), [group], Layout((0,), (0,))))


def coders_of(memory: Any, layer: int = 0) -> dict[str, Coder]:
    """Of keys and values, by role."""
    group = (memory.memory if isinstance(memory, OneLayer) else memory).layers[layer].group
    number, i = group.place(layer)
    return {coder.role: coder for coder in group.alike(number).coders[i]}


def decoded(x: Tensor, coder: Coder, bits: int, scale: str) -> Tensor:
    """float64 [n, heads, d] of what the codes of x stand for."""
    rotation, book = coder.quantiser.rotation.matrix.double(), lloyd_max_codebook(x.shape[-1], bits)
    return tq_dequantize(*tq_quantize(x.double(), rotation, bits, book, scale), rotation, book)


@dataclass
class Naive:
    """Every token ever committed and those staged; what is seen of each is decided by its position."""

    form: TurboQuant
    coders: dict[str, Coder]
    tied: bool
    committed: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    staged: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def attend(self, q: Tensor, causal: bool) -> Tensor:
        keys, values = (torch.stack(part) for part in zip(*self.committed, *self.staged, strict=True))
        form, total, base = self.form, len(keys), len(self.committed)
        coded_v = decoded(values, self.coders["values"], int(form.v_bits), form.scale)
        if self.tied:
            coded_k = keys_from_values(coded_v.transpose(0, 1).float(), torch.arange(total)).transpose(0, 1).double()
        else:
            coded_k = decoded(keys, self.coders["keys"], int(form.k_bits), form.scale)
        output = torch.zeros(q.shape, dtype=torch.float64)
        for t in range(len(q)):
            i = total - len(q) + t
            reader = i if causal and form.prefill == "stream" else base
            seen = i + 1 if causal else total
            j = torch.arange(seen)
            exact = (j < form.sink_tokens) | (reader < (j // form.block + 1) * form.block + form.window)
            for head in range(HEADS):
                group = head // (HEADS // KV_HEADS)
                k = torch.where(exact[:, None], keys[:seen, group].double(), coded_k[:seen, group])
                v = torch.where(exact[:, None], values[:seen, group].double(), coded_v[:seen, group])
                output[t, head] = torch.softmax(k @ q[t, head].double() * 0.3, 0) @ v
        return output

    def commit(self, n: int) -> None:
        self.committed, self.staged = self.committed + self.staged[:n], []


def random_entries(n: int, generator: torch.Generator, tied: bool, first: int) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, n, KV_HEADS, DIM, generator=generator)
    if tied:
        k = keys_from_values(v.transpose(0, 1), torch.arange(first, first + n)).transpose(0, 1)
    return k, v


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "policy",
    [
        TurboQuant(4, 4, block=1, **EXACT_SCALES),
        TurboQuant(3, 2, block=16, **EXACT_SCALES),
        TurboQuant(4, 3, block=1, window=3, sink_tokens=2, rotation="haar", scale="norm", **EXACT_SCALES),
        TurboQuant(8, 5, block=16, window=4, sink_tokens=5, prefill="exact", scale="lsq", **EXACT_SCALES),
    ],
)
@settings(max_examples=12)
@given(
    operations=st.lists(
        st.tuples(
            st.sampled_from(["forward", "canvas", "fork"]), st.integers(0, 19), st.integers(0, 19), st.booleans()
        ),
        max_size=7,
    ),
    seed=st.integers(0, 1000),
)
def test_against_a_list_of_tokens(policy, tied, operations, seed):
    generator = torch.Generator().manual_seed(seed)
    memory = make(policy, tied=tied)
    naive = Naive(policy, coders_of(memory), tied)
    others = []
    for kind, size, number, narrow in operations:
        if kind == "fork":
            others.append((memory, memory.nbytes, {k: v.clone() for k, v in memory.state().items()}))
            memory = memory.fork()
            continue
        k, v = random_entries(size, generator, tied, memory.length)
        memory.stage(k, v)
        naive.staged += list(zip(k, v, strict=True))
        causal = kind == "forward"
        if size:
            q = torch.randn(1 if narrow and causal else size, HEADS, DIM, generator=generator)
            mixed = memory.attend(q, scale=0.3, causal=causal)
            torch.testing.assert_close(mixed.double(), naive.attend(q, causal), rtol=2e-5, atol=2e-5)
        n = min(number, size) if causal else 0
        memory.commit(n)
        naive.commit(n)
        assert memory.length == memory.held == len(naive.committed)
        assert memory.nbytes == memory.spec.nbytes(memory.length, 4)
    for other, nbytes, state in others:  # nothing that came after a fork changed what was forked
        assert other.nbytes == nbytes
        assert all(torch.equal(x, state[name]) for name, x in other.state().items())


def over_canvas(memory: OneLayer, q: Tensor, reading: Reading | None) -> Tensor:
    share = Share(len(q), len(q), False, memory.length + len(q), reading=reading)
    return memory.group.together([memory.group], [share]).attend(0, q, 0.3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("policy", [TurboQuant(4, 3, block=16, window=3, sink_tokens=2), TurboQuant(2.5, 3.5, block=1)])
def test_passes_over_a_canvas_decode_once(policy, tied, monkeypatch):
    """The same mixes as decoding in each pass, what is decoded being counted where it is held."""
    generator = torch.Generator().manual_seed(1)
    memory = make(policy, tied=tied)
    for n in (90, 40):
        memory.stage(*random_entries(n, generator, tied, memory.length))
        memory.commit(n)
    again, before = memory.fork(), memory.nbytes
    decodes = []
    decode = Coder.decode
    monkeypatch.setattr(Coder, "decode", lambda self, *args: decodes.append(1) or decode(self, *args))
    reading = memory.memory.reading()
    for size in (20, 20, 20):
        k, v = random_entries(size, generator, tied, memory.length)
        q = torch.randn(size, HEADS, DIM, generator=generator)
        mixes = []
        for side, held in ((memory, reading), (again, None)):
            side.stage(k, v)
            mixes.append(over_canvas(side, q, held))
            side.commit(0)
        torch.testing.assert_close(*mixes, rtol=2e-5, atol=2e-5)
        assert len(decodes) == (1 if tied else 2)
    assert memory.nbytes == before
    assert reading.nbytes == 2 * KV_HEADS * (memory.held + 20) * DIM * 4
    for n in (16, 16):  # what becomes codes in between is decoded too
        k, v = random_entries(n, generator, tied, memory.length)
        q, mixes = torch.randn(n, HEADS, DIM, generator=generator), []
        for side, held in ((memory, reading), (again, None)):
            side.stage(k, v)
            mixes.append(over_canvas(side, q, held))
            side.commit(n)
        torch.testing.assert_close(*mixes, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("policy", ["turboquant:4", "turboquant:3.5"])
@pytest.mark.parametrize("options", [{"block": 1}, {"block": 16, "window": 5, "sink_tokens": 3, "rotation": "haar"}])
def test_codes_do_not_depend_on_chunks(policy, options):
    """To the bit: a token is encoded from its own exact value, whatever is encoded beside it."""
    form = replace(sparing.config.policy.parse_policy(policy).store, **options)
    k, v = torch.randn(2, 150, KV_HEADS, DIM)
    states = []
    for chunks in ([150], [1] * 150, [7, 50, 1, 1, 64, 27]):
        memory = make(form)
        for a, b in zip(k.split(chunks), v.split(chunks), strict=True):
            memory.stage(a, b)
            memory.attend(torch.randn(len(a), HEADS, DIM), scale=1.0, causal=True)
            memory.commit(len(a))
        states.append(memory.state())
    for state in states[1:]:
        assert all(torch.equal(tensor, states[0][name]) for name, tensor in state.items())


@pytest.mark.parametrize("name", ["dense", "value-only", "shared", "denoiser", "hybrid"])
@pytest.mark.parametrize(
    ("kv", "options"),
    [("turboquant:2", {"window": 300}), ("turboquant:2", {"sink_tokens": 300}), ("turboquant:16", {})],
)
def test_without_codes_it_is_the_dense_memory_to_the_bit(name, kv, options):
    dense, memory = model(name).memory(), model(name).memory(kv, **options)
    for chunk in random_ids(100).split([70, 1, 29]):
        assert torch.equal(model(name).logits(chunk, memory), model(name).logits(chunk, dense))
    assert memory.nbytes == dense.nbytes


@pytest.mark.parametrize("prefill", ["stream", "exact"])
def test_what_a_prompt_reads(prefill):
    """Streaming equals token by token; exact prefill equals the dense memory, until the tokens are read again."""
    options: dict = {"block": 16, "prefill": prefill, **EXACT_SCALES}
    ids = random_ids(40)
    whole = model("dense").logits(ids, model("dense").memory("turboquant:3", **options))
    memory = model("dense").memory("turboquant:3", **options)
    steps = torch.cat([model("dense").logits(ids[i : i + 1], memory) for i in range(40)])
    dense = model("dense").logits(ids)
    if prefill == "stream":
        torch.testing.assert_close(whole, steps, rtol=1e-5, atol=5e-5)
        assert (whole - dense).abs().max() > 0.1
    else:
        assert torch.equal(whole, dense)
        assert (steps - dense).abs().max() > 0.1


@pytest.mark.parametrize(
    ("kv", "options", "d", "nbytes"),
    [
        *[
            (f"turboquant:{bits}", {}, 128, n)
            for bits, n in ((4, 66), (3, 50), (2, 34), (3.5, 60), (2.5, 44), (8, 130))
        ],
        *[(f"turboquant:{bits}", {"variant": "prod"}, 128, n) for bits, n in ((4, 68), (3, 52), (2, 36), (3.5, 64))],
        ("turboquant:4", {}, 64, 34),
        ("turboquant:3", {}, 64, 26),
        ("turboquant:4", {}, 256, 130),
        ("turboquant:3", {}, 256, 98),
        ("turboquant:4", {}, 512, 258),
        ("turboquant:4", {}, 80, 42),
        ("turboquant:4", {"scale_dtype": "float32"}, 96, 52),
        ("turboquant:1", {}, 128, 18),
    ],
)
def test_real_bytes_of_a_vector(kv, options, d, nbytes):
    form = sparing.config.policy.parse_policy(kv, options).store
    assert form.entry_nbytes(d, value_only=True) == nbytes
    memory = make(form, d=d)
    x = torch.randn(128, KV_HEADS, d)
    memory.stage(x, x)
    memory.commit(128)
    channels = sum(x.nbytes for name, x in memory.state().items() if name.endswith("channels"))
    assert memory.nbytes == 2 * 128 * KV_HEADS * nbytes + channels == memory.spec.nbytes(128, 4)


def test_bytes_of_llama_8b():
    """Figures of the method's table: 131072 bytes a token in bfloat16."""
    for kv, per_token in (
        ("dense", 131072),
        ("turboquant:4", 33792),
        ("turboquant:k4v3", 29696),
        ("turboquant:3", 25600),
        ("turboquant:2", 17408),
    ):
        assert sparing.plan("llama-3.1-8b", context=6400, kv=kv).memory_bytes == 6400 * per_token
    tail = sparing.plan("llama-3.1-8b", context=6400 + 63, kv="turboquant:4").memory_bytes
    assert tail == 6400 * 33792 + 63 * 131072


@pytest.mark.parametrize(("heads", "group", "d"), [(1, 7, 80), (2, 1, 96), (1, 2, 512), (3, 2, 6)])
@pytest.mark.parametrize("kv", ["turboquant:4", "turboquant:2.5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_types(heads, group, d, kv, dtype):
    """Attention over what is held equals attention over what `read` decodes."""
    memory = make(replace(sparing.config.policy.parse_policy(kv).store, block=16), heads=heads, d=d, dtype=dtype)
    k, v = torch.randn(2, d, 70, heads).permute(0, 2, 3, 1).to(dtype)  # not contiguous
    q = torch.randn(1, heads * group, d).to(dtype)
    memory.stage(k, v)
    memory.commit(70)
    memory.stage(k[:1], v[:1])
    mixed = memory.attend(q, scale=d**-0.5, causal=True)
    assert mixed.dtype == dtype
    keys, values = (x.double().repeat_interleave(group, 0) for x in memory.read())
    weights = torch.softmax((keys @ q[0, :, :, None].double())[..., 0] * d**-0.5, -1)
    expected = (weights[:, None] @ values)[:, 0]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(mixed[0].double(), expected, rtol=tolerance, atol=tolerance)


def test_outlier_channels_get_more_bits():
    """A few channels twenty times as large: the split spends its bits where they are, in whole pairs for keys."""
    x = torch.randn(64, 1, 64)
    loud = [3, 35, 10, 42]
    x[..., loud] *= 20
    memory = make(TurboQuant(2.5, 2.5), heads=1, d=64)
    memory.stage(x, x)
    memory.commit(64)
    state = memory.state()
    for role, count in (("k", 16), ("v", 16)):
        assert set(loud) <= set(state[f"{role}_channels"][0].tolist())
        assert state[f"{role}_channels"].shape == (1, count)
    chosen = state["k_channels"][0].long()
    assert torch.equal(chosen[8:], chosen[:8] + 32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_has_no_code_is_refused_before_anything_is_stored(bad, monkeypatch):
    memory = filled("dense", 70, kv="turboquant:4")
    before = snapshot(memory)
    layer = model("dense").model.layers[1].self_attn
    weight = layer.v_proj.weight.detach().clone()
    weight[3] = bad
    monkeypatch.setitem(layer.v_proj._parameters, "weight", torch.nn.Parameter(weight, requires_grad=False))
    with pytest.raises(ValueError, match="values hold NaN or infinite"):
        model("dense").logits(random_ids(3), memory)
    assert same(snapshot(memory), before)


def test_a_scale_beyond_float16_is_cut_and_said():
    memory = make(TurboQuant(4, 4, block=16))
    x = torch.full((16, KV_HEADS, DIM), 1e6)
    memory.stage(x, x)
    with pytest.warns(UserWarning, match="exceeds float16"):
        memory.commit(16)
    assert torch.isfinite(memory.read()[0]).all()
    wide = make(TurboQuant(4, 4, block=16, **EXACT_SCALES))
    wide.stage(x, x)
    wide.commit(16)
    torch.testing.assert_close(wide.read()[0].norm(dim=-1), x[:, :, 0].T * DIM**0.5, rtol=0.2, atol=0)


def test_zero_vectors_stay_zero():
    memory = make(TurboQuant(3, 3, block=16))
    memory.stage(torch.zeros(16, KV_HEADS, DIM), torch.zeros(16, KV_HEADS, DIM))
    memory.commit(16)
    assert all((x == 0).all() for x in memory.read())


@pytest.mark.parametrize("window", [0, 2])
def test_forgetting_makes_codes_of_all_but_the_window(window):
    """Survivors keep their codes; heads may keep different entries; positions stay."""
    memory = make(TurboQuant(4, 4, block=16, window=window, sink_tokens=1, **EXACT_SCALES))
    k, v = torch.randn(2, 41, KV_HEADS, DIM)
    memory.stage(k[:40], v[:40])
    memory.commit(40)
    keys, values = (x.clone() for x in memory.read())
    kept = torch.tensor([[0, 5, 17, 38, 39], [0, 1, 33, 38, 39]])
    memory.keep(kept)
    assert torch.equal(memory.entries(), kept)
    again = memory.read()
    exact = [0, 3, 4] if window else [0]
    for now, before, raw, coded in (
        (again[0], keys, k, coders_of(memory)["keys"]),
        (again[1], values, v, coders_of(memory)["values"]),
    ):
        for head in range(KV_HEADS):
            for i, j in enumerate(kept[head].tolist()):
                expected = raw[j, head] if i in exact else decoded(raw[j], coded, 4, "unbiased")[head].float()
                torch.testing.assert_close(now[head, i], expected, rtol=1e-5, atol=1e-5)
                if 0 < j < 32:  # was codes before
                    assert torch.equal(now[head, i], before[head, j])
    assert memory.nbytes == KV_HEADS * ((5 - len(exact)) * 2 * (8 + 4) + len(exact) * 2 * DIM * 4 + 5 * 4)
    memory.stage(k[40:], v[40:])
    mixed = memory.attend(torch.randn(1, HEADS, DIM), scale=1.0, causal=True)
    assert torch.isfinite(mixed).all()
    memory.commit(1)
    assert memory.held == 6


def test_a_fork_shares_codes_until_they_grow():
    """40 tokens in one block: who goes on fills it anew elsewhere, and the other's stays."""
    memory = make(TurboQuant(4, 4, block=16))
    k, v = torch.randn(2, 40, KV_HEADS, DIM)
    memory.stage(k, v)
    memory.commit(40)
    alone = resident_bytes([memory.memory])
    twin = memory.fork()
    assert resident_bytes([memory.memory, twin.memory]) == alone
    before = {name: x.clone() for name, x in twin.state().items()}
    memory.stage(k[:8], v[:8])
    memory.commit(8)
    assert resident_bytes([memory.memory, twin.memory]) > alone
    assert all(torch.equal(x, before[name]) for name, x in twin.state().items())


@pytest.mark.parametrize("name", ["dense", "value-only", "shared", "denoiser"])
@pytest.mark.parametrize(
    ("kv", "options"),
    [
        ("turboquant:4", {"block": 16}),
        ("turboquant:k3v2", {"block": 1, "window": 3, "sink_tokens": 2, "rotation": "haar", "seed": 5}),
        ("turboquant:3.5", {"block": 16, "variant": "prod", "scale_dtype": "float32"}),
    ],
)
def test_save_and_load(name, kv, options, tmp_path):
    for length in (0, 1, 70):
        memory = model(name).memory(kv, **options)
        if length:
            model(name).logits(random_ids(length), memory)
        memory.save(tmp_path / "memory.safetensors")
        loaded = model(name).load_memory(tmp_path / "memory.safetensors", kv, **options)
        assert same(snapshot(loaded), snapshot(memory))
        assert loaded.nbytes == memory.nbytes
        following = random_ids(20, 1)
        assert torch.equal(model(name).logits(following, loaded), model(name).logits(following, memory))
        assert same(snapshot(loaded), snapshot(memory))


def test_loading_refuses_other_settings(tmp_path):
    path = tmp_path / "memory.safetensors"
    filled("dense", 70, kv="turboquant:4").save(path)
    for kv, options, what in (
        ("turboquant:3", {}, "kv is 'turboquant:4'"),
        ("dense", {}, "kv is 'turboquant:4'"),
        ("turboquant:4", {"seed": 1}, "layers"),
        ("turboquant:4", {"block": 16}, "layers"),
        ("turboquant:4", {"rotation": "haar"}, "layers"),
        ("turboquant:4", {"scale_dtype": "float32"}, "layers"),
    ):
        with pytest.raises(CheckpointError, match=what):
            model("dense").load_memory(path, kv, **options)
    pairs = [tuple([random_rotation(8, seed + i) for i in range(2)] for seed in (0, 5)) for _ in range(2)]
    memory = model("dense").memory("turboquant:4", rotation=pairs[0])
    memory.save(path)
    model("dense").load_memory(path, "turboquant:4", rotation=pairs[1])
    other = ([random_rotation(8, 9)] * 2, pairs[0][1])
    with pytest.raises(CheckpointError, match="another rotation"):
        model("dense").load_memory(path, "turboquant:4", rotation=other)


def test_explicit_rotations():
    pair = tuple(torch.stack([random_rotation(8, seed + i) for i in range(2)]) for seed in (0, 5))
    memory = model("dense").memory("turboquant:4", rotation=pair)
    assert torch.equal(coders_of(memory, 1)["values"].quantiser.rotation.matrix, pair[1][1].float())
    for bad, what in (
        ((pair[0], pair[1] * 1.1), "not orthogonal"),
        ((pair[0][:, :4], pair[1]), r"\[4, 8\], not a real matrix \[8, 8\]"),
    ):
        with pytest.raises(ValueError, match=what):
            model("dense").memory("turboquant:4", rotation=bad)
    with pytest.raises(ValueError, match="fractional bits"):
        model("dense").memory("turboquant:3.5", rotation=pair)


def test_skipped_layers_stay_exact():
    memory = model("shared").memory("turboquant:4", skip_layers=(-2,))
    kinds = {i: isinstance(layer.group, CodedGroup) for i, layer in enumerate(memory.layers)}
    assert kinds == {0: False, 1: True, 2: False, 3: True, 4: False, 5: True}
    with pytest.raises(ValueError, match="names layer 9, the model has 2 layers"):
        model("dense").memory("turboquant:4", skip_layers=[9])


@pytest.mark.parametrize(
    "rope",
    [
        RopeParameters("default", 100.0),
        RopeParameters("default", 100.0, partial_rotary_factor=0.5),
        RopeParameters("yarn", 100.0, factor=4.0, original_max_position_embeddings=64),
    ],
)
def test_a_key_bias_is_known_in_advance(rope):
    d = 16
    inv_freq, scaling = inverse_frequencies(rope, d)
    bias = torch.randn(KV_HEADS, d)
    known = KeyBias(bias, rope)
    positions = torch.tensor([0, 3, 100, 7])
    table = known.rotated(positions)
    if scaling == 1.0:
        torch.testing.assert_close(
            table,
            apply_rope(bias[:, None].expand(-1, 4, -1)[..., None, :], positions.expand(2, 4), inv_freq)[..., 0, :],
        )
    q = torch.randn(3, HEADS, d)
    expected = torch.einsum("thd,hnd->thn", q, table.repeat_interleave(HEADS // KV_HEADS, 0))
    torch.testing.assert_close(known.logits(q, positions), expected, rtol=1e-5, atol=1e-5)
    scattered = torch.stack([positions, positions + 1])
    torch.testing.assert_close(known.rotated(scattered)[1], known.rotated(positions + 1)[1])
    table = known.rotated(scattered)
    expected = torch.einsum("thd,hnd->thn", q, table.repeat_interleave(HEADS // KV_HEADS, 0))
    torch.testing.assert_close(known.logits(q, scattered), expected, rtol=1e-5, atol=1e-5)
