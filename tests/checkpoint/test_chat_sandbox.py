"""Templates that want out, or that want everything: each is refused in little time and little memory."""

import time
import tracemalloc

import pytest

from sparing.checkpoint.chat.allowance import MAX_SIZE
from sparing.checkpoint.chat.template import ChatTemplate
from sparing.errors import CheckpointError

ESCAPES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "attr filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "item": "{{ cycler['__init__']['__globals__']['os'].popen('id').read() }}",
    "format": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "format through map": "{{ ['{0.__class__}']|map('format', 1)|list }}{{ ''.__class__.__mro__ }}",
    "format_map": "{{ '{x.__class__.__mro__}'.format_map({'x': 1}) }}",
    "namespace": "{% set n = namespace() %}{% set n.__class__ = 1 %}{{ n.__init__.__globals__ }}",
    "joiner": "{{ joiner.__init__.__globals__ }}",
    "self": "{{ self.__init__.__globals__ }}",
    "loop": "{% for x in [1] %}{{ loop.__class__.__init__.__globals__ }}{% endfor %}",
    "macro": "{% macro m() %}{% endmacro %}{{ m.__call__.__globals__ }}",
    "change the messages": "{{ messages.append(1) }}",
    "change a mapping": "{{ {'a': 1}.update({'b': 2}) }}",
    "generator frame": "{% set g = [1]|map('string') %}{{ g.gi_frame.f_back }}",
    "undefined": "{{ missing.__class__.__init__.__globals__.a }}",
    "import": "{{ __import__('os').system('id') }}",
    "lipsum": "{{ lipsum.__globals__['os'] }}",
}


def doubling(step: str, start: str = "'ab'", then: str = "") -> str:
    """A template that makes n.x twice as long, a hundred times over."""
    return f"{{% set n = namespace(x={start}) %}}{{% for i in range(99) %}}{step}{{% endfor %}}{then}"


def nested(then: str) -> str:
    """A list of 2 ** 99 letters that takes hardly any memory until it is written out."""
    return doubling("{% set n.x = [n.x, n.x] %}", "['a']", then)


def hoarding(expression: str) -> str:
    """A template that keeps ninety thousand values, each made from a text of a million letters."""
    step = "{% for i in range(90000) %}{% set n.x = n.x + [" + expression + "] %}{% endfor %}"
    return "{% set n = namespace(x=[]) %}{% set t = 'a' * 10**6 %}" + step


LONG = "a" * 50_000
HUNGRY = {
    "long range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "loops without a body": "{% for i in range(90000) %}{% for j in range(90000) if j < 0 %}{% endfor %}{% endfor %}",
    "endless recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "branching recursion": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{{ loop([[1]]) }}{% endfor %}",
    "multiplied text": "{{ 'a' * 10**9 }}",
    "multiplied at length": "{% set x = 'a' * 10**6 %}{{ x * 1000 }}",
    "multiplied list": "{{ [1] * 10**9 }}",
    "multiplied from the left": "{{ 10**9 * 'a' }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "repeated squares": "{% set n = namespace(x=99999) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubling by +": doubling("{% set n.x = n.x + n.x %}"),
    "doubling by ~": doubling("{% set n.x = n.x ~ n.x %}"),
    "doubling by blocks": doubling("{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}"),
    "doubling by join": doubling("{% set n.x = [n.x, n.x]|join %}"),
    "doubling by %": doubling("{% set n.x = '%s%s' % (n.x, n.x) %}"),
    "doubling by format": doubling("{% set n.x = '{0}{0}'.format(n.x) %}"),
    "doubling by replace": doubling("{% set n.x = n.x.replace('b', n.x) %}"),
    "doubling lists": doubling("{% set n.x = n.x + n.x %}", "['a']"),
    "lists of lists": nested("{{ n.x }}"),
    "lists of lists as JSON": nested("{{ n.x|tojson }}"),
    "lists of lists in ~": nested("{{ 'a' ~ n.x }}"),
    "lists of lists as text": nested("{{ n.x|string|length }}"),
    "lists of lists in a format": nested("{{ '{}'.format(n.x) }}"),
    "wide text": "{{ 'a'.center(10**10) }}",
    "wide filter": "{{ 'a'|center(10**10) }}",
    "wide format": "{{ '{:>9999999999}'.format(1) }}",
    "many wide formats": "{{ ('{:>99999}' * 10000).format(*range(10000)) }}",
    "many wide formats by argument": "{{ ('{0:>{1}}' * 10000).format(1, 10**6) }}",
    "wide format by argument": "{{ '{:>{}}'.format(1, 10**10) }}",
    "wide %": "{{ '%9999999999d' % 1 }}",
    "wide % by argument": "{{ '%*d' % (10**10, 1) }}",
    "wide format filter": "{{ '%9999999999d'|format(1) }}",
    "wide indent": "{{ 'a\nb'|indent(10**10) }}",
    "indent by text": "{% set x = 'a' * 10**6 %}{{ ('\n' * 10**6)|indent(x) }}",
    "tabs": "{{ ('\t' * 10**6).expandtabs(10**6) }}",
    "zeros": "{{ '1'.zfill(10**10) }}",
    "replaced": "{% set x = 'a' * 10**6 %}{{ x.replace('a', x) }}",
    "replaced by filter": "{% set x = 'a' * 10**6 %}{{ x|replace('a', x) }}",
    "replaced by names": "{% set x = 'a' * 10**6 %}{{ x|replace(new=x, old='a') }}",
    "joined": "{% set x = 'a' * 10**6 %}{{ x.join(range(9**5)|map('string')) }}",
    "joined by filter": "{% set x = 'a' * 10**6 %}{{ range(9**5)|join(x) }}",
    "joined lazily": "{% set x = 'a' * 10**6 %}{{ range(9**5)|map('string')|join(x) }}",
    "wrapped": "{% set x = 'a b ' * 10**5 %}{{ x|wordwrap(1, wrapstring=x) }}",
    "translated": "{% set x = 'a' * 10**6 %}{{ x.translate({97: x}) }}",
    "indented JSON": "{{ [[[1]]]|tojson(indent=10**10) }}",
    "batches": "{{ [1]|batch(10**10, 'x')|list }}",
    "slices": hoarding("t[i:]"),
    "changed copies": hoarding("t|upper"),
    "copies by method": hoarding("t.upper()"),
    "constant text": "{% set n = namespace(x=[]) %}{% for i in range(90000) %}{% set y %}" + LONG
    + "{% endset %}{% set n.x = n.x + [y] %}{% endfor %}",
    "much output": "{% for i in range(90000) %}" + LONG + "{% endfor %}",
    "slow search": "{% set t = 'a' * 3 * 10**6 %}{% for i in range(90000) %}"
    "{% if 'b' in t %}x{% endif %}{% if 'c' in t %}x{% endif %}{% endfor %}",
}  # fmt: skip


def refused(source: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        ChatTemplate(source, "x.jinja").render(messages=[{"role": "user", "content": "x"}])
    message = str(caught.value)
    assert message.startswith("x.jinja: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("source", ESCAPES.values(), ids=ESCAPES.keys())
def test_there_is_no_way_out(source):
    try:
        shown = ChatTemplate(source, "x.jinja").render(messages=[{"role": "user", "content": "x"}])
    except CheckpointError:
        return
    assert shown == ""  # what the box hides is undefined, and undefined is written as nothing


@pytest.mark.parametrize("source", HUNGRY.values(), ids=HUNGRY.keys())
def test_there_is_an_end_to_time_and_memory(source, monkeypatch):
    monkeypatch.setattr("sparing.checkpoint.chat.allowance.MAX_SECONDS", 0.5)
    tracemalloc.start()
    begin = time.monotonic()
    message = refused(source)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.monotonic() - begin < 10  # no single step is long, even while memory is traced
    assert peak < 400_000_000
    assert "refused" in message or "recursion" in message or "Range" in message or "Overflow" in message


def test_a_conversation_of_a_million_tokens_is_rendered():
    messages = [{"role": "user", "content": "word " * 200}] * (MAX_SIZE // 1100)
    source = "{% for m in messages %}{{ '<|' + m.role + '|>' + (m.content | trim) + '\n' }}{% endfor %}"
    assert len(ChatTemplate(source).render(messages=messages)) > 3_500_000


def test_the_caller_is_not_charged_for_an_earlier_rendering(monkeypatch):
    monkeypatch.setattr("sparing.checkpoint.chat.allowance.MAX_STEPS", 1000)
    template = ChatTemplate("{% for i in range(200) %}{% endfor %}done")
    assert [template.render(messages=[]) for _ in range(9)] == ["done"] * 9
