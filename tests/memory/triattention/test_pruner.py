"""Pruned memories: which entries stay, when, and that nothing else changes."""

import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import sparing
from sparing.config.policy import apply_policy, parse_policy
from sparing.errors import CheckpointError
from sparing.memory.triattention.layer_statistics import LayerStatistics
from sparing.memory.triattention.scores import bands, geometric_offsets
from sparing.memory.triattention.statistics import Statistics
from sparing.models.batch import Row
from tests.tiny import CONFIGS, LLAMA, built, model, random_ids, same, snapshot

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
ONE = LLAMA | {"num_hidden_layers": 1, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 12}
OTHERS: dict[str, dict[str, Any]] = {
    "yarn": LLAMA | {"rope_parameters": YARN | {"attention_factor": 1.3}},
    "partial": LLAMA
    | {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "one layer, one key head": ONE,
    "no groups": LLAMA | {"num_key_value_heads": 4},
}
KEPT = ("sliding", "recurrent", "hybrid", "hybrid, attention last", "compressed")  # nothing of theirs can be pruned so
PRUNABLE = [name for name in CONFIGS if name not in KEPT]
MODES = ["global", "per_head", "per_layer_per_head"]


@cache
def other(name: str) -> Any:
    return built(OTHERS[name], seed=1)


def any_model(name: str) -> Any:
    return other(name) if name in OTHERS else model(name)


@cache
def statistics(name: str) -> Statistics:
    return sparing.calibrate(any_model(name), random_ids(200, seed=9))


def pruned(name: str, budget: int, **options: Any) -> Any:
    options.setdefault("statistics", statistics(name))
    return any_model(name).memory(f"triattention:{budget}", **options)


def step(name: str, memory: Any, count: int = 1, seed: int = 0) -> Tensor:
    """Append generated tokens, one at a time; the last logits."""
    for token in random_ids(count, seed=seed + 100):
        logits = any_model(name).logits(token[None], memory, prompt=False)
    return logits[-1]


# Which entries stay


def literal_choice(name: str, memory: Any, protected: int, keep: int, mode: str) -> tuple[dict[int, Tensor], float]:
    """Entries of each owner [kv_heads, protected + keep] by the definition in float64, and the closest call."""
    config = any_model(name).config
    specs, t0, found = config.memory_specs(), memory.length, statistics(name)
    votes: dict[int, Tensor] = {}
    for i, layer in found.layers.items():
        owner = i if specs[i].shared_with is None else specs[i].shared_with
        keys = memory.layers[owner].read()[0][:, protected:].double()
        positions = memory.entries(owner)[:, protected:]
        assert layer.inv_freq is not None
        omega = torch.nn.functional.pad(layer.inv_freq.double(), (0, keys.shape[-1] // 2 - len(layer.inv_freq)))
        scales = torch.where(torch.arange(len(omega)) < len(layer.inv_freq), layer.scaling, 1.0)
        z_k = torch.complex(*bands(keys, 2 * len(layer.inv_freq))) / scales  # as rotated, without the factor
        unrotated = z_k * torch.polar(torch.ones_like(z_k.real), -positions[..., None] * omega)
        best = []
        for h in range(config.num_attention_heads):
            j = h // (config.num_attention_heads // len(keys))
            mu, nu = layer.center[h].to(torch.complex128), layer.norm[h].double()
            score = (scales**2 * (nu - mu.abs()).clamp_min(0) * unrotated[j].abs()).sum(-1)
            for delta in geometric_offsets():
                distance = (t0 - positions[j] + delta)[:, None].double()
                score = (
                    score
                    + (
                        scales**2
                        * (
                            mu * torch.polar(torch.ones_like(distance * omega), distance * omega) * unrotated[j].conj()
                        ).real
                    ).sum(-1)
                    / 17
                )
            best.append((score - score.mean()) / score.std(correction=0))
        mine = torch.stack(best).unflatten(0, (len(keys), -1)).amax(1)  # [kv_heads, n]
        votes[owner] = mine if owner not in votes else torch.maximum(votes[owner], mine)
    if mode == "global":
        joint = torch.cat(list(votes.values())).amax(0)
        final = {owner: joint.expand(len(vote), -1) for owner, vote in votes.items()}
    elif mode == "per_head":
        joint = torch.stack(list(votes.values())).mean(0)
        final = dict.fromkeys(votes, joint)
    else:
        final = votes
    chosen, gap = {}, float("inf")
    for owner, score in final.items():
        ordered = score.sort(dim=-1, descending=True)
        gap = min(gap, (ordered.values[:, keep - 1] - ordered.values[:, keep]).min().item())
        index = ordered.indices[:, :keep].sort(-1).values + protected
        index = torch.cat([torch.arange(protected).expand(len(index), -1), index], 1)
        chosen[owner] = memory.entries(owner).gather(1, index)
    return chosen, gap


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*PRUNABLE, *OTHERS])
def test_a_round_keeps_what_the_definition_keeps(name, mode):
    """Consumers vote, partial and scaled rotations count as they are, and heads keep different positions."""
    memory = pruned(name, 12, interval=4, mode=mode)
    any_model(name).logits(random_ids(5), memory)
    step(name, memory, 10)
    checked = 0
    for round in range(6):
        expected, gap = literal_choice_before_next_round(name, memory, mode, round)
        if gap > 1e-3:
            checked += 1
            for owner, entries in expected.items():
                assert torch.equal(memory.entries(owner), entries)
    assert checked >= 3


def literal_choice_before_next_round(name: str, memory: Any, mode: str, seed: int) -> tuple[dict[int, Tensor], float]:
    """Go on to the next round; what it should have kept, from a twin that is larger by the entry that set it off."""
    while memory.layers[next(iter(statistics(name).layers))].held < 15:
        step(name, memory, seed=seed)
    twin = memory.fork()
    twin.pruner.answering = False  # read the next token as a prompt: the twin takes it up and forgets nothing
    token = random_ids(1, seed=seed + 500)
    any_model(name).logits(token, twin, prompt=True)
    any_model(name).logits(token, memory, prompt=False)
    return literal_choice(name, twin, protected=5, keep=7, mode=mode)


@pytest.mark.parametrize("name", PRUNABLE)
def test_positions_ascend_and_the_prompt_is_their_beginning(name):
    memory = pruned(name, 10, interval=3, mode="per_layer_per_head")
    any_model(name).logits(random_ids(6), memory)
    for length in range(7, 60):
        step(name, memory, seed=length)
        assert memory.length == length
        for i in statistics(name).layers:
            entries = memory.entries(i)
            assert entries[:, :6].tolist() == [list(range(6))] * len(entries)
            assert (entries.diff() > 0).all()
            assert (entries[:, -1] == length - 1).all() or memory.evictions[-1]["length"] == length
            assert 6 <= entries.shape[1] < 13


def test_the_suffix_property_of_one_layer():
    """One layer, its whole beginning forgotten: as if the rest had been everything."""
    name = "one layer, one key head"
    memory = any_model(name).memory()
    ids = random_ids(30)
    any_model(name).logits(ids[:20], memory)
    memory.keep({0: torch.arange(13, 20)[None]})
    assert memory.length == 20 and memory.entries(0).tolist() == [list(range(13, 20))]
    torch.testing.assert_close(
        any_model(name).logits(ids[20:], memory), any_model(name).logits(ids[13:])[7:], rtol=0, atol=2e-5
    )


# When


@pytest.mark.parametrize("name", PRUNABLE)
@pytest.mark.parametrize("mode", MODES)
def test_a_budget_never_reached_changes_no_bit(name, mode):
    memory, dense = pruned(name, 60, mode=mode), any_model(name).memory()
    for chunk, prompt in zip(random_ids(40).split([7, 9, 1, 1, 5, 17]), [True, True] + [False] * 4, strict=True):
        expected = any_model(name).logits(chunk, dense)
        assert torch.equal(any_model(name).logits(chunk, memory, prompt=prompt), expected)
    assert same(snapshot(memory), snapshot(dense))
    assert memory.nbytes == dense.nbytes and memory.evictions == []


@pytest.mark.parametrize("trigger", ["slack", "interval"])
@pytest.mark.parametrize(("budget", "interval"), [(12, 4), (9, 1), (5, 11)])
@pytest.mark.parametrize("name", ["dense", "shared", "value-only"])
def test_bytes_held_are_the_bytes_planned_at_every_length(name, trigger, budget, interval):
    options = {"interval": interval, "trigger": trigger}
    specs = apply_policy(any_model(name).config.memory_specs(), parse_policy(f"triattention:{budget}", options))
    memory = pruned(name, budget, **options)
    any_model(name).logits(random_ids(4), memory)
    for length in range(5, 50):
        step(name, memory, seed=length)
        assert memory.nbytes == sum(spec.nbytes(length, 4) for spec in specs)
        assert [memory.entries(i).shape[1] for i in statistics(name).layers if specs[i].shared_with is None] == [
            specs[i].entries(length) for i in statistics(name).layers if specs[i].shared_with is None
        ]


def test_prompts_from_one_token_to_the_budget():
    for length in (1, 2, 10):
        memory = pruned("dense", 11, interval=2)
        any_model("dense").logits(random_ids(length), memory)
        step("dense", memory, 12)
        assert memory.evictions[-1]["kept"] == 11
        assert memory.entries(0)[0, :length].tolist() == list(range(length))
    memory = pruned("dense", 11, interval=2)
    before = snapshot(memory)
    with pytest.raises(ValueError, match="the prompt has 11 tokens and is protected, the budget is 11"):
        any_model("dense").logits(random_ids(11), memory)
    assert same(snapshot(memory), before)
    any_model("dense").logits(random_ids(6), memory)
    with pytest.raises(ValueError, match="the prompt has 11 tokens"):  # in chunks
        any_model("dense").logits(random_ids(5), memory, prompt=True)
    assert memory.length == 6 and memory.staged == 0
    with pytest.raises(ValueError, match="the prompt has 20 tokens"):  # before anything is computed
        sparing.generate(
            any_model("dense"), random_ids(20).tolist(), kv="triattention:11", statistics=statistics("dense")
        )


def test_protected_entries_must_leave_something_to_choose():
    memory = pruned("dense", 12, protect_recent=4)
    with pytest.raises(ValueError, match="the prompt of 8 tokens leaves 4 of the budget of 12, and 4 recent"):
        any_model("dense").logits(random_ids(8), memory)
    any_model("dense").logits(random_ids(7), memory)


def test_a_prompt_on_top_of_the_budget():
    memory = pruned("dense", 5, interval=2, count_prompt=False)
    any_model("dense").logits(random_ids(20), memory)
    for expected in (21, 22, 23, 24, 25, 26, 25, 26, 25):
        step("dense", memory, seed=memory.length)
        assert memory.entries(0).shape[1] == expected
    assert memory.entries(1)[0, :20].tolist() == list(range(20))


def test_a_prompt_without_protection_is_cut_at_the_first_token():
    memory = pruned("dense", 6, interval=2, protect_prompt=False)
    any_model("dense").logits(random_ids(30), memory)
    assert memory.entries(0).shape[1] == 30
    step("dense", memory)
    assert memory.evictions == [{"length": 31, "held": 31, "kept": 6, "evicted": 25}]


def test_recent_and_first_entries_stay():
    memory = pruned("dense", 9, interval=1, protect_prompt=False, protect_recent=3, protect_sinks=2)
    any_model("dense").logits(random_ids(30), memory)
    for _ in range(20):
        step("dense", memory, seed=memory.length)
        entries = memory.entries(0)[0].tolist()
        assert entries[:2] == [0, 1] and entries[-3:] == [memory.length - 3, memory.length - 2, memory.length - 1]


@pytest.mark.parametrize("trigger", ["slack", "interval"])
def test_several_tokens_at_once_set_off_at_most_one_round(trigger):
    memory = pruned("dense", 10, interval=4, trigger=trigger)
    any_model("dense").logits(random_ids(5), memory)
    any_model("dense").logits(random_ids(13, 1), memory, prompt=False)
    assert memory.evictions == [{"length": 18, "held": 18, "kept": 10, "evicted": 8}]
    any_model("dense").logits(random_ids(2, 2), memory, prompt=False)
    assert len(memory.evictions) == (1 if trigger == "slack" else 2)


def test_staged_tokens_are_neither_scored_nor_counted_nor_forgotten():
    memory, plain = pruned("dense", 10, interval=3), pruned("dense", 10, interval=3)
    for one in (memory, plain):
        any_model("dense").logits(random_ids(5), one)
        step("dense", one, 7)
    any_model("dense").run([Row(random_ids(6, 3), memory)])
    assert memory.evictions == []
    memory.commit(1)  # one draft of six
    any_model("dense").logits(random_ids(6, 3)[:1], plain, prompt=False)
    assert memory.evictions == plain.evictions and len(plain.evictions) == 1
    assert same(snapshot(memory), snapshot(plain), 1e-5)
    before = snapshot(memory)
    any_model("dense").run([Row(random_ids(6, 4), memory)])
    memory.rollback()
    assert same(snapshot(memory), before) and len(memory.evictions) == 1


def test_later_prompts_are_read_without_a_round_and_then_scored():
    memory = pruned("dense", 10, interval=3)
    any_model("dense").logits(random_ids(5), memory)
    step("dense", memory, 9)
    rounds = len(memory.evictions)
    any_model("dense").logits(random_ids(20, 5), memory, prompt=True)  # longer than the budget: not protected
    assert len(memory.evictions) == rounds and memory.entries(0).shape[1] > 20
    step("dense", memory)
    assert memory.entries(0).shape[1] == 10
    assert memory.entries(0)[0, :5].tolist() == list(range(5))


# What else a memory can do


@pytest.mark.parametrize("name", PRUNABLE)
@pytest.mark.parametrize("mode", MODES)
def test_forks_files_and_the_original_go_on_alike(name, mode, tmp_path):
    options = {"interval": 3, "mode": mode, "statistics": statistics(name)}
    memory = any_model(name).memory("triattention:9", **options)
    any_model(name).logits(random_ids(5), memory)
    step(name, memory, 11)
    memory.save(tmp_path / "memory")
    before = snapshot(memory)
    twin = memory.fork()
    loaded = any_model(name).load_memory(tmp_path / "memory", "triattention:9", **options)
    assert loaded.evictions == memory.evictions and loaded.nbytes == memory.nbytes
    expected = step(name, twin, 9)
    assert same(snapshot(memory), before) and len(memory.evictions) < len(twin.evictions)
    assert torch.equal(step(name, loaded, 9), expected)
    assert torch.equal(step(name, memory, 9), expected)
    assert same(snapshot(loaded), snapshot(memory)) and same(snapshot(twin), snapshot(memory))
    for i in statistics(name).layers:
        assert torch.equal(loaded.entries(i), memory.entries(i)) and torch.equal(twin.entries(i), memory.entries(i))


def test_files_of_other_settings_are_refused(tmp_path):
    memory = pruned("dense", 9, interval=3)
    any_model("dense").logits(random_ids(5), memory)
    memory.save(tmp_path / "memory")
    others = sparing.calibrate(any_model("dense"), random_ids(100, seed=3))
    for kv, options in (
        ("triattention:9", {"interval": 4, "statistics": statistics("dense")}),
        ("triattention:9", {"interval": 3, "mode": "per_head", "statistics": statistics("dense")}),
        ("triattention:9", {"interval": 3, "statistics": others}),
        ("triattention:10", {"interval": 3, "statistics": statistics("dense")}),
        ("dense", {}),
    ):
        with pytest.raises(CheckpointError, match="another model, policy"):
            any_model("dense").load_memory(tmp_path / "memory", kv, **options)


def test_a_row_does_not_depend_on_its_neighbours():
    """Rows of different prompts, at rounds of their own."""
    kv = {"kv": "triattention:9", "statistics": statistics("dense"), "interval": 2, "max_new_tokens": 20, "seed": 3}
    prompts = [random_ids(n, seed=n).tolist() for n in (1, 8, 4)]
    together = list(sparing.generate(any_model("dense"), prompts, **kv))
    for row, prompt in enumerate(prompts):
        alone = list(sparing.generate(any_model("dense"), prompt, **kv))
        ids = [e.ids for e in alone if isinstance(e, sparing.Commit)]
        assert [e.ids for e in together if isinstance(e, sparing.Commit) and e.row == row] == ids
        (done,) = (e for e in alone if isinstance(e, sparing.Done))
        (same_row,) = (e for e in together if isinstance(e, sparing.Done) and e.row == row)
        assert done.stats["evictions"] == same_row.stats["evictions"] != []
        assert done.stats["memory_bytes"] == same_row.stats["memory_bytes"]


def test_the_log_of_a_turn_is_that_of_the_turn():
    memory = pruned("dense", 9, interval=2)
    logs = []
    for turn in range(2):
        events = sparing.generate(any_model("dense"), random_ids(4, turn).tolist(), memory=memory, max_new_tokens=12)
        logs += [e.stats["evictions"] for e in events if isinstance(e, sparing.Done)]
    assert logs[0] + logs[1] == memory.evictions and logs[0] and logs[1]


@pytest.mark.parametrize("options", [{}, {"draft": "ngram", "adaptive": False}], ids=["plain", "speculative"])
def test_the_most_entries_ever_held(options):
    """With one token at a time budget + interval; a longer prompt, or several tokens at once, may hold more."""
    settings = {"kv": "triattention:9", "statistics": statistics("dense"), "interval": 4, "temperature": 0}
    (done,) = (
        e
        for e in sparing.generate(any_model("dense"), [3, 4, 3, 4, 3], max_new_tokens=40, **settings, **options)
        if isinstance(e, sparing.Done)
    )
    rounds = done.stats["evictions"]
    assert done.stats["peak_entries"] == max(r["held"] for r in rounds)
    assert 13 <= done.stats["peak_entries"] <= (13 if not options else 16)
    memory = pruned("dense", 9, protect_prompt=False)
    any_model("dense").logits(random_ids(30), memory)
    step("dense", memory, 3)
    assert memory.pruner.peak == memory.fork().pruner.peak == 33 and memory.evictions == []


def test_16_bit_memories():
    """Keys of 16 bits are scored in float32: the same entries as from those keys in float32."""
    half = built(LLAMA).bfloat16()
    memory = half.memory("triattention:10", statistics=sparing.calibrate(half, random_ids(200, seed=9)), interval=4)
    half.logits(random_ids(5), memory)
    for token in random_ids(30, 1):
        assert half.logits(token[None], memory, prompt=False).isfinite().all()
    assert memory.entries(0).shape[1] < 14
    positions = 2 * memory.evictions[-1]["kept"] * 4  # of two key heads
    assert memory.nbytes == 2 * (2 * memory.entries(0).numel() * 8 * 2 + positions)


# What is refused


def changed(name: str, layer: int, **fields: Any) -> Statistics:
    found = statistics(name)
    return replace(found, layers={**found.layers, layer: replace(found.layers[layer], **fields)})


def test_statistics_must_be_there_and_fit():
    with pytest.raises(ValueError, match=r"'triattention:9' needs statistics=: make them with sparing\.calibrate"):
        any_model("dense").memory("triattention:9")
    with pytest.raises(ValueError, match="a model of another config"):
        pruned("dense", 9, statistics=statistics("no groups"))
    loose = replace(statistics("shared"), geometry=None)
    with pytest.raises(ValueError, match="the statistics lack layer 5, whose queries read entries of layer 1"):
        pruned("shared", 9, statistics=replace(loose, layers={i: x for i, x in loose.layers.items() if i != 5}))
    layer = statistics("dense").layers[0]
    assert layer.inv_freq is not None
    for fields, message in (
        ({"inv_freq": layer.inv_freq * 1.001}, "other RoPE frequencies"),
        ({"inv_freq": layer.inv_freq[:2]}, "other RoPE frequencies"),
        ({"scaling": 1.1}, r"attention_scaling 1\.1, the model's is 1"),
        ({"norm": layer.norm[:, :3], "center": layer.center[:, :3]}, "4 heads of 3 bands, the model 4 of 4"),
        ({"norm": layer.norm[:3], "center": layer.center[:3]}, "3 heads of 4 bands"),
        ({"norm": layer.norm * float("nan")}, "not finite"),
        ({"norm": layer.center.abs() * 0.9}, "a mean norm below the norm of the mean"),
    ):
        with pytest.raises(ValueError, match=message):
            pruned("dense", 9, statistics=changed("dense", 0, **fields))


def test_statistics_of_a_fine_tune_warn():
    with pytest.warns(UserWarning, match="made with other weights"):
        pruned("dense", 9, statistics=replace(statistics("dense"), weights="0123456789abcdef"))


def test_frequencies_that_change_with_the_length():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    longer = built(LLAMA | {"rope_parameters": rope})
    for act in (lambda: sparing.calibrate(longer, random_ids(9)), lambda: longer.memory("triattention:9")):
        with pytest.raises(
            ValueError, match=r"constant RoPE frequencies; rope_type='dynamic' changes them at length 4096"
        ):
            act()


def test_key_heads_that_do_not_match_across_layers():
    raw = CONFIGS["value-only"] | {"layer_types": ["full_attention"] * 4, "attention_k_eq_v": False,
                                   "per_layer_config": {"1": {"num_key_value_heads": 1}}}  # fmt: skip
    ragged = built(raw)
    found = sparing.calibrate(ragged, random_ids(100))
    with pytest.raises(
        ValueError, match=r"mode='per_head' needs the same number of key heads in all layers, found \[1, 2\]"
    ):
        ragged.memory("triattention:9", statistics=found, mode="per_head")
    for mode in (None, "global", "per_layer_per_head"):
        memory = ragged.memory("triattention:9", statistics=found, mode=mode, interval=2)
        ragged.logits(random_ids(3), memory)
        for token in random_ids(12):
            ragged.logits(token[None], memory)
        assert {memory.entries(i).shape[1] for i in range(4)} == {9, 10} & {memory.entries(0).shape[1]}


@pytest.mark.parametrize("name", ["dense", "shared", "partial"])
def test_key_heads_choose_for_themselves_where_they_can(name):
    """Without a mode it is per_head: another set of entries for each key head, the same in all layers."""
    logits = []
    for options in ({}, {"mode": "per_head"}, {"mode": "global"}):
        memory = pruned(name, 9, interval=2, **options)
        any_model(name).logits(random_ids(3), memory, prompt=True)
        logits.append(step(name, memory, 12))
        assert memory.evictions
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


def test_heads_without_statistics():
    """They have no vote; a key head that nobody votes on needs the global mode."""
    layer = statistics("dense").layers[0]
    center, norm = layer.center.clone(), layer.norm.clone()
    center[:2], norm[:2] = 0, 0
    silent = changed("dense", 0, center=center, norm=norm)
    with pytest.raises(ValueError, match="no query head of layer 0, key head 0 has any: use mode=global"):
        pruned("dense", 9, statistics=silent, mode="per_head")
    memory = pruned("dense", 9, statistics=silent, interval=2)
    any_model("dense").logits(random_ids(3), memory)
    step("dense", memory, 12)
    assert memory.evictions


def test_layers_without_rotation_and_few_layers_that_attend():
    with pytest.raises(ValueError, match=r"layer 2 has no RoPE: to score .* use triattention:9,allow_nope=true"):
        pruned("hybrid", 9)
    with pytest.raises(ValueError, match="layer 2 has no RoPE"):  # before anyone calibrates in vain
        any_model("hybrid").memory("triattention:9")
    with pytest.raises(ValueError, match=r"needs statistics=.*of layer 2 too: .* product with the mean query"):
        any_model("hybrid").memory("triattention:9", allow_nope=True)
    with pytest.warns(UserWarning, match="attends in few layers"):
        pruned("hybrid", 9, allow_nope=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned("dense", 9)


def test_statistics_from_a_file(tmp_path):
    path = tmp_path / "queries.safetensors"
    statistics("dense").save(path)
    memory = pruned("dense", 9, statistics=path)
    assert memory.pruner.options() == pruned("dense", 9).pruner.options()


def test_layers_with_bands_left_out():
    """A file that leaves the bands that do not rotate out scores by the others alone."""
    whole = statistics("partial")
    layers = {
        i: LayerStatistics(layer.center[:, :2], layer.norm[:, :2], layer.inv_freq, layer.scaling)
        for i, layer in whole.layers.items()
    }
    memory = pruned("partial", 9, interval=2, statistics=replace(whole, layers=layers))
    assert all((voters.norm[:, 2:] == 0).all() and voters.norm.shape[1] == 4 for voters in memory.pruner.voters)
    any_model("partial").logits(random_ids(3), memory)
    step("partial", memory, 12)
    assert memory.evictions
