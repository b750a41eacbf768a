"""A part of a stack, run on its own: parts in turn are the whole to the bit, each with a memory of its own."""

import copy
from itertools import pairwise

import pytest
import torch

import sparing
from sparing.errors import CheckpointError
from sparing.kernels import dispatch
from sparing.models.batch import Row
from sparing.models.diffusion_gemma import CanvasRow
from sparing.training.block_diffusion import EncodePass
from sparing.training.next_token import CausalPass
from tests.kernel_sets import using
from tests.tiny import CONFIGS, STORED_CASES, STORED_IDS, built, model, random_ids, same, snapshot

names = pytest.mark.parametrize("name", CONFIGS)
stored = pytest.mark.parametrize(("name", "kv", "options"), STORED_CASES, ids=STORED_IDS)
PIECES = (7, 1, 1, 4, 1)


@pytest.fixture(params=sorted({"reference", dispatch.available()[-1]}))
def kernels(request):
    with using(request.param):
        yield request.param


def equal(name: str, kernels: str, one: torch.Tensor, other: torch.Tensor) -> bool:
    """To the bit. PyTorch's products in a scan depend on where a layer's inputs lie beside those of others."""
    is_exact = kernels != "reference" or CONFIGS[name]["model_type"] != "nemotron_h"
    return torch.equal(one, other) if is_exact else torch.allclose(one, other, rtol=1e-5, atol=5e-5)


def cuts(name: str) -> list[tuple[tuple[int, int], ...]]:
    """Every way to cut a model in two, and the finest into more, where no layer reads entries across a cut."""
    found, last = [], model(name).config.num_hidden_layers
    for a in range(1, last):
        try:
            model(name).check_layers((a, last))
        except ValueError:
            continue
        found.append(a)
    ends = [0, *found, last]
    return [((0, a), (a, last)) for a in found] + [tuple(pairwise(ends))]


def in_turn(name, parts, tokens, memories=None, **options):
    """What the last part returns."""
    hidden = None
    for i, layers in enumerate(parts):
        memory = None if memories is None else memories[i]
        hidden = model(name).run_layers(layers, tokens, hidden=hidden, memory=memory, **options)
    return hidden


@names
def test_parts_in_turn_are_the_whole(name, kernels):
    tokens = random_ids(9)
    states, logits = model(name).hidden_states(tokens), model(name).logits(tokens)
    assert cuts(name)
    for parts in cuts(name):
        assert equal(name, kernels, model(name).head(in_turn(name, parts, tokens)), logits)
        for stop in [b for _, b in parts[:-1]]:
            lower = in_turn(name, [part for part in parts if part[1] <= stop], tokens)
            assert equal(name, kernels, lower, states[stop])


@stored
def test_parts_remember_what_the_whole_does(name, kv, options, kernels):
    tokens = random_ids(sum(PIECES))
    at_once = model(name).logits(tokens)
    for parts in cuts(name):
        whole = model(name).memory(kv, **options)
        memories = [model(name).memory(kv, layers=layers, **options) for layers in parts]
        pieces = []
        for piece in tokens.split(PIECES):
            pieces.append(model(name).head(in_turn(name, parts, piece, memories)))
            assert equal(name, kernels, pieces[-1], model(name).logits(piece, whole))
        assert [memory.length for memory in memories] == [whole.length] * len(parts)
        assert sum(memory.nbytes for memory in memories) == whole.nbytes
        ours = sorted((layer.layer, entry) for m in memories for layer, entry in zip(m.own, snapshot(m), strict=True))
        assert [i for i, _ in ours] == [layer.layer for layer in whole.own]
        assert same([entry for _, entry in ours], snapshot(whole), 2e-5 if kernels == "reference" else 0.0)
        if kv == "dense":
            torch.testing.assert_close(torch.cat(pieces), at_once, rtol=1e-5, atol=1e-4)


@stored
def test_plans_of_parts_sum_to_that_of_the_whole(name, kv, options):
    def nbytes(plan) -> int:
        return sum(spec.nbytes(300, 4) for spec in plan.specs if spec is not None)

    for parts in cuts(name):
        plans = [model(name).memory_plan(kv, layers=layers, **options) for layers in parts]
        assert sum(map(nbytes, plans)) == nbytes(model(name).memory_plan(kv, **options))
        for (a, b), plan in zip(parts, plans, strict=True):
            assert all(spec is None for i, spec in enumerate(plan.specs) if not a <= i < b)


@names
def test_a_part_commits_rolls_back_and_forks(name):
    width = model(name).hidden_shape
    for layers in {part for parts in cuts(name) for part in parts}:
        hidden, more = 0.5 * torch.randn(9, *width), 0.5 * torch.randn(3, *width)

        def run(x, memory, layers=layers):
            tokens = random_ids(len(x), 1) if name in ("shared", "compressed") else None  # some layers read ids as well
            return model(name).run([Row(tokens, memory, hidden=x)], layers)

        first, second = (model(name).memory(layers=layers) for _ in range(2))
        for memory, staged in ((first, 6), (second, 9)):
            run(hidden[:staged], memory)
            assert (memory.length, memory.staged) == (0, staged)
            memory.commit(6)
        assert same(snapshot(first), snapshot(second), 2e-5)
        before = snapshot(first)
        twin = first.fork()
        run(more, first)
        first.rollback()
        assert same(snapshot(first), before)
        found = run(more, first)
        first.commit(3)
        assert same(snapshot(twin), before) and torch.equal(run(more, twin), found)


@names
def test_only_what_is_wanted_is_carried_on(name):
    tokens = random_ids(9)
    whole = model(name).run([Row(tokens, model(name).memory(), wanted=2), Row(tokens, model(name).memory(), wanted=1)])
    for *lower, upper in cuts(name):
        hidden = in_turn(name, lower, tokens)
        rows = [
            Row(tokens, model(name).memory(layers=upper), wanted=wanted, hidden=hidden, text_end=9) for wanted in (2, 1)
        ]
        assert torch.allclose(model(name).run(rows, upper), whole, atol=1e-5)


def test_a_part_that_remembers_nothing_carries_on_what_is_wanted():
    """An MLP and experts."""
    hidden, layers = torch.randn(5, 32), (3, 5)
    memory = model("hybrid").memory(layers=layers)
    found = model("hybrid").run([Row(None, memory, wanted=1, hidden=hidden)], layers)
    torch.testing.assert_close(found, model("hybrid").run_layers(layers, hidden=hidden)[-1:])
    assert memory.staged == 5 and memory.nbytes == 0


def test_canvases_and_texts_share_a_pass_through_a_part(kernels):
    denoiser, text, canvas = model("denoiser"), random_ids(5), random_ids(8, 1)
    soft = denoiser.soft_embedding(torch.randn(8, denoiser.config.vocab_size))
    past = [denoiser.memory(), *(denoiser.memory(layers=layers) for layers in ((0, 1), (1, 2)))]
    denoiser.logits(text, past[0])
    in_turn("denoiser", ((0, 1), (1, 2)), text, past[1:])

    def rows(memory, soft, hidden=None, **layers):
        parts = [None, None] if hidden is None else hidden.split([5, 8])
        fresh = Row(text, denoiser.memory(**layers), hidden=parts[0])
        return [fresh, CanvasRow(canvas, memory, soft=soft, hidden=parts[1])]

    lower = denoiser.run(rows(past[1], soft, layers=(0, 1)), (0, 1))
    upper = denoiser.run(rows(past[2], None, lower, layers=(1, 2)), (1, 2))
    assert torch.equal(upper, denoiser.run(rows(past[0], soft)))
    for memory in past:
        memory.rollback()
    with pytest.raises(ValueError, match="a canvas has hidden states and soft"):
        denoiser.run(rows(past[2], soft, lower, layers=(1, 2)), (1, 2))
    assert past[2].staged == 0


def test_a_patched_state_reaches_the_layers_above_alone():
    """The residual stream of one text put into another at the last position: from there on it is that text."""
    one, other = random_ids(6, 1), torch.cat([random_ids(5, 2), random_ids(6, 1)[-1:]])
    at = model("value-only").run_layers((0, 2), one)
    patched = model("value-only").run_layers((0, 2), other)
    patched[:] = at
    assert torch.equal(
        model("value-only").run_layers((2, 4), hidden=patched), model("value-only").run_layers((0, 4), one)
    )
    before = model("value-only").run_layers((2, 4), hidden=at)
    at[-1] += 1.0
    after = model("value-only").run_layers((2, 4), hidden=at)
    assert torch.equal(after[:-1], before[:-1]) and not torch.allclose(after[-1], before[-1])


def test_per_layer_inputs_follow_what_enters_the_first_layer():
    shared, tokens = model("shared"), random_ids(7)
    embedded = shared.hidden_states(tokens)[0]
    assert torch.equal(shared.head(shared.run_layers((0, 6), tokens, hidden=embedded)), shared.logits(tokens))
    with pytest.raises(ValueError, match="hidden states alone, and these layers read token ids too"):
        shared.run_layers((1, 6), hidden=embedded)


def test_a_budget_is_kept_by_each_part():
    """Where heads choose for themselves, parts forget what the whole does."""
    dense, parts = model("dense"), ((0, 1), (1, 2))
    options = {"statistics": sparing.calibrate(dense, random_ids(200, 9)), "mode": "per_layer_per_head", "interval": 3}
    whole = dense.memory("triattention:9", **options)
    memories = [dense.memory("triattention:9", layers=layers, **options) for layers in parts]
    for i, piece in enumerate(random_ids(25).split([5] + [1] * 20)):
        found = dense.head(in_turn("dense", parts, piece, memories, prompt=i == 0))
        assert torch.equal(found, dense.logits(piece, whole, prompt=i == 0))
    assert whole.evictions and [memory.evictions for memory in memories] == [whole.evictions] * 2
    windows = model("value-only").memory("triattention:9", layers=(0, 1), statistics=sparing.calibrate(
        model("value-only"), random_ids(200, 9)
    ))  # fmt: skip
    assert windows.held is None  # its one layer has a window: nothing to forget


@pytest.mark.parametrize("name", ["dense", "denoiser", "hybrid"])
def test_gradients_pass_through_parts(name):
    network = built(CONFIGS[name]).requires_grad_(True)
    last = network.config.num_hidden_layers
    ids, target = random_ids(12).view(2, 6), torch.randn(12, network.config.hidden_size)

    def batch():
        if name == "hybrid":
            return CausalPass(ids, network.config)
        windows = [spec.window for spec in network.config.memory_specs()]
        return EncodePass(ids, windows)

    def gradients(hidden):
        network.zero_grad(set_to_none=True)
        (hidden * target).sum().backward()
        return {n: None if p.grad is None else p.grad.clone() for n, p in network.named_parameters()}

    def upper(hidden):
        second = batch()
        second.hidden = hidden
        return network(second, layers=range(1, last))

    whole = gradients(network(batch()))
    parts = gradients(upper(network(batch(), layers=range(1))))
    assert {n for n, g in whole.items() if g is not None} == {n for n, g in parts.items() if g is not None}
    assert all(torch.equal(g, parts[n]) for n, g in whole.items() if g is not None)
    alone = gradients(upper(network(batch(), layers=range(1)).detach()))
    trained = {n for n, g in alone.items() if g is not None}
    assert trained and not any(".layers.0." in n or "embed" in n for n in trained)


def test_a_memory_of_another_part_is_refused(tmp_path):
    hybrid, hidden = model("hybrid"), torch.randn(3, 32)
    memory = hybrid.memory(layers=(2, 6))
    hybrid.run_layers((2, 6), hidden=hidden, memory=memory)
    for layers in ((1, 6), (2, 5), (0, 3)):
        with pytest.raises(ValueError, match=r"other layers of this one \(.*, layers \(2, 6\), here .*layers=\("):
            hybrid.run_layers(layers, random_ids(3), hidden=hidden, memory=memory)
    with pytest.raises(ValueError, match="other layers of this one"):
        hybrid.logits(random_ids(3), memory)
    with pytest.raises(ValueError, match="other layers of this one"):
        hybrid.run_layers((2, 6), hidden=hidden, memory=hybrid.memory())
    assert (memory.length, memory.staged) == (3, 0)
    memory.save(tmp_path / "part")
    with pytest.raises(CheckpointError, match="model is"):
        hybrid.load_memory(tmp_path / "part", layers=(1, 6))
    with pytest.raises(CheckpointError, match="model is"):
        hybrid.load_memory(tmp_path / "part")
    again = hybrid.load_memory(tmp_path / "part", layers=(2, 6))
    assert same(snapshot(again), snapshot(memory))


def test_a_part_is_known_by_its_own_weights():
    """Other layers may be trained meanwhile."""
    network, trained = built(CONFIGS["dense"]), built(CONFIGS["dense"])
    with torch.no_grad():
        trained.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    memory = network.memory(layers=(1, 2))
    trained.run_layers((1, 2), hidden=torch.randn(3, 32), memory=memory)
    with pytest.raises(ValueError, match="other weights"):
        trained.run_layers((0, 1), random_ids(3), memory=network.memory(layers=(0, 1)))


def test_all_layers_are_the_model():
    memory = model("dense").memory(layers=(0, 2))
    assert memory.model == model("dense").memory().model
    tokens = random_ids(4)
    assert torch.equal(
        model("dense").head(model("dense").run_layers((0, 2), tokens)), model("dense").logits(tokens, memory)
    )


@pytest.mark.parametrize("layers", [(1, 1), (2, 1), (-1, 2), (0, 7), (0,), (0, 1, 2), 3, "ab", (0.0, 2), (False, True)])
def test_layers_that_are_no_part_are_refused(layers):
    for ask in (model("hybrid").memory, model("hybrid").memory_plan):
        with pytest.raises(ValueError, match=r"layers is .*: give \(a, b\), 0 <= a < b <= 6"):
            ask(layers=layers)
    with pytest.raises(ValueError, match="layers is"):
        model("hybrid").run_layers(layers, random_ids(2))


def test_a_part_that_reads_a_layer_outside_is_refused():
    message = "layer 3 reads the keys and values of layer 1, which is outside: start at 1 or before, or stop at 3"
    with pytest.raises(ValueError, match=message):
        model("shared").memory(layers=(2, 6))
    with pytest.raises(ValueError, match=r"layer 4 reads the keys and values of layer 2, .*: start at 2 or before$"):
        model("shared").run_layers((4, 5), random_ids(2), hidden=torch.randn(2, 32))


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        (torch.randn(3, 31), r"hidden is float32 \[3, 31\] on cpu: give float32 \[T, 32\] on cpu"),
        (torch.randn(3, 32).double(), r"hidden is float64 \[3, 32\]"),
        (torch.randn(1, 3, 32), r"hidden is float32 \[1, 3, 32\]"),
        (torch.randn(0, 32), r"hidden is float32 \[0, 32\]"),
        (torch.randn(2, 32), "3 tokens stand beside hidden states of 2"),
        ([[0.0] * 32] * 3, "hidden is .*: give float32"),
        (None, "layer 1 starts from what layer 0 returned: give hidden"),
        (torch.randn(4097, 32), "4097"),
    ],
)
def test_hidden_states_that_do_not_fit_are_refused(hidden, message):
    memory = model("dense").memory(layers=(1, 2))
    with pytest.raises(ValueError, match=message):
        model("dense").run_layers((1, 2), random_ids(3), hidden=hidden, memory=memory)
    assert (memory.length, memory.staged) == (0, 0)


def test_rows_start_alike_and_from_something():
    dense = model("dense")
    memory, more = dense.memory(), dense.memory()
    with pytest.raises(ValueError, match="1 of 2 rows have hidden states"):
        dense.run([Row(random_ids(2), memory), Row(None, more, hidden=torch.randn(2, 32))])
    with pytest.raises(ValueError, match="nothing to run"):
        dense.run_layers((0, 1))
    with pytest.raises(ValueError, match="4097 tokens do not fit the model's context"):
        dense.run_layers((1, 2), hidden=torch.randn(4097, 32))
    assert memory.staged == more.staged == 0


def test_an_untouched_copy_shares_memories():
    twin = copy.deepcopy(model("dense"))
    memory = model("dense").memory(layers=(0, 1))
    assert torch.equal(
        twin.run_layers((0, 1), random_ids(3), memory=memory), model("dense").run_layers((0, 1), random_ids(3))
    )
