"""Chat templates: rendered as transformers renders them, and errors that say whose mistake it was."""

import pytest

from sparing.checkpoint.chat.template import ChatTemplate
from sparing.errors import CheckpointError

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

LLAMA3 = """{{- bos_token }}
{%- set date_string = date_string | default(strftime_now("%d %b %Y")) %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today: " ~ date_string ~ "\\n\\n" ~ system_message ~ "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("Only one tool call at a time") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson(indent=2) + "}<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

GEMMA4 = """{%- macro arguments(mapping) -%}
    {%- for key, value in mapping | dictsort -%}
        {{ key }}:{%- if value is string %}<|"|>{{ value }}<|"|>
        {%- elif value is boolean %}{{ 'true' if value else 'false' }}
        {%- elif value is mapping %}{ {{- arguments(value) -}} }{% else %}{{ value }}{% endif %}
        {%- if not loop.last %},{% endif %}
    {%- endfor -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set ns = namespace(turns=0, system=none) -%}
{%- if messages[0].role in ['system', 'developer'] -%}
    {%- set ns.system = messages[0].content | trim -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- if enable_thinking | default(false) or tools or ns.system is not none -%}
    <|turn>system
{% if enable_thinking | default(false) %}<|think|>
{% endif %}{{ ns.system or '' }}
    {%- for tool in tools or [] -%}
        <|tool>declaration:{{ tool.function.name }}{{ '{' }}{{ arguments(tool.function) }}}<tool|>
    {%- endfor -%}
    <turn|>
{% endif -%}
{%- for message in messages -%}
    {%- set ns.turns = ns.turns + 1 -%}
    {%- set role = 'model' if message.role == 'assistant' else message.role -%}
    <|turn>{{ role }}
{% if message.role == 'assistant' %}{% generation %}
        {{- message.content.split('<channel|>')[-1] | trim -}}
        {%- for call in message.tool_calls or [] -%}
            <|tool_call>call:{{ call.function.name }}{ {{- arguments(call.function.arguments) -}} }<tool_call|>
        {%- endfor -%}
    {% endgeneration %}{% else %}{{ message.content | trim }}{% endif %}<turn|>
{% if ns.turns > 100 %}{% break %}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|turn>model
{% endif -%}
"""

CALL = {
    "function": {
        "name": "weather",
        "arguments": {"where": "Köln <1>", "days": 3, "now": True, "more": {"b": "x", "a": 1}},
    }
}
CONVERSATIONS = {
    "one question": [{"role": "user", "content": "  Hi & 'you' <there>\n"}],
    "with a system": [{"role": "system", "content": "Be kind. "}, {"role": "user", "content": "你好 🙂"}],
    "several turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<|channel>thought\nhm<channel|>b"},
        {"role": "user", "content": "c"},
    ],
    "a tool call": [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "user", "content": "and?"},
    ],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Tells <it> & more", "parameters": {"type": "object"}},
    }
]
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>"}


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize(
    "options", [{}, {"add_generation_prompt": True}, {"enable_thinking": True, "date_string": "today"}]
)
@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA4], ids=["chatml", "llama3", "gemma4"])
def test_renders_what_transformers_renders(template, conversation, options, tools):
    from transformers.utils.chat_template_utils import render_jinja_template

    variables = {"add_generation_prompt": False} | options
    theirs, _ = render_jinja_template([conversation], tools=tools, chat_template=template, **variables, **SPECIAL)
    ours = ChatTemplate(template).render(messages=conversation, tools=tools, **variables, **SPECIAL)
    assert ours == theirs[0]
    assert len(ours) > 20


def test_the_caller_keeps_what_it_passes():
    messages = [{"role": "user", "content": ["a", {"b": 1}]}]
    template = "{% for m in messages %}{% set _ = m %}{{ m.content[0] }}{% endfor %}"
    assert ChatTemplate(template).render(messages=messages) == "a"
    assert messages == [{"role": "user", "content": ["a", {"b": 1}]}]


def test_messages_that_the_template_rejects_are_the_callers_mistake():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", "x.jinja")
    with pytest.raises(ValueError, match="rejects this conversation: roles must alternate") as caught:
        template.render(messages=[])
    assert not isinstance(caught.value, CheckpointError)


def test_objects_are_not_let_in():
    with pytest.raises(
        ValueError, match="messages: a chat template takes text, numbers, lists and mappings, not object"
    ):
        ChatTemplate("x").render(messages=[{"role": "user", "content": object()}])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("a\n{% for x in %}", r"x\.jinja: line 2: Expected an expression"),
        ("{% if %}", "line 1"),
        ("{{ 'open", "line 1"),
        ("{% nonsense %}", "unknown tag 'nonsense'"),
        ("{% include 'other' %}", "fails with TypeError"),
        ("{{ missing.attribute }}", "asks for something that is not there"),
        ("{{ 1 / 0 }}", "fails with ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "fails with TypeError"),
        ("{{ messages[5].role }}", "asks for something that is not there"),
        ("{{ '(' * 400 | int }}" + "{% if a %}" * 2000, r"x\.jinja"),
        ("{{ " + "(" * 3000 + ")" * 3000 + " }}", r"x\.jinja"),
        (" " * 500_001, "500001 characters, at most 500000"),
    ],
)  # fmt: skip
def test_a_broken_template_says_where(source, reason):
    with pytest.raises(CheckpointError, match=reason) as caught:
        ChatTemplate(source, "x.jinja").render(messages=[])
    assert "x.jinja" in str(caught.value)
    assert "\n" not in str(caught.value)
