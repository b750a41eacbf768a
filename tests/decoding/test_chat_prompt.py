"""Messages as prompts: what the template is told, and what is refused."""

from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

import sparing
from sparing.checkpoint.chat.template import ChatTemplate
from sparing.checkpoint.tokenizer import Tokenizer
from sparing.decoding.chat_prompt import chat_text, template_variables
from tests.cli.models import causal_folder

TEMPLATE = (
    "{% if tools %}[{% for t in tools %}{{ t.function.name }}{% endfor %}]{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}!{{ c.function.name }}"
    "{{ c.function.arguments | dictsort }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}~{% endif %}"
    "{{ effort | default('') }}{% endif %}"
)
USER = {"role": "user", "content": "a"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def tokenizer(source: str = TEMPLATE) -> Tokenizer:
    backend = Backend(models.WordLevel({"?": 0}, "?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(backend, chat_template=ChatTemplate(source))


def text(messages, source=TEMPLATE, **given) -> str:
    return chat_text(tokenizer(source), messages, template_variables(**given))


def test_what_is_given_reaches_the_template():
    assert text([USER]) == "<user>a<assistant>"
    assert text([USER], enable_thinking=False) == "<user>a<assistant>~"
    assert text([USER], enable_thinking=True, tools=TOOLS) == "[f]<user>a<assistant>"
    assert text([USER], chat_template_kwargs={"effort": "high"}) == "<user>a<assistant>high"
    assert text([USER], chat_template_kwargs={"add_generation_prompt": False}) == "<user>a"


def test_an_answer_can_be_continued():
    messages = [USER, {"role": "assistant", "content": "Well, "}]
    assert text(messages, chat_template_kwargs={"continue_final_message": True}) == "<user>a<assistant>Well, "
    trimming = TEMPLATE.replace("m.content", "m.content | trim")
    assert text(messages, trimming, chat_template_kwargs={"continue_final_message": True}) == "<user>a<assistant>Well,"
    with pytest.raises(ValueError, match="does not show 'content' of the last message"):
        text(messages, "{{ messages[0].role }}", chat_template_kwargs={"continue_final_message": True})


@pytest.mark.parametrize("content", ["Well, ", "Well,", [{"type": "text", "text": "Well, "}]])
@pytest.mark.parametrize("source", ["{% for m in messages %}<{{ m.role }}>{{ C }}</>{% endfor %}"])
@pytest.mark.parametrize("expression", ["m.content", "m.content|trim"])
def test_an_answer_is_continued_as_transformers_does(content, source, expression):
    from transformers.utils.chat_template_utils import render_jinja_template

    if isinstance(content, list):
        expression = expression.replace("m.content", "m.content[0].text")
    source, messages = source.replace("C", expression), [{"role": "assistant", "content": content}]
    theirs, _ = render_jinja_template([messages], chat_template=source, continue_final_message=True)
    assert ChatTemplate(source).render(messages=messages, continue_final_message=True) == theirs[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"chat_template_kwargs": {"efort": 1}},
            "efort: .* does not read it; it reads .*effort",
        ),
        ({"chat_template_kwargs": {"tools": []}}, "names 'tools', an argument of its own"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs is int"),
        ({"enable_thinking": "yes"}, "enable_thinking is 'yes': use True or False"),
        ({"tools": {"name": "f"}}, "tools is dict: use a list"),
        ({"tools": [print]}, "tools holds builtin_function_or_method: use JSON schemas"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        text([USER], **given)


def test_a_template_that_reads_none_of_it_refuses_it():
    for given in ({"enable_thinking": True}, {"tools": TOOLS}):
        with pytest.raises(ValueError, match="does not read it; it reads nothing"):
            text([USER], "{{ messages[0].content }}", **given)


PARTED = {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}
CALL = {"function": {"name": "f", "arguments": {"x": 1}}}
CALL_OF_TEXT = {"function": {"name": "f", "arguments": '{"x": 1}'}}


@pytest.mark.parametrize(
    ("source", "message", "shown"),
    [
        (TEMPLATE, PARTED, "<user>one two<assistant>"),
        ("{{ messages[0].content + '!' }}", PARTED, "one two!"),
        ("{{ messages[0].content | trim }}", PARTED, "one two"),
        ("{% for p in messages[0].content %}({{ p.text }}){% endfor %}", PARTED, "(one )(two)"),
        ("{% if messages[0].content is string %}{{ messages[0].content }}{% endif %}", PARTED,
         "one two"),
        (TEMPLATE, {"role": "assistant", "tool_calls": [CALL]}, "<assistant>!f[('x', 1)]<assistant>"),
        (TEMPLATE, {"role": "assistant", "content": None, "tool_calls": [CALL]}, "<assistant>!f[('x', 1)]<assistant>"),
        ("{{ messages[0].content + '!' }}", {"role": "assistant", "tool_calls": [CALL]}, "!"),
        (TEMPLATE, {"role": "assistant", "content": "", "tool_calls": [CALL_OF_TEXT]},
         "<assistant>!f[('x', 1)]<assistant>"),
    ],
)  # fmt: skip
def test_messages_in_every_form_of_the_apis(source, message, shown):
    assert text([message], source) == shown


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "type 'image_url'"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"image": "x"}]}], "type 'image'"),
        ([USER, {"role": "user"}], "message 1 has no content"),
        ([USER, {"role": "user", "content": None}], "message 1 has no content"),
        ([{"content": "a"}], "message 0: a chat prompt is a list of messages, each with 'role'"),
        ([USER, "text"], "message 1: .* not str"),
        ([{"role": 3, "content": "a"}], "message 0"),
    ],
)
def test_messages_that_cannot_be_read_are_named(messages, message):
    with pytest.raises(ValueError, match=message) as caught:
        text(messages)
    assert not isinstance(caught.value, sparing.CheckpointError)


def test_generate_takes_them_for_messages_alone(tmp_path):
    folder = causal_folder(tmp_path / "causal")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    model = sparing.load(folder)
    given: dict[str, Any] = {"tools": TOOLS, "enable_thinking": False}
    told, plain = (list(sparing.generate(model, [USER], max_new_tokens=2, **more))[-1] for more in (given, {}))
    assert isinstance(told, sparing.Done)
    assert isinstance(plain, sparing.Done)
    assert told.stats["prompt_tokens"] > plain.stats["prompt_tokens"]
    for prompt in ("a", [5, 6]):
        for given in ({"tools": TOOLS}, {"enable_thinking": True}, {"chat_template_kwargs": {"effort": 1}}):
            with pytest.raises(ValueError, match="is for the chat template: give the prompt as a list of messages"):
                list(sparing.generate(model, prompt, max_new_tokens=2, **given))
