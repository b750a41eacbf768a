"""DeepSeek-V4 against the published listings of its files and the figures of its report, V3.2 beside it."""

import json
import math
from dataclasses import replace

import pytest

from sparing.config import parse_config, planned_config
from sparing.config.formats import ITEM_SIZES
from sparing.config.released import RELEASED
from sparing.planning import plan
from sparing.planning.fp8 import against_v32, fp8_operations
from sparing.planning.memory import bytes_read, memory_by_kind
from sparing.planning.parameters import bits_per_parameter, count_parameters, held_bytes
from sparing.planning.roofline import attention_flops, decode_pass, prefill_pass

MILLION, MAXIMUM = 10**6, 2**20
SIZES = ("pro", "flash")


def config(size):
    return parse_config(RELEASED[f"deepseek-v4-{size}"])


def v32():
    return planned_config(RELEASED["deepseek-v3.2"])


def released_specs(config, **changes):
    return [replace(spec, codes=replace(spec.released, **changes)) for spec in config.memory_specs()]


def entries(name, tokens):
    """Bytes of all entries and indexer keys, which is what the report counts."""
    result = plan(name, context=tokens, kv="released")
    held = dict(result.memory_by_kind)
    assert result.memory_bytes == sum(held.values())
    held.pop("compressors", None)
    return sum(held.values())


def by_type(config):
    held: dict[str, int] = {}
    for _, copies, (dtype, shape) in config.released(drafting=True):
        held[dtype] = held.get(dtype, 0) + copies * math.prod(shape) * ITEM_SIZES[dtype]
    return held


def test_files_of_pro_are_those_of_the_published_listing():
    pro = config("pro")
    parts = list(pro.released(drafting=True))
    assert sum(copies for _, copies, _ in parts) == 145_116
    assert sum(copies * math.prod(shape) for _, copies, (_, shape) in parts) == 861_608_274_846
    assert sum(by_type(pro).values()) == 864_704_792_696
    drafting = sum(by_type(pro).values()) - sum(by_type(replace(pro, mtp_layers=())).values())
    assert drafting == 13_956_587_692
    assert plan("deepseek-v4-pro", context=1).weight_bytes == 864_704_792_696


def test_files_of_flash_are_those_of_the_published_listing():
    flash = config("flash")
    assert sum(copies for _, copies, _ in flash.released(drafting=True)) == 69_187
    assert by_type(flash) == {
        "bfloat16": 2_830_518_528,
        "float32": 144_672_072,
        "float8_e4m3fn": 6_023_020_544,
        "float8_e8m0fnu": 8_858_737_664,
        "int64": 18_616_320,
        "int8": 141_733_920_768,
    }
    result = plan("deepseek-v4-flash", context=1)
    assert result.weight_bytes == 159_609_485_896
    assert any("in 69187 tensors" in note for note in result.notes)


@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [
        ("deepseek-v4-pro", 1572.997e9, 47.926e9 + 0.927e9),
        ("deepseek-v4-flash", 284.332e9, 12.740e9 + 0.530e9),
        ("deepseek-v3.2", 671e9, 36.55e9 + 0.927e9),
    ],
)
def test_parameters_are_the_published_ones(name, parameters, active):
    result = plan(name, context=1)
    assert result.parameters == pytest.approx(parameters, abs=1e6 if "v4" in name else 1e9)
    assert result.active_parameters == pytest.approx(active, abs=2e6)


@pytest.mark.parametrize(
    ("tokens", "pro", "flash", "v32"), [(MILLION, 5.036, 3.517, 48.068), (MAXIMUM, 5.280, 3.688, 50.403)]
)
def test_memory_as_released(tokens, pro, flash, v32):
    held = {name: entries(f"deepseek-{name}", tokens) / 1e9 for name in ("v4-pro", "v4-flash", "v3.2")}
    assert held == pytest.approx({"v4-pro": pro, "v4-flash": flash, "v3.2": v32}, abs=6e-4)
    assert held["v3.2"] / held["v4-pro"] == pytest.approx(9.545, abs=6e-4)
    assert held["v3.2"] / held["v4-flash"] == pytest.approx(13.666, abs=6e-4)
    assert plan("deepseek-v3.2", context=tokens, kv="released").memory_bytes == 61 * (656 + 132) * tokens


@pytest.mark.parametrize("size", SIZES)
def test_memory_is_the_closed_form_for_any_number_of_tokens(size):
    model = config(size)
    kinds = [layer.ratio for layer in model.layers]
    for tokens in (0, 1, 3, 4, 127, 128, 130, 5000, MILLION):
        for specs, e, key in ((released_specs(model), 584, 68), (model.memory_specs(), 1024, 256)):
            held = memory_by_kind(specs, tokens, 2)
            state = held.pop("compressors")
            sparse, heavy = kinds.count(4), kinds.count(128)
            expected = (
                len(kinds) * min(tokens, 128) * e + sparse * (tokens // 4) * (e + key) + heavy * (tokens // 128) * e
            )
            assert sum(held.values()) == expected
            assert state == 1024 * (sparse * (12 + 3) + heavy * 6)  # (largest logit, sum, weighted sum) in float32
    assert state < 2**20


def test_memory_in_16_bits_grows_by_the_closed_form():
    """Of Pro, per token: 30 layers of a 1024-byte entry and a 256-byte key for 4, 31 of an entry for 128."""
    grown = (
        plan("deepseek-v4-pro", context=2 * MAXIMUM).memory_bytes
        - plan("deepseek-v4-pro", context=MAXIMUM).memory_bytes
    )
    assert grown / MAXIMUM == 9848


def test_indexer_keys_in_fp8_cost_a_part_of_the_saving():
    """What engines keep that have no FP4: 8.71 and 12.47 times less than V3.2, not 9.5 and 13.7."""
    for size, ratio in {"pro": 8.71, "flash": 12.47}.items():
        held = memory_by_kind(released_specs(config(size), key_bits=8), MILLION, 2)
        held.pop("compressors")
        assert 61 * 788 * MILLION / sum(held.values()) == pytest.approx(ratio, abs=6e-3)


def test_share_of_grouped_heads_in_16_bits():
    for size, share in {"pro": 2.02, "flash": 2.00}.items():
        grouped = config(size).num_hidden_layers * 4096 * MILLION  # 8 key heads of 128 numbers
        assert 100 * entries(f"deepseek-v4-{size}", MILLION) / grouped == pytest.approx(share, abs=6e-3)


@pytest.mark.parametrize(
    ("size", "parts", "total", "share"),
    [
        ("pro", {"attention": 147.2, "indexer": 61.4, "weights": 93.8, "weights_16_bits": 4.2 + 3.7}, 0.3102, 27.08),
        ("flash", {"attention": 45.2, "indexer": 43.0, "weights": 24.7, "weights_16_bits": 1.6 + 2.1}, 0.1166, 10.18),
    ],
)
def test_operations_of_a_token_at_a_million(size, parts, total, share):
    model = config(size)
    done = fp8_operations(model, model.memory_specs(), MILLION)
    assert {part: n / 1e9 for part, n in done.items()} == pytest.approx(parts, abs=0.06)
    assert sum(done.values()) / 1e12 == pytest.approx(total, abs=6e-5)
    theirs = fp8_operations(v32(), v32().memory_specs(), MILLION)
    assert 100 * sum(done.values()) / sum(theirs.values()) == pytest.approx(share, abs=6e-3)
    assert against_v32(model, released_specs(model), MILLION)[1] == sum(done.values()) / sum(theirs.values())
    note = next(note for note in plan(f"deepseek-v4-{size}", context=MILLION, kv="released").notes if "V3.2" in note)
    assert f"{share:.2f}% of its operations" in note


def test_operations_of_v32():
    done = fp8_operations(v32(), v32().memory_specs(), MILLION)
    expected = {"attention": 69.6, "indexer": 999.4, "weights": 73.1, "weights_16_bits": 3.7}
    assert {part: n / 1e9 for part, n in done.items()} == pytest.approx(expected, abs=0.06)
    assert sum(done.values()) / 1e12 == pytest.approx(1.146, abs=6e-4)
    assert sum(fp8_operations(v32(), v32().memory_specs(), MAXIMUM).values()) / 1e12 == pytest.approx(1.194, abs=6e-4)


def test_operations_at_the_full_context():
    theirs = sum(fp8_operations(v32(), v32().memory_specs(), MAXIMUM).values())
    for size, share in {"pro": 26.74, "flash": 10.10}.items():
        done = sum(fp8_operations(config(size), config(size).memory_specs(), MAXIMUM).values())
        assert 100 * done / theirs == pytest.approx(share, abs=6e-3)


def test_every_operation_counted_once_gives_other_shares():
    """What `flops_per_token` says: operations of any type are one each."""
    flops = {name: plan(f"deepseek-{name}", context=MILLION).flops_per_token for name in ("v4-pro", "v4-flash", "v3.2")}
    assert flops["v4-pro"] / flops["v3.2"] == pytest.approx(0.265, abs=6e-4)
    assert flops["v4-flash"] / flops["v3.2"] == pytest.approx(0.122, abs=6e-4)


@pytest.mark.parametrize("tokens", [1, 4, 130, 700, 2600])
def test_a_prompt_is_as_much_attention_as_its_tokens_one_by_one(tokens):
    for model in (config("flash"), config("pro"), v32()):
        specs, bits = model.memory_specs(), dict.fromkeys(count_parameters(model.tensors()), 16.0)
        for spec in dict.fromkeys(specs):
            one_by_one = sum(attention_flops(model, [spec], n, new=1) for n in range(tokens))
            without = replace(spec, window=0, ratio=0)
            prompt = [prefill_pass(model, [s], tokens=tokens, batch=1, bits=bits).flops for s in (spec, without)]
            assert prompt[0] - prompt[1] == one_by_one


def test_a_step_reads_chosen_entries_and_all_keys():
    model = config("pro")
    read = bytes_read(released_specs(model), MILLION, 2)
    state = 2 * 1024 * (30 * 15 + 31 * 6)
    assert read == 61 * 128 * 584 + 30 * (1024 * 584 + MILLION // 4 * 68) + 31 * (MILLION // 128) * 584 + state
    counts, held = count_parameters(model.tensors()), held_bytes(model)
    step = decode_pass(model, released_specs(model), context=MILLION, batch=1, bits=bits_per_parameter(counts, held))
    weights = sum(held[kind] for kind in ("matrices", "vectors", "float32", "head")) + held["experts"] * 6 / 384
    assert step.nbytes == pytest.approx(read + weights + 2 * 7168)  # and a row of the embedding


def test_quantised_anew():
    """Experts and matrices in the format; what stays dense, in the stored type."""
    for weights, bits in {"int4": 4.5, "mxfp4": 4.25, "int8": 8}.items():
        result = plan("deepseek-v4-flash", context=1, weights=weights)
        assert result.weight_bytes == pytest.approx(result.parameters * bits / 8, rel=0.02)
        assert not any("release stores" in note for note in result.notes)


def test_a_policy_that_does_not_go_with_compressed_entries():
    for name in ("deepseek-v4-pro", "deepseek-v3.2"):
        with pytest.raises(ValueError, match="use kv='dense' or kv='released'"):
            plan(name, context=10, kv="turboquant:4")


def test_a_config_without_files_is_counted_as_its_release(tmp_path):
    raw = RELEASED["deepseek-v4-flash"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    by_name, found = plan("deepseek-v4-flash", context=9), plan(tmp_path, context=9)
    assert (found.weight_bytes, found.notes) == (by_name.weight_bytes, by_name.notes)
    plain = plan({key: value for key, value in raw.items() if key != "quantization_config"}, context=9)
    assert plain.weight_bytes == pytest.approx(2 * plain.parameters, rel=1e-3)
    assert plain.notes == ()
