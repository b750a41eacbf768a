"""Rows of all decoders in one engine: each as if it were alone, whoever comes, goes or fails beside it."""

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparing
from sparing.decoding import engine as engines
from sparing.decoding.autoregressive import AutoregressiveStepper
from sparing.decoding.block_diffusion import BlockDiffusionStepper
from sparing.decoding.canvas import BlockDiffusion
from sparing.decoding.drafters import make_drafter
from sparing.decoding.engine import Engine, Failed, read, run
from sparing.decoding.row import ActiveRow, unspoken
from sparing.decoding.sampling import Sampling, row_generator
from sparing.decoding.speculative import Speculation, SpeculativeStepper
from sparing.decoding.stepper import Stepper
from sparing.decoding.transcript import Transcript
from sparing.models.batch import Row
from sparing.models.diffusion_gemma import CanvasRow
from tests.tiny import model, near, random_ids, same, snapshot

GREEDY, DRAWN = Sampling(), Sampling(temperature=0.9, top_k=20, repetition_penalty=1.2)
CANVASES = BlockDiffusion(max_denoising_steps=5, t_min=0.01, t_max=0.3, confidence_threshold=0.5)
KINDS = ("greedy", "drawn", "look-up", "drafter", "canvas")
LENGTHS = (7, 23, 2, 12, 9)


def stepper(name, kind, number, *, new_tokens=11, teams=None, **memory):
    """A row of a kind, the same for the same number. teams: those who draft together."""
    target, ids = model(name), random_ids(LENGTHS[number % len(LENGTHS)], seed=number)
    transcript = Transcript(None, (), (), new_tokens)
    row = ActiveRow(number, ids, target.memory(**memory), transcript, row_generator(3, number))
    if kind == "canvas":
        return BlockDiffusionStepper(target, row, CANVASES)
    if kind in ("greedy", "drawn"):
        return AutoregressiveStepper(target, row, GREEDY if kind == "greedy" else DRAWN)
    teams = {} if teams is None else teams
    if kind not in teams:
        drafter = make_drafter(target, "ngram" if kind == "look-up" else near(name))
        teams[kind] = Speculation(target, drafter, GREEDY if kind == "look-up" else DRAWN, adaptive=False)
    return SpeculativeStepper(teams[kind], row)


def told(events):
    """What events say, without times and what is rounded."""
    return [
        (event.row, event.ids, getattr(event, "accepted", None))
        if not isinstance(event, sparing.Done)
        else (event.row, event.reason, {k: v for k, v in event.stats.items() if k != "seconds"})
        for event in events
    ]


def alone(name, kind, number, **options):
    return told(run(model(name), [stepper(name, kind, number, **options)]))


def output(events, row):
    return [token for event in events if isinstance(event, sparing.Commit) and event.row == row for token in event.ids]


def agrees(one, events, name):
    """The memory holds what the events said, except for the newest token or canvas, and no more."""
    memory, said = one.row.memory, output(events, one.row.row)
    assert memory.staged == 0
    if not said:
        assert memory.length <= one.row.prompt_tokens  # the prompt may be read by now, or half of it
        return
    last = [event for event in events if isinstance(event, sparing.Commit) and event.row == one.row.row][-1]
    of_canvas = isinstance(one, BlockDiffusionStepper)
    held = said[: -len(last.ids)] if of_canvas else said[:-1]
    if of_canvas and memory.length == one.row.prompt_tokens + len(said):
        held = said  # encoded already, for the next canvas
    text = torch.cat([random_ids(one.row.prompt_tokens, seed=one.row.row), torch.tensor(held, dtype=torch.int64)])
    fresh = model(name).memory()
    model(name).logits(text, fresh)
    assert same(snapshot(memory), snapshot(fresh), 1e-4)


@pytest.mark.parametrize("name", ["denoiser", "dense", "shared", "hybrid"])
def test_rows_of_different_decoders_are_as_alone(name):
    kinds = KINDS if name == "denoiser" else KINDS[:-1]
    teams = {}
    rows = [stepper(name, kind, i, teams=teams) for i, kind in enumerate((*kinds, *kinds))]
    events = told(run(model(name), rows))
    for i, kind in enumerate((*kinds, *kinds)):
        assert [event for event in events if event[0] == i] == alone(name, kind, i)


@settings(max_examples=25)
@given(data=st.data())
def test_rows_come_and_go(data):
    """Added and cancelled at any step or event: what each said begins what it says alone, and its memory holds that."""
    name, engine, teams = "denoiser", Engine(model("denoiser")), {}
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=2, max_size=6))
    comes = {i: data.draw(st.integers(0, 9)) for i in range(len(kinds))}
    leaves = {i: data.draw(st.integers(0, 30)) for i in range(len(kinds))}  # after that many of its events
    rows, events, clock = {}, [], 0
    while comes or engine.steppers:
        for i in [i for i, when in comes.items() if when <= clock]:
            del comes[i]
            rows[i] = stepper(name, kinds[i], i, teams=teams)
            engine.add(rows[i])
        for event in engine.step():
            events.append(event)
            if sum(e.row == event.row for e in events) == leaves[event.row]:
                engine.cancel(rows[event.row])
        clock += 1
        for one in rows.values():
            agrees(one, events, name)
    for i, kind in enumerate(kinds):
        found, expected = told(e for e in events if e.row == i), alone(name, kind, i)
        assert found == expected[: leaves[i] or len(expected)]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("kind", KINDS)
def test_events_that_nobody_takes_are_in_no_memory(kind, count):
    rows, teams = [], {}
    for i in range(3):
        rows.append(stepper("denoiser", kind, i, teams=teams))
    stream = run(model("denoiser"), rows)
    events = [next(stream) for _ in range(count)]
    stream.close()
    for one in rows:
        agrees(one, events, "denoiser")
    before = [snapshot(one.row.memory) for one in rows]
    with pytest.raises(StopIteration):
        next(stream)
    assert all(same(snapshot(one.row.memory), b) for one, b in zip(rows, before, strict=True))


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_a_step_that_is_not_taken_to_its_end(taken):
    """The row whose events were being given is out; those before it have taken the step, the others take it next."""
    engine, kinds = Engine(model("denoiser")), ("greedy", "look-up", "greedy", "look-up")
    rows = [stepper("denoiser", kind, i) for i, kind in enumerate(kinds)]
    for one in rows:
        engine.add(one)
    for _ in range(3):
        list(engine.step())
    step = engine.step()
    events = [next(step) for _ in range(taken)]
    step.close()
    left = events[-1].row
    assert [one.row.row for one in engine.steppers] == [i for i in range(4) if i != left]
    assert all(one.row.memory.staged == 0 for one in rows)
    while engine.steppers:
        events += engine.step()
    for i in set(range(4)) - {left}:
        expected = alone("denoiser", kinds[i], i)
        found = told(event for event in events if event.row == i)
        assert found == expected[-len(found) :]


class Failing(Stepper):
    """A row that decodes as another does until it raises. place: where; after: how many passes it lets go by."""

    def __init__(self, inner, place, after):
        super().__init__(inner.row, self if place == "prepare" else None)
        self.inner, self.place, self.left, self.closed = inner, place, after, 0

    def _may_fail(self, place):
        if place == self.place:
            self.left -= 1
            if self.left < 0:
                raise ArithmeticError(f"in {place}")

    def prepare(self, steppers, *, alone):
        assert steppers == [self] and not alone
        self._may_fail("prepare")

    def wants(self):
        self._may_fail("wants")
        return self.inner.wants()

    def take(self, outputs):
        self._may_fail("take")
        yield from self.inner.take(outputs)
        self._may_fail("commit")
        self.finished = self.inner.finished

    def close(self):
        self.closed += 1


@pytest.mark.parametrize("place", ["prepare", "wants", "take", "commit"])
@pytest.mark.parametrize("after", [0, 3])
def test_a_row_that_raises_ends_alone(place, after):
    engine, name = Engine(model("denoiser")), "denoiser"
    kinds = ("greedy", "drawn", "look-up", "canvas")
    rows = [stepper(name, kind, i) for i, kind in enumerate(kinds)]
    failing = Failing(rows[1], place, after)
    rows[1] = failing
    for one in rows:
        engine.add(one)
    events = []
    while engine.steppers:
        events += engine.step()
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert failed.row == 1 and isinstance(failed.error, ArithmeticError)
    assert failing.closed == 1
    said = [event for event in events if not isinstance(event, Failed)]
    assert len(output(said, 1)) == after + (place == "commit")
    agrees(failing, said, name)
    for i in (0, 2, 3):
        assert told(event for event in said if event.row == i) == alone(name, kinds[i], i)


def test_the_error_of_a_row_comes_after_the_events_of_the_others():
    rows = [stepper("dense", "greedy", i) for i in range(3)]
    rows[0], rows[2] = Failing(rows[0], "take", 2), Failing(rows[2], "take", 1)
    events, found = run(model("dense"), rows), []
    with pytest.raises(ArithmeticError, match="in take") as raised:
        found += events  # the list keeps what came before the error
    assert raised.value is not None
    assert told(event for event in found if event.row == 1) == alone("dense", "greedy", 1)
    assert (len(output(found, 0)), len(output(found, 2))) == (2, 1)


def test_logits_that_are_not_finite_end_their_row_alone(monkeypatch):
    target = copy.deepcopy(model("dense"))
    prompts = [random_ids(9).tolist(), random_ids(4, seed=1).tolist()]
    options = {"temperature": 0, "max_new_tokens": 8, "seed": 0}
    whole = list(sparing.generate(target, prompts, **options))
    forward = type(target).forward

    def failing(self, batch, trace=None, layers=None):
        hidden = forward(self, batch, trace, layers).clone()
        hidden[(batch.positions >= 12)[-len(hidden) :]] = math.nan
        return hidden

    monkeypatch.setattr(type(target), "forward", failing)
    found = []
    with pytest.raises(ValueError, match="row 0, after 13 tokens"):
        found += sparing.generate(target, prompts, **options)
    assert output(found, 0) == output(whole, 0)[:4]
    assert output(found, 1) == output(whole, 1)


@pytest.mark.parametrize("fault", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["denoiser", "hybrid"])
def test_a_pass_that_raises_can_be_run_again(name, fault, monkeypatch):
    """Every row is as before the pass: the same step later gives what it would have given."""
    kinds = KINDS if name == "denoiser" else KINDS[:-1]
    engine, teams, events, failures = Engine(model(name)), {}, [], 0
    rows = [stepper(name, kind, i, teams=teams) for i, kind in enumerate(kinds)]
    for one in rows:
        engine.add(one)
    head, calls = model(name).head, iter(range(10**6))

    def failing(hidden):
        if next(calls) % 3 == 1:
            raise fault
        return head(hidden)

    monkeypatch.setattr(model(name), "head", failing)
    while engine.steppers:
        before = [snapshot(one.row.memory) for one in rows]
        try:
            events += engine.step()
        except fault:
            failures += 1
            assert all(same(snapshot(one.row.memory), b) for one, b in zip(rows, before, strict=True))
    monkeypatch.undo()
    assert failures > 2
    for i, kind in enumerate(kinds):
        if kind not in ("canvas", "drafter"):  # their draws are those of the pass, or of a model that fails too
            assert told(event for event in events if event.row == i) == alone(name, kind, i)


def pieces(name, monkeypatch, *, beside, **memory):
    """Tokens of each pass over a prompt of 60 tokens, and its row's events. beside: whether another row decodes."""
    monkeypatch.setattr(engines, "PIECE", 16)
    monkeypatch.setattr(engines, "PIECE_BESIDE", 5)
    engine, sizes, plain = Engine(model(name)), [], type(model(name)).run

    def counting(self, rows):
        sizes.extend(len(row.tokens) for row in rows if row.memory is long.row.memory)
        return plain(self, rows)

    if beside:
        engine.add(stepper(name, "drawn", 0, new_tokens=40))
        list(engine.step())
    long = stepper(name, "greedy", 4, **memory)
    long.row.pending = random_ids(60, seed=8)
    engine.add(long)
    events = []
    with monkeypatch.context() as patch:
        patch.setattr(type(model(name)), "run", counting)
        while long in engine.steppers:
            events += [event for event in engine.step() if event.row == 4]
    return [size for size in sizes if size > 1], output(events, 4)


@pytest.mark.parametrize("name", ["dense", "sliding", "shared", "hybrid"])
def test_a_long_prompt_goes_in_smaller_pieces_beside_others(name, monkeypatch):
    sizes, ids = pieces(name, monkeypatch, beside=False)
    assert sizes == [16, 16, 16, 12]
    sizes, beside = pieces(name, monkeypatch, beside=True)
    assert sizes == [5] * 12
    assert beside == ids


def test_memories_that_depend_on_cuts_are_cut_alike_in_any_company(monkeypatch):
    memory = {"kv": "turboquant:3", "block": 16, "prefill": "exact"}
    assert model("dense").memory(**memory).depends_on_cuts
    alone, beside = (pieces("dense", monkeypatch, beside=beside, **memory) for beside in (False, True))
    assert alone == beside
    assert alone[0] == [16, 16, 16, 12]


def test_prompts_that_begin_together_are_read_in_one_pass(monkeypatch):
    monkeypatch.setattr(engines, "PIECE_BESIDE", 3)
    passes = []
    plain = type(model("dense")).run
    monkeypatch.setattr(type(model("dense")), "run", lambda self, rows: passes.append(len(rows)) or plain(self, rows))
    prompts = [random_ids(length).tolist() for length in (9, 2, 30)]
    list(sparing.generate(model("dense"), prompts, max_new_tokens=4, temperature=0, stop=None))
    assert passes == [3] * 4


def test_texts_and_canvases_share_a_pass():
    """Encoding and denoising in one forward are what each is alone, though their layers are scaled differently."""
    target = model("denoiser")
    scalars = [*target.model.encoder.language_model.layers, *target.stack.layers]
    assert len({float(layer.layer_scalar) for layer in scalars}) == len(scalars)

    def rows():
        memories = [target.memory() for _ in range(4)]
        for i, memory in enumerate(memories):
            target.logits(random_ids(3 + i, seed=i), memory)
        soft = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
        return [
            Row(random_ids(6, seed=11), memories[0], wanted=2),
            Row(random_ids(9, seed=12), memories[1], wanted=0),
            CanvasRow(random_ids(8, seed=13), memories[2]),
            CanvasRow(random_ids(8, seed=14), memories[3], soft=soft),
        ]

    mixed, apart = rows(), rows()
    together = target.run(mixed).split([2, 0, 8, 8])
    for i, row in enumerate(apart):
        torch.testing.assert_close(together[i], target.run([row]), rtol=1e-5, atol=1e-5)
    for one, other in zip(mixed, apart, strict=True):
        n = len(one.tokens) if one.causal else 0
        one.memory.commit(n)
        other.memory.commit(n)
        assert same(snapshot(one.memory), snapshot(other.memory), 1e-5)


def test_reading_gives_the_logits_of_the_last_ids(monkeypatch):
    monkeypatch.setattr(engines, "PIECE", 7)
    texts = [random_ids(20), random_ids(3, seed=1)]
    memories = [model("shared").memory() for _ in texts]
    rows = [unspoken(ids, memory) for ids, memory in zip(texts, memories, strict=True)]
    for logits, ids, memory in zip(read(model("shared"), rows, outputs=2), texts, memories, strict=True):
        torch.testing.assert_close(logits, model("shared").logits(ids)[-2:], rtol=1e-4, atol=1e-4)
        assert memory.length == len(ids)


def test_logits_of_several_ids_come_from_one_pass_however_a_text_is_cut(monkeypatch):
    monkeypatch.setattr(engines, "PIECE", 7)
    for length, outputs in ((8, 2), (15, 3), (14, 7), (9, 9), (20, 12)):
        texts = [random_ids(length), random_ids(12, seed=1)]
        rows = [unspoken(ids, model("shared").memory()) for ids in texts]
        for logits, ids in zip(read(model("shared"), rows, outputs=outputs), texts, strict=True):
            torch.testing.assert_close(logits, model("shared").logits(ids)[-outputs:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dense", "hybrid", "denoiser"])
def test_memories_that_cannot_take_part_are_refused_as_they_come(name):
    """With nothing changed in them, and no other row the worse for it."""
    engine, here = Engine(model(name)), [stepper(name, "greedy", i) for i in range(2)]
    for one in here:
        engine.add(one)
    events = list(engine.step())
    same_one, staged, foreign = (stepper(name, "greedy", i) for i in (2, 3, 4))
    same_one.row = dataclasses.replace(same_one.row, memory=here[0].row.memory)
    model(name).run([Row(random_ids(3), staged.row.memory)])
    foreign.row = dataclasses.replace(foreign.row, memory=model("shared").memory())
    for refused, reason in ((same_one, "in another row"), (staged, "3 staged"), (foreign, "another model")):
        with pytest.raises(ValueError, match=reason):
            engine.add(refused)
    assert engine.steppers == here and staged.row.memory.staged == 3
    while engine.steppers:
        events += engine.step()
    for i in range(2):
        assert told(event for event in events if event.row == i) == alone(name, "greedy", i)


def test_a_row_without_ids_ends_alone():
    engine, rows = Engine(model("dense")), [stepper("dense", "greedy", i) for i in range(3)]
    rows[1].row.pending = rows[1].row.pending[:0]
    for one in rows:
        engine.add(one)
    events = []
    while engine.steppers:
        events += engine.step()
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert failed.row == 1 and "0 ids are pending" in str(failed.error)
    for i in (0, 2):
        assert told(event for event in events if event.row == i) == alone("dense", "greedy", i)


@pytest.mark.parametrize("decoder", ["autoregressive", "speculative", "block_diffusion"])
def test_a_memory_that_somebody_else_changes_ends_the_row(decoder):
    """Of two texts that share a memory the first one goes on, undisturbed."""
    target, memory = model("denoiser"), model("denoiser").memory()
    options = {"decoder": decoder, "temperature": 0, "seed": 0, "max_new_tokens": 12}
    alone = told(sparing.generate(target, [1, 2], **options))
    first, second = (sparing.generate(target, ids, memory=memory, **options) for ids in ([1, 2], [3, 4]))
    events = [next(first)]
    with pytest.raises(ValueError, match="row 0: its memory was changed by somebody else"):
        list(second)
    assert told([*events, *first]) == alone
