"""DeepSeek-V4 against transformers, on tiny random models loaded from saved checkpoints.

The reference attends to all compressed entries under a mask and forgets its roll-back; what it computes is the same.
Rows of different lengths are compared one by one: the reference forms windows of padding too.
"""

import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache

from sparing.checkpoint import save_weights, write_json
from sparing.config.deepseek_v4_names import INNER, OUTER
from sparing.errors import CheckpointError
from sparing.kernels.microscaling import mxfp4_pack, ue8m0_decode, ue8m0_encode
from sparing.models.batch import Row
from sparing.weights.weight import PackedWeight
from tests.conformance.reference import assert_same, load, run_chunked, run_reference, save_random
from tests.tiny import COMPRESSED, CSA, HCA, SLIDING, built, compressed_scale, random_ids

CASES = {
    "every layer": {},
    "two streams": {"hc_mult": 2, "hc_sinkhorn_iters": 3},
    "four streams": {"hc_mult": 4},
    "sliding alone": {"layer_types": [SLIDING] * 5},
    "overlapping windows alone": {"layer_types": [CSA] * 5, "index_topk": 2, "sliding_window": 3},
    "windows alone": {"layer_types": [HCA] * 5, "compress_rates": {CSA: 4, HCA: 3}},
    "all entries chosen": {"index_topk": 100},
    "by score alone": {"mlp_layer_types": ["moe"] * 5, "swiglu_limit": 10.0},
    "by id alone": {"mlp_layer_types": ["hash_moe"] * 5},
    "plain rotation": {"rope_parameters": None},
    "one group of heads": {"o_groups": 1, "routed_scaling_factor": 2.5},
}
TOLERANCE = 4e-5  # of logits of about 5; the reference's own cached and uncached runs differ by half of it


@cache
def pair(case: str):
    """(the reference, our model loaded from its checkpoint)"""
    with TemporaryDirectory() as folder:
        config = DeepseekV4Config(**COMPRESSED | CASES[case])
        theirs = save_random(DeepseekV4ForCausalLM, config, Path(folder), seed=1, scale=compressed_scale)
        return theirs, load(Path(folder))


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_and_logits(case):
    theirs, ours = pair(case)
    for length in (1, 3, 4, 8, 61):
        tokens = random_ids(length)
        reference = run_reference(theirs, tokens)
        hidden = ours.hidden_states(tokens)
        streams = [state for state in reference.hidden_states if state.ndim == 4]  # the last is the one that is normed
        assert len(hidden) >= len(streams)
        for mine, other in zip(hidden, streams, strict=False):
            assert_same(mine, other[0], TOLERANCE)
        with torch.no_grad():
            assert_same(ours.collapsed(hidden[-1]), reference.hidden_states[-1][0], TOLERANCE)
        assert_same(ours.logits(tokens), reference.logits[0], TOLERANCE)


@pytest.mark.parametrize("case", ["every layer", "overlapping windows alone", "windows alone"])
def test_every_way_to_cut_the_text(case):
    theirs, ours = pair(case)
    tokens = random_ids(41)
    reference = run_reference(theirs, tokens).logits[0]
    for chunks in ([1] * 41, [5, 1, 1, 7, 1, 26], [13, 9, 19], [8, 8, 25], *([cut, 41 - cut] for cut in (3, 4, 5, 7))):
        assert_same(run_chunked(ours, tokens, chunks), reference, TOLERANCE)


def test_entries_are_those_of_the_reference():
    theirs, ours = pair("every layer")
    cache, memory = DynamicCache(config=theirs.config), ours.memory()
    for chunk in random_ids(30).split([9, 1, 20]):
        with torch.no_grad():
            theirs(input_ids=chunk[None], past_key_values=cache)
        ours.logits(chunk, memory)
    for layer, kind in zip(cache.layers, ours.config.layers, strict=True):
        state = memory.layers[cache.layers.index(layer)].state()
        assert_same(state["window"][1:], layer.keys[0, 0], 1e-5)  # the reference holds one token less
        if kind.ratio:
            assert_same(state["compressed"], layer.compressed_kv["compressor"][0], 1e-5)
        if kind.kind == CSA:
            assert_same(state["keys"], layer.compressed_kv["indexer"][0], 1e-5)


def test_rows_of_a_batch_are_those_of_the_reference():
    theirs, ours = pair("every layer")
    rows = [random_ids(length, seed=length) for length in (1, 19, 8)]
    memories = [ours.memory() for _ in rows]
    for part in (slice(0, 1), slice(1, None)):  # the first token of each, then what follows
        given = [(tokens[part], memory) for tokens, memory in zip(rows, memories, strict=True) if len(tokens[part])]
        logits = ours.head(ours.run([Row(tokens, memory) for tokens, memory in given]))
        for (tokens, memory), mine in zip(given, logits.split([len(t) for t, _ in given]), strict=True):
            memory.commit(len(tokens))
            whole = next(row for row, of in zip(rows, memories, strict=True) if of is memory)
            assert_same(mine, run_reference(theirs, whole).logits[0, part], TOLERANCE)


def test_rejected_tokens_leave_no_trace():
    theirs, ours = pair("every layer")
    tokens = random_ids(40)
    reference = run_reference(theirs, tokens).logits[0]
    memory, at = ours.memory(), 0
    for kept, rejected in ((7, 5), (1, 9), (4, 0), (3, 1), (12, 13), (13, 2)):
        wrong = random_ids(rejected, seed=99 + at)
        logits = ours.head(ours.run([Row(torch.cat([tokens[at : at + kept], wrong]), memory)]))
        memory.commit(kept)
        assert_same(logits[:kept], reference[at : at + kept], TOLERANCE)
        at += kept
    assert at == 40


# As released: ratios of 4 and 128, and sizes that its packed formats take.
RELEASED = COMPRESSED | {
    "hidden_size": 160,
    "compress_rates": {CSA: 4, HCA: 128},
    "head_dim": 64,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 96,
    "o_lora_rank": 128,
    "index_head_dim": 32,
    "moe_intermediate_size": 128,
    "eos_token_id": None,
}
DIALECT = {  # of its config, in place of what transformers writes
    "compress_ratios": [0, 128, 4, 128, 4, 0],
    "num_hash_layers": 2,
    "rope_scaling": COMPRESSED["rope_parameters"] | {"type": "yarn"},
}
TRANSFORMERS_ALONE = ("layer_types", "mlp_layer_types", "compress_rates", "rope_parameters", "partial_rotary_factor")


def released_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a model as its release names them, experts one by one."""
    names: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix(".gate_up_proj")
            for e, matrix in enumerate(tensor):
                gate, up = matrix.chunk(2)
                names |= {f"{stem}.{e}.gate_proj.weight": gate, f"{stem}.{e}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix(".down_proj")
            names |= {f"{stem}.{e}.down_proj.weight": matrix for e, matrix in enumerate(tensor)}
        else:
            names[name] = tensor
    theirs = {ours: released for released, ours in INNER.items() if released != "attn.norm"}
    outer = {ours: released for released, ours in OUTER.items()}

    def renamed(name: str) -> str:
        match = re.fullmatch(r"(?:model\.)?((?:layers|mtp)\.\d+\.)(.+)", name)
        table, prefix, inner = (theirs, *match.groups()) if match else (outer, "", name)
        plain = re.sub(r"experts\.\d+\.", "experts.N.", inner)
        module, _, leaf = plain.rpartition(".")
        new = table.get(plain) or (f"{table[module]}.{leaf}" if module in table else plain)
        number = re.search(r"experts\.\d+\.", inner)
        return prefix + (new.replace("experts.N.", number[0]) if number else new)

    return {renamed(name): tensor.clone() for name, tensor in names.items()}


def packed(tensors: dict[str, torch.Tensor], experts: str) -> dict[str, torch.Tensor]:
    """Matrices in FP8 by blocks, experts in FP4 or FP8, with scales that are powers of two, as the release has them."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        scale = name.removesuffix("weight") + "scale"
        if ".experts." in name and experts == "fp4":
            codes, scales = mxfp4_pack(tensor)
            found |= {name: codes.view(torch.int8), scale: scales.view(torch.float8_e8m0fnu)}
        elif re.search(r"attn\.(wq|wkv|wo)|indexer\.wq_b|experts|[eh]_proj", name):
            out, size = tensor.shape
            wide = torch.nn.functional.pad(tensor, (0, -size % 128, 0, -out % 128))
            tiles = wide.unflatten(0, (-1, 128)).unflatten(-1, (-1, 128)).abs().amax((1, 3))
            scales = ue8m0_encode(tiles / 448)
            spread = ue8m0_decode(scales).repeat_interleave(128, 0).repeat_interleave(128, 1)[:out, :size]
            codes = (tensor / spread).to(torch.float8_e4m3fn)
            found |= {name: codes, scale: scales.view(torch.float8_e8m0fnu)}
        else:
            found[name] = tensor if tensor.dtype == torch.int64 or "hc_" in name else tensor.bfloat16()
    return found


@cache
def released_model():
    return built(RELEASED, seed=3)


def write(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> Path:
    save_weights(folder, tensors)
    write_json(folder / "config.json", config)
    return folder


def in_dialect(**more: object) -> dict:
    return {key: value for key, value in RELEASED.items() if key not in TRANSFORMERS_ALONE} | DIALECT | more


@pytest.mark.parametrize("expert", [-1, 8])
def test_a_table_that_names_other_experts_is_refused(expert, tmp_path):
    tensors = {name: tensor.clone() for name, tensor in released_model().state_dict().items()}
    name = "model.layers.1.mlp.gate.tid2eid"
    tensors[name][60, 2] = expert
    message = rf"{re.escape(name)} holds {expert}, expected numbers from 0 to 7: config.json states 8 experts"
    with pytest.raises(CheckpointError, match=message):
        load(write(tmp_path, RELEASED, tensors))


def test_names_and_config_of_the_release_give_the_same_model(tmp_path):
    ours, tokens = released_model(), random_ids(150)
    state = {name: tensor for name, tensor in ours.state_dict().items() if not name.startswith("mtp.")}
    for i, (config, tensors) in enumerate(((RELEASED, state), (in_dialect(), released_names(state)))):
        assert torch.equal(load(write(tmp_path / str(i), config, tensors)).logits(tokens), ours.logits(tokens))


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
@pytest.mark.parametrize("stated", [True, False])
def test_packed_releases_stay_packed(experts, stated, tmp_path):
    """Matrices multiply as they are stored, equal to what they stand for; the rest is dense."""
    tensors = packed(released_names(dict(released_model().state_dict())), experts)
    quantised = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    config = in_dialect(quantization_config=quantised, **{"expert_dtype": experts} if stated else {})
    ours = load(write(tmp_path / "packed", config, tensors), dtype="float32")
    formats = {part.format for part in ours.modules() if isinstance(part, PackedWeight)}
    assert formats == {"fp8"} | ({"mxfp4"} if experts == "fp4" else set())
    dense = {
        name: tensor.dequantize() if isinstance(tensor, PackedWeight) else tensor
        for name, tensor in whole_weights(ours).items()
    }
    plain = load(write(tmp_path / "plain", in_dialect(), released_names(dense)), dtype="float32")
    tokens = random_ids(150)
    assert_same(ours.logits(tokens), plain.logits(tokens), TOLERANCE)
    memory = ours.memory()
    assert_same(torch.cat([ours.logits(t, memory) for t in tokens[:20].split(1)]), plain.logits(tokens[:20]), TOLERANCE)


def whole_weights(model) -> dict:
    """Parameters and buffers by name, packed ones as one."""
    found, inside = {}, []
    for name, part in model.named_modules():
        if isinstance(part, PackedWeight):
            found[name] = part
            inside.append(name + ".")
    own = {n: t for n, t in model.state_dict().items() if not n.startswith(tuple(inside))}
    return found | own
