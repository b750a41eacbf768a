"""`sparing chat`: every answer is that of the whole conversation from scratch, however little was computed anew."""

from __future__ import annotations

import builtins
import io
import json
import sys

import pytest
import torch
from rich.console import Console

import sparing
from sparing.cli import chat as chat_command
from sparing.cli.conversation import Conversation
from sparing.cli.live import LiveView
from sparing.decoding.answer import MARKS, AnswerParts
from sparing.decoding.events import Commit
from sparing.memory.sequence import Memory
from sparing.text import printable
from tests.cli.models import CONTEXT, causal_folder

QUESTIONS = ["Once upon a time", "The old woman?", "nobody knew"]
OPTIONS = {"max_new_tokens": 16, "seed": 4}


@pytest.fixture(params=["autoregressive", "block_diffusion"])
def decoder(request) -> str:
    return request.param


@pytest.fixture
def model(folders):
    return sparing.load(folders / "tales")


def text_of(events) -> str:
    return "".join(event.text for event in events if isinstance(event, Commit))


@pytest.fixture
def encoded(model, monkeypatch) -> list[int]:
    """Lengths of what is encoded."""
    lengths: list[int] = []
    run = type(model).run

    def counting(self, rows, *layers):
        lengths.extend(len(row.tokens) for row in rows if row.causal)
        return run(self, rows, *layers)

    monkeypatch.setattr(type(model), "run", counting)
    return lengths


def check_memories(talk: Conversation) -> None:
    """What is remembered is what encoding the same tokens at one go gives."""
    assert talk._known
    for ids, memory in talk._known:
        assert memory.length == len(ids)
        torch.testing.assert_close(
            talk.model.logits([7], memory.fork()), talk.model.logits([*ids, 7])[-1:], atol=1e-4, rtol=1e-4
        )


def test_answers_are_those_of_the_whole_conversation_from_scratch(model):
    options = {"decoder": "autoregressive", **OPTIONS}
    talk = Conversation(model, "Be brief.", **options)
    messages = [{"role": "system", "content": "Be brief."}]
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        expected = text_of(sparing.generate(model, messages, **options))
        assert expected
        assert text_of(talk.answer(question)) == expected
        messages.append({"role": "assistant", "content": expected})
    assert talk.messages == messages


def test_drafts_are_looked_up_in_the_whole_conversation(model):
    """The second answer repeats the first: look-up finds it there, and the answers are those of plain decoding."""
    options = {"decoder": "autoregressive", "max_new_tokens": 24, "temperature": 0}
    talks = [Conversation(model, **options), Conversation(model, **options | {"decoder": "speculative"}, draft="ngram")]
    for question in [QUESTIONS[0], *QUESTIONS]:
        plain, drafted = (list(talk.answer(question)) for talk in talks)
        assert text_of(drafted) == text_of(plain)
    assert talks[0].messages == talks[1].messages


def test_memories_hold_the_conversation(model, decoder):
    talk = Conversation(model, decoder=decoder, max_new_tokens=30, seed=4)
    for question in QUESTIONS:
        assert text_of(talk.answer(question))
        check_memories(talk)
        prompt = model.tokenizer.encode_chat(talk.messages[:-1])
        assert talk._known[0][0] == prompt[:-1]
        assert talk._known[1][0][: len(prompt)] == prompt


def test_what_is_known_is_not_encoded_again(model, encoded, decoder):
    talk = Conversation(model, decoder=decoder, **OPTIONS)
    text_of(talk.answer(QUESTIONS[0]))
    known = len(model.tokenizer.encode_chat(talk.messages[:1]))
    encoded.clear()
    text_of(talk.answer(QUESTIONS[1]))
    whole = len(model.tokenizer.encode_chat(talk.messages[:3]))
    assert sum(encoded) - (OPTIONS["max_new_tokens"] if decoder == "autoregressive" else 0) <= whole - known + 24
    assert max(encoded) < whole


def test_a_template_that_rewrites_answers_still_reuses_the_questions(model, monkeypatch):
    encode = type(model.tokenizer).encode_chat

    def without_answers(self, messages, *rest, **more):
        return encode(self, [m | {"content": "..."} if m["role"] == "assistant" else m for m in messages])

    monkeypatch.setattr(type(model.tokenizer), "encode_chat", without_answers)
    reused: list[int] = []
    longest = Conversation._longest

    def watched(self, known, ids):
        held, memory = longest(self, known, ids)
        reused.append(len(held))
        return held, memory

    monkeypatch.setattr(Conversation, "_longest", watched)
    talk = Conversation(model, decoder="autoregressive", **OPTIONS)
    for question in QUESTIONS:
        text_of(talk.answer(question))
    assert reused[0] == 0
    assert reused[1] >= len(model.tokenizer.encode_chat(talk.messages[:1])) - 1
    assert reused[2] > reused[1]


def test_an_interrupted_answer_is_kept_as_far_as_it_came(model, decoder):
    talk = Conversation(model, decoder=decoder, max_new_tokens=48, seed=4)
    said = ""
    answer = talk.answer(QUESTIONS[0])
    for event in answer:
        if isinstance(event, Commit):
            said += event.text
            if said:
                break
    answer.close()
    assert talk.messages[-1] == {"role": "assistant", "content": said}
    check_memories(talk)
    assert text_of(talk.answer(QUESTIONS[1]))
    check_memories(talk)


def test_a_question_that_was_not_answered_leaves_no_trace(model):
    talk = Conversation(model, temperature=-1.0)
    with pytest.raises(ValueError, match="temperature is -1"):
        text_of(talk.answer("Once"))
    assert talk.messages == []
    with pytest.raises(ValueError, match=f"the model's context is {CONTEXT}: shorten it"):
        text_of(talk.answer("word " * CONTEXT))
    assert talk.messages == []


def test_a_full_context_drops_the_oldest_exchanges(model):
    talk = Conversation(model, "Be brief.", decoder="autoregressive", **OPTIONS)
    for _ in range(12):
        assert text_of(talk.answer("Once upon a time there was a king"))
    assert talk.forgotten > 0
    assert [m["role"] for m in talk.messages[:3]] == ["system", "user", "assistant"]
    assert len(model.tokenizer.encode_chat(talk.messages)) <= CONTEXT


def test_the_policy_reaches_the_memory(model):
    talk = Conversation(model, kv="window:4", **OPTIONS)
    text_of(talk.answer(QUESTIONS[0]))
    assert {memory.policy.kv for _, memory in talk._known} == {"window:4"}
    assert all(isinstance(memory, Memory) for _, memory in talk._known)


def test_a_session_goes_on_where_it_was(model, encoded, tmp_path):
    # Left to right: over one span instead of two sums are rounded otherwise, which a random canvas would show.
    file, options = tmp_path / "talk", OPTIONS | {"decoder": "autoregressive"}
    whole, first = Conversation(model, "Be brief.", **options), Conversation(model, "Be brief.", **options)
    expected = [text_of(whole.answer(question)) for question in QUESTIONS]
    assert [text_of(first.answer(question)) for question in QUESTIONS[:2]] == expected[:2]
    first.save(file)
    held = first._known[-1][1].length
    later = Conversation(model, None, **options)
    later.restore(file)
    assert (later.system, later.messages) == (first.system, first.messages)
    encoded.clear()
    assert text_of(later.answer(QUESTIONS[2])) == expected[2]
    assert encoded[0] == later._known[0][1].length - held  # what is new alone
    check_memories(later)


def test_what_is_no_session_of_this_conversation_is_refused(model, folders, tmp_path):
    talk, file = Conversation(model, "Be brief.", **OPTIONS), tmp_path / "talk"
    list(talk.answer(QUESTIONS[0]))
    talk.save(file)
    with pytest.raises(ValueError, match="began with other instructions"):
        Conversation(model, "Be long.", **OPTIONS).restore(file)
    with pytest.raises(sparing.CheckpointError, match="another model, policy or dtype"):
        Conversation(model, kv="window:4", **OPTIONS).restore(file)
    talk._known[-1][1].save(file)
    with pytest.raises(sparing.CheckpointError, match="not a conversation saved by"):
        Conversation(model, **OPTIONS).restore(file)


def test_chat_keeps_a_session(command, folders, tmp_path):
    file, options = tmp_path / "talk", ("--max-new-tokens", 6, "--seed", 4, "--decoder", "autoregressive")
    both = command("chat", folders / "tales", *options, stdin=f"{QUESTIONS[0]}\n{QUESTIONS[1]}\n")
    one = command("chat", folders / "tales", *options, "--session", file, stdin=f"{QUESTIONS[0]}\n")
    two = command("chat", folders / "tales", *options, "--session", file, stdin=f"{QUESTIONS[1]}\n")
    assert two.code == 0 and one.out + two.out == both.out
    assert "1 question so far" in two.err
    assert command("chat", folders / "tales", "--session", file, stdin="/reset\n").code == 0
    assert "0 questions so far" in command("chat", folders / "tales", "--session", file, stdin="").err


def test_chat_answers_line_by_line(command, folders):
    model = sparing.load(folders / "causal")
    flags = ("--max-new-tokens", 8, "--seed", 4, "--temperature", 0.8)
    expected = text_of(
        sparing.generate(model, [{"role": "user", "content": "Once upon"}], max_new_tokens=8, seed=4, temperature=0.8)
    )
    stdin = "Once upon\n\n/reset\nOnce upon\n/help\n/exit\nignored\n"
    result = command("chat", folders / "causal", *flags, stdin=stdin)
    assert result.code == 0
    shown = printable(expected)
    assert result.out == (shown if shown.endswith("\n") else shown + "\n") * 2
    assert result.err == "sparing: /help is not known, use /reset or /exit\n"


def test_a_refused_message_does_not_end_the_chat(command, folders):
    stdin = f"{'word ' * CONTEXT}\nOnce\n"
    result = command("chat", folders / "causal", "--max-new-tokens", 4, stdin=stdin)
    assert result.code == 0
    assert f"the model's context is {CONTEXT}" in result.err
    assert result.err.count("\n") == 1
    assert result.out


def test_a_model_without_template_says_so(refused):
    assert "sudoku has no chat template" in refused("chat", "sudoku", stdin="hello")


@pytest.mark.parametrize(
    ("typed", "answers"),
    [
        ([KeyboardInterrupt, KeyboardInterrupt], 0),
        ([KeyboardInterrupt, "Once", KeyboardInterrupt, KeyboardInterrupt], 1),
        (["Once", EOFError], 1),
        ([KeyboardInterrupt, "stop this", KeyboardInterrupt], 0),
    ],
)
def test_control_c_twice_leaves(monkeypatch, typed, answers, capsys):
    lines = iter(typed)
    replies = []

    def read(prompt=""):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    def reply(conversation, text, tokenizer):
        if text == "stop this":
            raise KeyboardInterrupt
        replies.append(text)

    monkeypatch.setattr(builtins, "input", read)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    monkeypatch.setattr(chat_command, "_reply", reply)
    chat_command._converse(None, None)  # type: ignore[arg-type]
    assert len(replies) == answers
    assert next(lines, None) is None
    assert "Ctrl-C again leaves" in capsys.readouterr().out or typed[-1] is EOFError


THINKING = (
    "<bos>{% for t in tools or [] %}<tool>{{ t.function.name }}{% endfor %}{% for m in messages %}<turn>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] }}<end>{% endfor %}{% if add_generation_prompt %}<turn>assistant\n"
    "{% if enable_thinking | default(true) %}{{ effort }}{% else %}<think></think>{% endif %}{% endif %}"
)
TOOLS = '[{"type": "function", "function": {"name": "f"}}]'


@pytest.fixture
def thinker(tmp_path, monkeypatch):
    """A folder whose model thinks, calls a tool and answers; `asked` collects its prompts."""
    folder = causal_folder(tmp_path / "thinker")
    (folder / "chat_template.jinja").write_text(THINKING)
    asked: list[str] = []

    def answer(model, ids, *, memory, context, **options):
        asked.append(model.tokenizer.decode([*context, *ids], skip_special_tokens=False))
        yield Commit(0, [7], "hm", marks=[(0, "<think>")])
        yield Commit(0, [8], "m\nNo\n", marks=[(1, "</think>"), (1, "<pad>")])
        yield sparing.Done(0, "eos", {"new_tokens": 2})

    monkeypatch.setattr("sparing.cli.conversation.generate", answer)
    return folder, asked


def test_thoughts_are_shown_apart_and_left_to_the_template(command, thinker):
    folder, asked = thinker
    result = command("chat", folder, stdin="One\nTwo\n")
    assert result.code == 0
    assert result.out == "No\n" * 2
    assert result.err == "hmm\n" * 2
    assert asked[1] == "<bos><turn>user\nOne<end><turn>assistant\n\nNo\n<end><turn>user\nTwo<end><turn>assistant\n"


def test_history_holds_the_marks(thinker):
    talk = Conversation(sparing.load(thinker[0]))
    text_of(talk.answer("One"))
    assert talk.messages[-1] == {"role": "assistant", "content": "<think>hmm</think>\nNo\n"}


def test_the_template_is_told(command, thinker, tmp_path):
    folder, asked = thinker
    (tmp_path / "tools.json").write_text(TOOLS)
    flags = ("--tools", tmp_path / "tools.json", "--no-thinking")
    assert command("chat", folder, *flags, stdin="One\n").code == 0
    assert asked == ["<bos><tool>f<turn>user\nOne<end><turn>assistant\n<think></think>"]
    assert command("chat", folder, "--thinking", "--chat-variable", "effort=high", stdin="One\n").code == 0
    assert asked[1].endswith("assistant\nhigh")


def test_what_the_template_does_not_read_is_refused(command, folders, tmp_path):
    (tmp_path / "tools.json").write_text(TOOLS)
    for flags, name in (
        (("--tools", tmp_path / "tools.json"), "tools"),
        (("--no-thinking",), "enable_thinking"),
        (("--chat-variable", "effort=high"), "effort"),
    ):
        result = command("chat", folders / "causal", *flags, stdin="One\n")
        assert (result.code, result.out) == (2, "")
        assert f"{name}: this model's chat template does not read it" in result.err


def test_questions_of_generate(command, refused, folders, tmp_path):
    folder = causal_folder(tmp_path / "causal")
    (folder / "chat_template.jinja").write_text(THINKING)
    (tmp_path / "tools.json").write_text(TOOLS)
    flags = ("--max-new-tokens", 6, "--seed", 4, "--temperature", 0, "-q")
    model = sparing.load(folder)
    messages = [{"role": "user", "content": "Once"}]
    for more, given in (
        ((), {}),
        (("--no-thinking", "--tools", tmp_path / "tools.json"), {"enable_thinking": False, "tools": json.loads(TOOLS)}),
    ):
        result = command("generate", folder, "Once", "--chat", *more, *flags)
        expected = text_of(sparing.generate(model, messages, max_new_tokens=6, temperature=0, **given))
        assert result.code == 0
        assert result.out.strip() == printable(expected).strip()
    assert "add --chat" in refused("generate", folder, "Once", "--no-thinking", *flags)
    (tmp_path / "tools.json").write_text("{}")
    assert "must be a list" in refused("generate", folder, "x", "--chat", "--tools", tmp_path / "tools.json", *flags)
    (tmp_path / "tools.json").write_text("{")
    assert "not valid JSON" in refused("generate", folder, "x", "--chat", "--tools", tmp_path / "tools.json", *flags)


def test_thoughts_are_dimmed_on_a_terminal(model):
    (parts := AnswerParts(model.tokenizer))._marks = [marks for marks in MARKS if marks.opening == "<think>"]
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=60, color_system="standard")
    view = LiveView(model.tokenizer, console, parts=parts)
    for event in (Commit(0, [7], "<think>hm"), Commit(0, [8], "m</think>\n\nNo"), sparing.Done(0, "eos", {})):
        view.event(event)
    view.close()
    assert shown.getvalue() == "\x1b[2mhm\x1b[0m\x1b[2mm\x1b[0m\n\nNo\n"
