"""Chat templates of llama.cpp's own tests, rendered as transformers renders them."""

from typing import Any

import pytest

from sparing.checkpoint.chat.template import ChatTemplate

llama_cpp = pytest.importorskip("tests.llama_cpp", reason="nothing fetches llama.cpp's templates here")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells <it> & more",
            "parameters": {
                "type": "object",
                "properties": {
                    "where": {"type": "string", "description": "A place"},
                    "days": {"type": "integer"},
                    "unit": {"type": "string", "enum": ["c", "f"]},
                },
                "required": ["where"],
            },
        },
    }
]
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "weather", "arguments": {"where": "Köln <1>", "days": 10_000_000}},
}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": '{"rain": true}'}
THOUGHT = "<think>\nhm\n</think>\n\nb"
USER = {"role": "user", "content": " Hi & 'you' <there> 🙂\n"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "plain": [USER],
    "system": [{"role": "system", "content": "Be kind. "}, USER],
    "developer": [{"role": "developer", "content": "Be kind. "}, USER],
    "turns": [USER, {"role": "assistant", "content": THOUGHT}, USER],
    "reasoning": [USER, {"role": "assistant", "content": "b", "reasoning_content": "hm"}, USER],
    "thinking": [USER, {"role": "assistant", "content": "b", "thinking": "hm"}, USER],
    "call": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT, USER],
    "result": [USER, {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALL]}, RESULT],
    "two users": [USER, USER],
    "answer first": [{"role": "assistant", "content": "a"}, USER],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}],
}
OPTIONS = [
    {"add_generation_prompt": False},
    {"add_generation_prompt": True, "enable_thinking": True},
    {"add_generation_prompt": True, "enable_thinking": False},
]
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>"}


@pytest.mark.parametrize("file", llama_cpp.template_files())
def test_conversations_are_rendered_as_transformers_renders_them(file):
    from transformers.utils.chat_template_utils import render_jinja_template

    source = file.read_text(encoding="utf-8")
    template = ChatTemplate(source, file.name)
    same = 0
    for name, messages in CONVERSATIONS.items():
        stated = [{key: value for key, value in message.items() if value is not None} for message in messages]
        for tools in (None, TOOLS):
            for options in OPTIONS:
                given = {"tools": tools, **options, **SPECIAL}
                try:
                    theirs = render_jinja_template([stated], chat_template=source, **given)[0][0]
                except Exception:
                    theirs = None
                try:
                    ours = template.render(messages=messages, **given)
                except ValueError:
                    ours = None
                # Where the reference fails or shows a list as Python writes it, we may do better.
                if theirs is not None and "'type': 'text'" not in theirs and (name != "parts" or "one" in theirs):
                    assert ours == theirs
                    same += 1
                if name == "parts" and ours is not None:
                    assert "'type': 'text'" not in ours
                    assert "one" in ours
                    assert "two" in ours
    assert same or "functions" in source or "tool_use" in file.name
