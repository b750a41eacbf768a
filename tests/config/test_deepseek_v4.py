"""DeepSeek-V4's config.json against transformers' reading of it, in both dialects, and what is refused."""

import copy
import math
import random
import re

import pytest
import torch
import transformers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from sparing.config import parse_config
from sparing.config.deepseek_v4_dialects import CSA, HCA, SLIDING
from sparing.config.deepseek_v4_names import INNER, OUTER, canonical_name
from sparing.config.roles import EXPERTS
from sparing.errors import CheckpointError

YARN = {"type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 65536}


def released(seed: int = 0, **changes):
    """A small config as the releases write it."""
    choose = random.Random(seed)
    layers, drafting, head_dim = choose.randint(1, 7), choose.randint(0, 2), choose.choice([16, 32, 48])
    return {
        "model_type": "deepseek_v4",
        "vocab_size": 61,
        "hidden_size": 48,
        "moe_intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "head_dim": head_dim,
        "qk_rope_head_dim": choose.choice([2, 4, 8]),
        "q_lora_rank": 20,
        "o_groups": choose.choice([1, 2, 4]),
        "o_lora_rank": 12,
        "sliding_window": choose.choice([1, 6, 128]),
        "compress_ratios": [choose.choice([0, 4, 128]) for _ in range(layers)] + [0] * drafting,
        "rope_theta": choose.choice([1e4, 5e5]),
        "compress_rope_theta": choose.choice([160000, 4e4]),
        "rope_scaling": choose.choice([YARN, YARN | {"factor": 2.5}, None]),
        "index_n_heads": 16,
        "index_head_dim": 16,
        "index_topk": 3,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "num_hash_layers": choose.randint(0, 9),
        "num_nextn_predict_layers": drafting,
        "routed_scaling_factor": choose.choice([1.0, 2.5]),
        "scoring_func": choose.choice(["sqrtsoftplus", "sigmoid", "softmax"]),
        "swiglu_limit": choose.choice([7.0, 1.5]),
        "hc_mult": choose.randint(1, 4),
        "hc_sinkhorn_iters": choose.randint(1, 20),
        "max_position_embeddings": 4096,
        **changes,
    }


def theirs(raw):
    return transformers.DeepseekV4Config(**{key: value for key, value in raw.items() if key != "model_type"})


def saved(raw):
    """The same config as transformers writes it."""
    return theirs(raw).to_dict()


def same(ours, other):
    """Every number of a config as transformers reads it."""
    assert [layer.kind for layer in ours.layers] == other.layer_types
    rates = {SLIDING: 0, **other.compress_rates}
    assert [layer.ratio for layer in ours.layers] == [rates[kind] for kind in other.layer_types]
    assert [layer.is_hash for layer in ours.layers] == [kind == "hash_moe" for kind in other.mlp_layer_types]
    assert len(ours.mtp_layers) == other.num_nextn_predict_layers
    assert ours.num_experts == other.n_routed_experts and ours.top_k_experts == other.num_experts_per_tok
    for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "qk_rope_head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "sliding_window", "index_n_heads",
        "index_head_dim", "index_topk", "moe_intermediate_size", "scoring_func", "routed_scaling_factor",
        "swiglu_limit", "hc_mult", "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps", "max_position_embeddings",
        "bos_token_id", "pad_token_id", "tie_word_embeddings",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(other, name), name
    assert ours.eos_token_ids == (other.eos_token_id,)
    for kind, rope in ours.rope.items():
        expected = other.rope_parameters[kind]
        assert rope.partial_rotary_factor * ours.head_dim == pytest.approx(ours.qk_rope_head_dim)
        for key in ("rope_type", "rope_theta", *(YARN.keys() - {"type"} if rope.rope_type == "yarn" else ())):
            assert getattr(rope, key) == expected[key], (kind, key)
        assert (rope.attention_factor or 1.0) == expected.get("attention_factor", 1.0)


def test_defaults_are_those_of_transformers():
    same(parse_config({"model_type": "deepseek_v4"}), transformers.DeepseekV4Config())


@pytest.mark.parametrize("seed", range(40))
def test_both_dialects_are_read_as_transformers_reads_them(seed):
    raw = released(seed)
    ours = parse_config(raw)
    same(ours, theirs(raw))
    assert parse_config(saved(raw)) == ours
    assert not ours.unknown
    assert parse_config(saved(raw) | {"compress_ratios": raw["compress_ratios"]}) == ours  # both, where they agree


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_without_any_list_layers_are_those_of_transformers(count):
    raw = {key: value for key, value in released().items() if key not in ("compress_ratios", "num_hash_layers")}
    raw |= {"num_hidden_layers": count, "compress_rate_csa": 3, "compress_rate_hca": 8}
    same(parse_config(raw), theirs(raw))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rates", [None, {CSA: 3, HCA: 5}, {CSA: 1, HCA: 4}])
def test_tensors_are_those_of_transformers_model(seed, rates):
    raw = released(seed, scoring_func="sigmoid")  # transformers reads "softmax" and has no function of that name
    if rates is not None:
        raw = {key: value for key, value in saved(raw).items() if value is not None} | {"compress_rates": rates}
        same(parse_config(raw), theirs(raw))
    with torch.device("meta"):
        model = transformers.DeepseekV4ForCausalLM(theirs(raw))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: shape for name, (shape, _) in parse_config(raw).tensors().items()} == expected


def test_layers_that_draft_are_sliding_and_routed_by_score_unless_ratios_say_otherwise():
    raw = released(num_hidden_layers=2, compress_ratios=[4, 128, 0], num_nextn_predict_layers=1, num_hash_layers=9)
    config = parse_config(raw)
    assert [(layer.kind, layer.is_hash) for layer in config.layers] == [(CSA, True), (HCA, True)]
    assert [(layer.kind, layer.is_hash) for layer in config.mtp_layers] == [(SLIDING, False)]
    tensors = config.mtp.tensors()
    assert all(name.startswith("mtp.0.") for name in tensors)
    assert {"mtp.0.e_proj.weight", "mtp.0.hnorm.weight", "mtp.0.hc_head.hc_fn", "mtp.0.norm.weight"} <= tensors.keys()
    assert not any("compressor" in name or "tid2eid" in name for name in tensors)
    with_entries = parse_config(raw | {"compress_ratios": [4, 128, 128]}).mtp
    assert with_entries.tensors()["mtp.0.self_attn.compressor.position_bias"][0] == (128, config.head_dim)


L2 = released(num_hidden_layers=2, compress_ratios=[4, 0, 0], num_nextn_predict_layers=1, num_hash_layers=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compress_ratios": [4]}, r"compress_ratios has 1 entries, expected num_hidden_layers 2 \+ num_nextn.* 1 = 3"),
        ({"compress_ratios": [4, 0, 0, 0]}, r"compress_ratios has 4 entries, expected .* = 3"),
        ({"compress_ratios": [4, 8, 0]}, r"compress_ratios\[1\] is 8, expected 0, 4 or 128$"),
        ({"compress_ratios": [4, True, 0]}, r"compress_ratios\[1\] is True, expected 0, 4 or 128$"),
        ({"compress_ratios": [2, 1, 0]}, r"compress_ratios\[0\] is 2, .*DeepSeek-V4\.1.* is not supported"),
        ({"compress_ratios": 4}, "compress_ratios is 4, expected a list"),
        ({"layer_types": [CSA, HCA]}, r"compress_ratios\[1\] is 0, layer_types\[1\] is 'heavily.*the same, give one"),
        ({"layer_types": [CSA]}, "layer_types has 1 entries, num_hidden_layers is 2"),
        ({"layer_types": [CSA, "full_attention"]}, r"layer_types\[1\] is 'full_attention', supported: 'sliding"),
        ({"mlp_layer_types": ["moe", "moe"]}, r"num_hash_layers is 1, mlp_layer_types\[0\] is 'moe'.*give one"),
        ({"mlp_layer_types": ["hash_moe", "mlp"]}, r"mlp_layer_types\[1\] is 'mlp', supported: 'hash_moe', 'moe'"),
        ({"mlp_layer_types": ["hash_moe"]}, "mlp_layer_types has 1 entries, num_hidden_layers is 2"),
        ({"num_hash_layers": -1}, "num_hash_layers is -1"),
        ({"compress_rates": {CSA: 8}}, r"compress_ratios\[0\] is 4, compress_rates\['compressed.*'\] is 8: .*give one"),
        ({"compress_rates": {"csa": 8}}, "compress_rates: 'csa' is no kind of layer"),
        ({"compress_rates": {CSA: 4}, "compress_rate_csa": 5}, r"compress_rate_csa is 5, compress_rates.* is 4"),
        ({"partial_rotary_factor": 1.0}, "qk_rope_head_dim is 8, partial_rotary_factor is 1.0 of head_dim 48"),
        ({"qk_rope_head_dim": 3}, "3 of head_dim 48 dimensions turn .*expected an even number"),
        ({"qk_rope_head_dim": 50}, "50 of head_dim 48 dimensions turn"),
        ({"index_head_dim": 4}, "index_head_dim is 4, of which qk_rope_head_dim 8 cannot turn"),
        ({"rope_parameters": {"main": {}}}, "expected an object main and one compress"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type is 'linear', supported: 'default', 'yarn'"),
        ({"rope_parameters": YARN, "rope_scaling": YARN | {"factor": 2}}, "rope_scaling is .* beside rope_parameters"),
        (
            {"rope_parameters": {"main": {"rope_theta": 2e4}, "compress": {}}},
            r"rope_theta is .*, rope_parameters.main says 20000.0: .*give one",
        ),
        ({"o_groups": 3}, "num_attention_heads 4 is not a multiple of o_groups 3"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, there are only 8 experts"),
        ({"n_shared_experts": 2}, "n_shared_experts is 2, supported: 1"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False, supported: True"),
        ({"scoring_func": "relu"}, "scoring_func is 'relu', supported"),
        ({"swiglu_limit": 0}, "swiglu_limit is 0, expected a number above 0"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"expert_dtype": "int3"}, "expert_dtype is 'int3', supported"),
        (
            {"expert_dtype": "fp4", "quantization_config": {"quant_method": "fp8", "expert_dtype": "fp8"}},
            "expert_dtype is 'fp4', in quantization_config it is 'fp8'",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}},
            r"quantization_config: weight_block_size is \[32, 32\], expected \[128, 128\]: DeepSeek-V4\.1",
        ),
        ({"engram_vocab_size": 5}, r"engram_vocab_size is stated: DeepSeek-V4\.1"),
        ({"rope_interleaved": True}, "rope_interleaved is True, which changes positions"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_or_is_of_another_model_is_refused_by_name(change, message):
    raw = L2 | {"head_dim": 48, "qk_rope_head_dim": 8}
    with pytest.raises(CheckpointError, match=f"^config.json: ?.*{message}"):
        parse_config({**raw, "rope_scaling": None, **change})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, (False, None)),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, (True, None)),
        ({"quantization_config": {"quant_method": "fp8"}, "expert_dtype": "fp4"}, (True, "fp4")),
        ({"quantization_config": {"quant_method": "fp8", "expert_dtype": "fp8"}}, (True, "fp8")),
    ],
)
def test_what_is_said_of_stored_types(change, expected):
    config = parse_config(L2 | change)
    assert (config.is_fp8, config.expert_dtype) == expected


def test_what_nobody_reads_is_kept():
    assert parse_config(L2 | {"dspark_layers": 3}).unknown == {"dspark_layers": 3}


def test_a_later_drafting_head_is_refused_where_it_is_asked_for():
    head = parse_config(L2).mtp
    own = [*head.tensors(), "mtp.0.mlp.experts.3.gate_proj.weight", "mtp.0.head.weight", "mtp.0.emb.tok_emb.weight"]
    head.refuse_later([*own, "model.norm.weight"], "x")
    for other in ("main_proj", "self_attn.head", "embedded_adapter", "mlp.experts.8.gate_proj"):
        with pytest.raises(CheckpointError, match=rf"^x: mtp\.0\.{other}\.weight is no tensor of .* use draft='ngram'"):
            head.refuse_later([*own, f"mtp.0.{other}.weight"], "x")


def released_names(config):
    """What a release calls the tensors of a model and of the layers that draft, experts one by one."""
    outer, inner = ({new: old for old, new in table.items()} for table in (OUTER, INNER))
    for name, (shape, role) in (config.tensors() | config.mtp.tensors()).items():
        matrices = [name]
        if role is EXPERTS:
            halves = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
            matrices = [f"{name.rpartition('.')[0]}.{e}.{half}.weight" for e in range(shape[0]) for half in halves]
        for matrix in matrices:
            prefix, own = re.fullmatch(r"(?:model\.)?(layers\.\d+\.|mtp\.\d+\.|)(.+)", matrix).groups()
            table, own = (inner, own) if prefix else (outer, matrix)
            module = re.sub(r"\.experts\.\d+\.", ".experts.N.", own)
            old = table.get(module) or table.get(module.removesuffix(".weight"), module.removesuffix(".weight"))
            old += ".weight" if own.endswith(".weight") else ""
            number = re.search(r"\.experts\.\d+\.", own)
            yield prefix + (old.replace(".experts.N.", number[0]) if number else old), matrix


FULL = released(num_hidden_layers=3, compress_ratios=[0, 4, 128, 0], num_nextn_predict_layers=1, num_hash_layers=1)


def test_released_names_are_those_that_transformers_takes_for_the_same_tensors():
    raw = FULL | {"scoring_func": "sqrtsoftplus"}
    config = parse_config(raw)
    with torch.device("meta"):
        model = transformers.DeepseekV4ForCausalLM(theirs(raw))
    mapping = get_checkpoint_conversion_mapping("deepseek_v4")
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    seen = set()
    for name, ours in released_names(config):
        assert canonical_name(name) == ours
        assert canonical_name(ours) == ours
        if not name.startswith("mtp."):  # which transformers drops
            hf, _ = rename_source_key(name, renamings, converters, "model", model.state_dict())
            stacked = re.sub(r"experts\.\d+\.(gate|up)_proj\.weight", "experts.gate_up_proj", ours)
            assert hf == re.sub(r"experts\.\d+\.down_proj\.weight", "experts.down_proj", stacked)
            seen.add(hf)
    assert seen == model.state_dict().keys()


def test_names_of_what_stands_beside_a_weight():
    for name, expected in {
        "layers.07.attn.wq_b.scale": "model.layers.07.self_attn.q_b_proj.scale",
        "mtp.1.attn.indexer.wq_b.weight_scale_inv": "mtp.1.self_attn.compressor.indexer.q_b_proj.weight_scale_inv",
        "mtp.0.ffn.experts.5.w2.scale": "mtp.0.mlp.experts.5.down_proj.scale",
        "mtp.0.e_proj.scale": "mtp.0.e_proj.scale",
        "mtp.0.hc_head_fn": "mtp.0.hc_head.hc_fn",
        "something.else": "something.else",
    }.items():  # fmt: skip
        assert canonical_name(name) == expected


@pytest.mark.parametrize("expert_dtype", ["fp4", None, "fp8", "bf16"])
def test_what_a_release_holds_is_every_number_once(expert_dtype):
    raw = FULL | {"hidden_size": 160, "moe_intermediate_size": 96, "expert_dtype": expert_dtype}
    config = parse_config(raw | {"quantization_config": {"quant_method": "fp8"}})
    per_byte = {"int8": 2, "float8_e8m0fnu": 0}
    numbers: dict = {}
    for role, copies, (dtype, shape) in config.released(drafting=False):
        numbers[role] = numbers.get(role, 0) + copies * math.prod(shape) * per_byte.get(dtype, 1)
    for role in numbers:
        assert numbers[role] == sum(math.prod(s) for s, own in config.tensors().values() if own is role), role
    types = {dtype for role, _, (dtype, _) in config.released(drafting=False) if role is EXPERTS}
    expected = {"fp8": {"float8_e4m3fn", "float8_e8m0fnu"}, "bf16": {"bfloat16"}}
    assert types == expected.get(expert_dtype, {"int8", "float8_e8m0fnu"})
    assert sum(copies for _, copies, part in config.released(drafting=True) if part[0] != "float8_e8m0fnu") == len(
        list(released_names(config))
    )


STRANGE = [
    None,
    "x",
    -1,
    0,
    3,
    1.5,
    True,
    [],
    [1],
    ["a"],
    [[]],
    {},
    {"a": 1},
    {"main": 1},
    10**12,
    10**400,
    math.inf,
    math.nan,
]


@pytest.mark.parametrize("dialect", ["released", "transformers"])
def test_every_key_with_every_strange_value_is_read_or_refused_in_a_line(dialect):
    quantised = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}, "expert_dtype": "fp4"}
    raw = FULL | quantised if dialect == "released" else saved(FULL)
    parse_config(raw)
    inner = [(key, name) for key, value in raw.items() if isinstance(value, dict) for name in value]
    for path in [*((key,) for key in raw), *inner]:
        for value in (*STRANGE, "missing"):
            config = copy.deepcopy(raw)
            place = config[path[0]] if len(path) > 1 else config
            place.pop(path[-1])
            if value != "missing":
                place[path[-1]] = value
            try:
                parse_config(config)
            except CheckpointError as error:
                assert str(error).startswith("config.json: ") and len(str(error)) < 400, (path, value)  # noqa: PT017


@pytest.mark.parametrize("name", ["deepseek_v41", "deepseek_v4_1", "deepseek_v4.1_flash", "deepseek_v32"])
def test_relatives_are_refused_by_name(name):
    other = "DeepSeek-V4.1, another architecture" if "2" not in name else "can be planned, not run"
    with pytest.raises(CheckpointError, match=f"model_type is '{name}' .*{other}.*, supported: .*deepseek_v4"):
        parse_config({"model_type": name})
