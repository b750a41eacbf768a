"""The live view of a generation on a terminal."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import sparing
from sparing.checkpoint.tokenizer import Tokenizer
from sparing.cli import render
from sparing.cli.live import LiveView, pieces
from sparing.cli.render import JsonView, PlainView, choose, show
from sparing.cli.sudoku import GridView
from sparing.decoding.events import Commit, Done, Draft
from sparing.sudoku.drawing import draw_puzzle
from sparing.sudoku.text import make_tokenizer
from sparing.text import readable_bytes
from tests.cli.models import text_tokenizer

TOKENIZER = Tokenizer(text_tokenizer(), eos_ids=(1,))


def console(width: int = 80, height: int = 24) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system="standard")


def draft(ids: list[int], accepted: list[bool], step: int = 1) -> Draft:
    return Draft(0, ids, accepted, step, [0.5] * len(ids))


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def final_screen(output: Console) -> str:
    """What is left on the terminal: erased lines and colours removed."""
    file = output.file
    assert isinstance(file, io.StringIO)
    lines = [""]
    text = file.getvalue()
    while text:
        if text.startswith("\x1b["):
            end = next(i for i, c in enumerate(text[2:], 2) if c.isalpha())
            if text[end] == "A":
                lines = lines[: len(lines) - int(text[2:end] or 1)]
            elif text[end] == "K":
                lines[-1] = ""
            text = text[end + 1 :]
        else:
            if text[0] == "\n":
                lines.append("")
            elif text[0] != "\r":
                lines[-1] += text[0]
            text = text[1:]
    return "\n".join(lines)


def test_a_frame_shows_the_canvas_and_how_far_it_is():
    view = LiveView(TOKENIZER, console())
    first, second = encode("Once upon a time"), encode("Once upon a name")
    view.event(draft(first, [False] * 4))
    view.event(draft(second, [True, True, True, False], step=2))
    text = view.frame()
    assert text.plain.splitlines() == [
        "Once upon a name",
        "step 2 · 3 accepted · 1 renoised · 1 changed · 0.500 nats",
    ]
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styles["Once"] == "green"
    assert styles[" name"] == "bold yellow"
    view.event(draft(second, [True, True, True, False], step=3))
    styles = {view.frame().plain[span.start : span.end]: span.style for span in view.frame().spans}
    assert styles[" name"] == "bright_black"
    view.close()


def test_final_text_stays_above_the_canvas():
    output = console()
    view = LiveView(TOKENIZER, output)
    ids = encode("Once upon a time")
    view.event(draft(ids, [True] * 4))
    view.event(Commit(0, ids, "First line.\nOnce upon"))
    view.event(draft(encode(" a king"), [True] * 2))
    assert view.frame().plain.split("\n")[0] == "Once upon a king"
    assert view.frame().plain.endswith(" · 0.500 nats · 4 tokens")
    view.event(Commit(0, [5], " a king.\n\nThe end."))
    view.event(Done(0, "length"))
    assert final_screen(output) == "First line.\nOnce upon a king.\n\nThe end.\n"


def test_an_interrupted_canvas_stays_as_it_was():
    output = console()

    def events():
        yield draft(encode("Once upon"), [True, False])
        yield Commit(0, encode("Once upon"), "Once upon")
        yield draft(encode(" a time"), [True, False])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        show(events(), LiveView(TOKENIZER, output))
    assert final_screen(output) == "Once upon a time\n"
    written = output.file.getvalue()  # type: ignore[attr-defined]
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")  # the cursor is back


@pytest.mark.parametrize("width", [10, 24, 40, 80])
def test_a_frame_fits_the_terminal(width):
    view = LiveView(TOKENIZER, console(width, height=12))
    ids = encode("你好世界 🙂 Once upon a time there was a king's daughter\n" * 20)
    view.event(Commit(0, [5], ""))
    view.event(draft(ids, [i % 2 == 0 for i in range(len(ids))]))
    lines = view.frame().split("\n", allow_blank=True)
    assert len(lines) <= 11
    assert all(line.cell_len <= width for line in lines)
    assert "step 1" in view.frame().plain
    view.close()


def test_text_left_to_right_just_grows():
    output = console()
    view = LiveView(TOKENIZER, output)
    for text in ("Once ", "[b]upon\x1b[2J", " a\ntime"):
        view.event(Commit(0, [5], text))
    view.close()
    assert output.file.getvalue() == "Once [b]upon\ufffd[2J a\ntime\n"  # type: ignore[attr-defined]


@given(st.text("aO n\n1é你🙂", max_size=30))
def test_pieces_make_the_whole_text(text):
    ids = encode(text)
    assert "".join(pieces(TOKENIZER, ids)) == text
    assert len(pieces(TOKENIZER, ids)) == len(ids)


def test_special_tokens_are_dots():
    assert pieces(TOKENIZER, [*encode("king"), 1, 0]) == [*pieces(TOKENIZER, encode("king")), "·", "·"]
    half = encode("🙂")[:1] if len(encode("🙂")) > 1 else []
    assert pieces(TOKENIZER, [*half, 1]) == [*["" for _ in half], "\ufffd·" if half else "·"]


def test_a_sudoku_is_drawn_as_a_grid():
    puzzle = np.array([[1, 0, 3, 0], [0, 0, 1, 0], [0, 1, 0, 3], [3, 0, 1, 0]])
    solution = ["1234", "4312", "2143", "3421"]
    tokenizer = Tokenizer(make_tokenizer(4), eos_ids=(1,))
    ids = [i for row in solution for i in (*(tokenizer.token_to_id(c) for c in row), tokenizer.token_to_id("\n"))]
    ids[-1] = 1
    output = console()
    view = GridView(tokenizer, puzzle, output)
    garbled = [*ids]
    garbled[0] = 60  # a token of the prompt
    view.event(draft(garbled, [False] * 20))
    assert view.frame().plain.splitlines()[:2] == [" · 2 │ 3 4 ", " 4 3 │ 1 2 "]
    view.event(draft(ids, [True] * 20, step=2))
    view.event(Commit(0, ids, "\n".join(solution)))
    view.event(Done(0, "eos"))
    assert final_screen(output).split("\n") == [
        " 1 2 │ 3 4 ",
        " 4 3 │ 1 2 ",
        "─────┼─────",
        " 2 1 │ 4 3 ",
        " 3 4 │ 2 1 ",
        "",
    ]
    assert draw_puzzle(puzzle).plain.splitlines()[0] == " 1 . │ 3 . "


HOSTILE = "a\x1b[2Jb\x07\x9b31mc\rd\x7f\x00\u202f\u3000\n"
HARMLESS = "a\ufffd[2Jb\ufffd\ufffd31mcd\ufffd\ufffd\u202f\u3000\n"


@pytest.mark.parametrize("rows", [1, 2])
def test_generated_text_never_steers_what_it_is_printed_on(rows, capsys):
    show(iter([Commit(0, [5], HOSTILE), Done(0, "eos")]), PlainView(rows))
    plain = capsys.readouterr().out
    assert plain == (HARMLESS if rows == 1 else f"[1]\n{HARMLESS}")
    output = console()
    show(
        iter([draft(encode(HOSTILE), [True] * len(encode(HOSTILE))), Commit(0, [5], HOSTILE)]),
        LiveView(TOKENIZER, output),
    )
    assert HARMLESS.split("\n")[0] in final_screen(output)
    show(iter([Commit(0, [5], HOSTILE + "\u2028")]), JsonView())
    line = capsys.readouterr().out
    assert len(line.splitlines()) == 1 and not set(line) & set("\x1b\x07\x9b\x7f\x00")
    assert json.loads(line)["text"] == HOSTILE + "\u2028"


def test_plain_rows_keep_what_an_interruption_left(capsys):
    def events():
        yield Commit(0, [5], "first")
        yield Commit(1, [5], "second\n")
        yield Done(1, "eos")
        yield Commit(0, [5], " half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        show(events(), PlainView(rows=2))
    assert capsys.readouterr().out == "[2]\nsecond\n[1]\nfirst half\n"


def test_only_the_time_of_the_stream_counts():
    clock = SimpleNamespace(slept=0)

    class Slow:
        def event(self, event):
            import time

            time.sleep(0.05)

        def close(self):
            clock.slept += 1

    stats = {"new_tokens": 6, "forwards": 3, "memory_bytes": 2048}
    outcome = show(iter([Commit(0, [5], "x"), Done(0, "eos", stats)]), Slow())
    assert outcome.seconds < 0.05
    assert clock.slept == 1
    assert "6 tokens in 0.00 s" in outcome.speeds()
    assert "2.00 tokens per forward pass (3 passes), 2.00 KiB remembered" in outcome.speeds()


@pytest.mark.parametrize("decoder", ["autoregressive", "speculative", "block_diffusion"])
def test_a_line_says_what_is_remembered(folders, decoder):
    """Beneath any text that grows, from the memory itself; it leaves the terminal with the last token."""
    model = sparing.load(folders / "tales", dtype="float32", device="cpu")
    memory, output = model.memory(), console()
    view = LiveView(model.tokenizer, output, memory=memory, canvases=decoder != "speculative")  # type: ignore[arg-type]
    text, lines = "", []
    endless = dict.fromkeys(model.end_ids, -100.0)  # whatever the arithmetic of a CPU lets the model choose
    options = {"max_new_tokens": 30, "seed": 3, "logit_bias": endless}
    for event in sparing.generate(model, "Once upon", decoder=decoder, memory=memory, **options):
        view.event(event)
        if isinstance(event, Commit):
            text += event.text
            lines.append(view.frame().plain.splitlines()[-1])
            assert f"{readable_bytes(memory.nbytes)} remembered" in lines[-1]
    assert lines[-1].startswith("30 tokens · ") and lines[0] != lines[-1]
    assert "remembered" in output.file.getvalue()  # type: ignore[attr-defined]
    assert "remembered" not in final_screen(output)
    assert ("accepted" in output.file.getvalue()) == (decoder == "block_diffusion")  # type: ignore[attr-defined]


def test_a_budget_says_what_it_keeps(folders):
    model = sparing.load(folders / "causal", dtype="float32", device="cpu")
    statistics = sparing.calibrate(model, "Once upon a time there was a king")
    memory = model.memory("triattention:20", statistics=statistics, interval=4)
    view = LiveView(model.tokenizer, console(), memory=memory)  # type: ignore[arg-type]
    shown = []
    for event in sparing.generate(model, "Once upon", memory=memory, max_new_tokens=40, temperature=1.0, seed=3):
        view.event(event)
        if isinstance(event, Commit):
            shown.append(view.frame().plain.splitlines()[-1].split(" · ")[-1])
    assert memory.evictions
    assert shown[-1] == f"{memory.entries(0).shape[1]} entries kept" and int(shown[-1].split()[0]) in range(20, 24)


def test_who_is_told(monkeypatch):
    """Only someone who watches; into a pipe goes the text alone."""
    memory = SimpleNamespace(nbytes=1, held=None)
    assert isinstance(choose(1, TOKENIZER, canvases=False, memory=memory), PlainView)  # type: ignore[arg-type]
    monkeypatch.setattr(render, "has_live_terminal", lambda: True)
    for canvases in (False, True):
        view = choose(1, TOKENIZER, canvases=canvases, memory=memory)  # type: ignore[arg-type]
        assert isinstance(view, LiveView) and view.memory is memory and view.canvases is canvases
    assert isinstance(choose(2, TOKENIZER), PlainView) and isinstance(choose(1, TOKENIZER, canvases=False), PlainView)
