"""Templates that would run for ever or fill the machine, from the first byte read to the last one written."""

import time
import tracemalloc

import pytest

from sparing.checkpoint.chat import sandbox as chat_sandbox
from sparing.checkpoint.chat.allowance import MAX_SIZE
from sparing.checkpoint.chat.template import ChatTemplate
from sparing.errors import CheckpointError

MESSAGES = [{"role": "user", "content": "x"}]


def doubled(then: str) -> str:
    """n.x and n.y are lists that write out to 2 ** 99 letters; made without naming a list twice in one literal."""
    step = "{% set n.x = (n.x * 2)|batch(2)|list %}{% set n.y = (n.y * 2)|batch(2)|list %}"
    return "{% set n = namespace(x=['a'], y=['a']) %}{% for i in range(99) %}" + step + "{% endfor %}" + then


def tupled(then: str) -> str:
    """n.x is a tuple of 2 ** 99 letters, made of the arguments of a macro: it can be hashed."""
    macro = "{% macro m() %}{% set n.x = varargs %}{% endmacro %}{% set n = namespace(x='a') %}"
    return macro + "{% for i in range(99) %}{{ m(n.x, n.x) }}{% endfor %}" + then


COMPARED = {
    f"compared by {name}": doubled(then)
    for name, then in {
        "==": "{{ n.x == n.y }}",
        "<": "{{ n.x < n.y }}",
        "in": "{{ n.x in [n.y] }}",
        "is eq": "{{ n.x is eq(n.y) }}",
        "is in": "{{ n.x is in([n.y]) }}",
        "select": "{{ [n.x]|select('equalto', n.y)|list }}",
        "index": "{{ [n.x].index(n.y) }}",
        "count": "{{ [n.x].count(n.y) }}",
        "sort": "{{ [n.x, n.y]|sort }}",
        "max": "{{ [n.x, n.y]|max }}",
        "unique": "{{ [n.x, n.y]|unique|list }}",
        "groupby": "{{ [{'a': n.x}, {'a': n.y}]|groupby('a') }}",
        "dictsort": "{{ {'a': n.x, 'b': n.y}|dictsort(by='value') }}",
        "changed": "{% for i in range(3) %}{{ loop.changed(n.x if i else n.y) }}{% endfor %}",
    }.items()
}
HASHED = {
    f"hashed by {name}": tupled(then)
    for name, then in {
        "a literal": "{{ {n.x: 1}|length }}",
        "get": "{{ {}.get(n.x) }}",
        "an item": "{{ {'a': 1}[n.x] }}",
        "in": "{{ n.x in {'a': 1} }}",
        "keys": "{{ {'a': 1}.keys() - [n.x] }}",
        "fromkeys": "{{ dict.fromkeys([n.x]) }}",
        "unique": "{{ [n.x]|unique|list }}",
        "map": "{{ [{'a': 1}]|map(attribute=n.x)|list }}",
    }.items()
}
WRITTEN = {
    f"written by {name}": doubled(then)
    for name, then in {
        "items": "{{ {'a': n.x}.items() }}",
        "values": "{{ {'a': n.x}.values()|string }}",
        "safe": "{{ n.x|safe }}",
        "lower": "{{ n.x is lower }}",
        "%": "{{ '%(a)s' % {'a': n.x} }}",
        "an error": "{{ raise_exception(n.x) }}",
        "a complaint": "{{ [1][n.x].a }}",
        "a namespace": "{{ namespace(a=n.x) }}",
        "itself": "{% set n.x = n %}{{ n }}",
    }.items()
}
NUMBERS = {
    "power": "{{ 2 ** 9999999999 }}",
    "power of itself": "{% set x = 9 ** 3000 %}{{ x ** x }}",
    "negative power": "{{ 7 ** -9999999999 }}",
    "product": "{% set x = 9 ** 3000 %}{{ x * x }}",
    "long literals": "{{ 0x" + "f" * 3000 + " * 0x1 }}",
    "from text": "{{ ('f' * 290000)|int(base=16) % 7 }}",
    "rounded": "{{ 1|round(290000, 'ceil') }}" * 30,
}
COMPILED = {
    "filter": "{{ 'a'|center(3999999) }}" * 400,
    "condition": "{% if 'a'|center(3999999) %}{% endif %}" * 400,
    "~": "{{ " + " ~ ".join(["'a'|center(3999999)"] * 300) + " }}",
    "autoescape": "{% autoescape 'a'|center(3999999) %}{% endautoescape %}" * 100,
    "include": "{% include 'a'|center(10 ** 9) %}",
    "outputs": "{{a}}" * 90_000,
    "texts": "a{{b}}" * 80_000,
    "operators": "{{ a" + " < a" * 100_000 + " }}",
    "lists": "{{ [" + "1," * 200_000 + "] }}",
    "conditions": "{%if a%}{%endif%}" * 25_000,
    "names in scopes": "".join(f"{{%set a{i}=1%}}" for i in range(3000)) + "{%if a%}{%endif%}" * 1600,
    "names in macros": "".join(f"{{{{a{i}}}}}{{%macro m{i}()%}}{{%endmacro%}}" for i in range(1500)),
    "blocks": "".join(f"{{%block a{i}%}}{{%endblock%}}" for i in range(4500)),
    "parentheses": "{{ " + "(" * 90_000 + ")" * 90_000 + " }}",
    "brackets": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "not": "{{ " + "not " * 9000 + "a }}",
    "sums": "{{ 1" + "+1" * 2000 + " }}",
    "filters": "{{ 1" + "|e" * 2000 + " }}",
    "nested": "{% if a %}" * 3000,
    "digits": "{{ " + "9" * 400_000 + " }}",
    "hexadecimal digits": "{{ 0x" + "f" * 400_000 + " }}",
    "short numbers": "{{ " + ("9" * 4200 + "z") * 100 + " }}",
    "open strings": "{{ '" + "\\'" * 200_000,
    "open comments": "{#" * 200_000,
    "open raw": "{%raw%}" + "{% endra" * 50_000,
}
GROWING = {
    "indent of other line ends": "{{ ('\r' * 90000)|indent(90000) }}",
    "indent by text": "{{ ('\u2028' * 90000)|indent('x' * 90000) }}",
    "indented JSON": "{{ ([1] * 15000)|tojson(indent=90000) }}",
    "JSON indented by text": "{{ ([1] * 15000)|tojson(indent='x' * 90000) }}",
    "deep JSON": "{% set n = namespace(x=[]) %}{% for i in range(900) %}{% set n.x = [n.x] %}{% endfor %}"
    "{{ n.x|tojson(indent=9999) }}",
    "separators": "{% set s = 'x' * 90000 %}{{ ([1] * 15000)|tojson(separators=(s, s)) }}",
    "bytes": "{{ 'a'.encode() * 10 ** 9 }}",
    "slow encoding": "{{ ('é' * 250000).encode('punycode') }}",
    "encoding as an item": "{{ ('é' * 250000)['encode']('punycode') }}",
    "encoding by filter": "{{ (('é' * 250000)|attr('encode'))('punycode') }}",
    "number as bytes": "{{ (1).to_bytes(250000, 'big') }}",
    "dates": "{{ strftime_now('%c' * 90000) }}",
    "many values": "{% set n = namespace(x=[]) %}{% for i in range(9000) %}"
    "{% set n.x = n.x + ['🙂' * 90000] %}{% endfor %}",
    "many places": "{{ ('{0}' * 70000).format(1) }}",
    "named places": "{{ ('%(a)s' * 50000) % {'a': 'x' * 90000} }}",
    "open names": "{{ ('%(' * 140000) % {} }}" * 9,
    "open braces": "{{ ('{' * 290000).format(1) }}" * 9,
    "precision": "{{ '%.290000f' % 1.5 }}" * 99,
    "blocks in themselves": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "callers": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}{% macro r(n) %}{% if n %}"
    "{% call m() %}{{ r(n - 1) }}{% endcall %}{% endif %}{% endmacro %}{{ r(60) }}",
    "elements": "{{ range(10 ** 5)|list }}" * 99,
    "dates by width": "{{ strftime_now('%0999d' * 40000) }}",
}
SLOW = {
    "rfind": "{{ ('a' * 290000).rfind('ab' ~ 'a' * 140000) }}",
    "rsplit": "{{ ('a' * 290000).rsplit('ab' ~ 'a' * 140000) }}",
    "strip": "{{ ('é' * 290000).strip('ü' * 140000 ~ 'é') }}",
    "trim": "{{ ('a' * 140000)|trim('b' * 140000 ~ 'a') }}",
    "wordwrap": "{{ ('a' * 140000)|wordwrap(1) }}",
    "striptags": "{{ ('<!---->' * 40000)|striptags }}",
    "striptags of markup": "{{ (('<!---->' * 40000)|safe).striptags() }}",
    "urlize": "{{ ('(' * 290000)|urlize }}",
    "pprint": "{{ ('a ' * 140000)|pprint }}",
    "sum": "{{ ([[]] * 9000)|sum(start=[1] * 9000) }}",
    "empty turns": "{% for a in range(18000) if a < 0 %}{% endfor %}" * 20,
    "loop": "{% for a in range(9000) %}{% for b in range(9000) %}{% endfor %}{% endfor %}",
    "earlier items": "{% for a in 'a' * 200000 %}{{ loop.previtem }}{% endfor %}",
    "searches": "{% for a in range(9000) %}{{ ('a' * 140000 ~ 'b') in 'a' * 290000 }}{% endfor %}",
}
ATTACKS = {
    f"{kind}: {name}": source
    for kind, attacks in {
        "compared": COMPARED, "hashed": HASHED, "written": WRITTEN, "numbers": NUMBERS, "compiled": COMPILED,
        "growing": GROWING, "slow": SLOW,
    }.items()
    for name, source in attacks.items()
}  # fmt: skip


@pytest.mark.parametrize("source", ATTACKS.values(), ids=ATTACKS.keys())
def test_an_attack_ends_soon_and_small(source, monkeypatch):
    monkeypatch.setattr("sparing.checkpoint.chat.allowance.MAX_SECONDS", 2.0)
    for limit in ("MAX_TOKENS", "MAX_NODES", "MAX_NAMES_IN_SCOPES"):  # a quarter: tracing memory is slow
        monkeypatch.setattr(chat_sandbox, limit, getattr(chat_sandbox, limit) // 4)
    template = ChatTemplate(source, "x.jinja")
    tracemalloc.start()
    begin = time.thread_time()
    try:
        with pytest.raises(CheckpointError) as caught:
            template.render(messages=MESSAGES)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.thread_time() - begin < 4  # a second, except for what tracing memory costs
    assert peak < 80_000_000
    message = str(caught.value)
    assert message.startswith("x.jinja: ")
    assert len(message) < 400
    assert "\n" not in message


ORDINARY = {
    "large numbers": ("{{ 10000000|string }} {{ '{}'.format(10000000) }} {{ 9876543210|tojson }}", None),
    "a number in a macro": ("{% macro m(x) %}{{ x }}{% endmacro %}{{ m(10000000) }}", "10000000"),
    "dates in a format": ("{{ '%s on 20260101' % 'x' }} {{ '{} in 123456789'.format(1) }}", None),
    "numbers": ("{{ 2 ** 10 }} {{ 7 // 2 }} {{ 7 % 4 }} {{ 1 / 4 }} {{ 5 - 9 }} {{ 3.7|round|int }}", None),
    "folding": ("{{ 'a' ~ 1 }}{{ ('a' * 3)|upper }}{{ [1, 2]|sum }}{{ 'b' in 'abc' }}{{ (1, 2)[0] }}", None),
    "namespaces": ("{% set n = namespace({'a': 1}, self=2) %}{{ n.a }}{{ n.self }}", "12"),
    "not a text": ("{{ 12|replace(1, 3) }}{{ messages|first|length }}{{ nothing|trim }}{{ nothing|join(',') }}", None),
    "sums of texts": ("{{ [[1], [2]]|sum(start=[]) }}", "[1, 2]"),
    "keys": ("{{ {'a': 1}.keys() - ['b'] }}{{ {(1, 2): 3}[(1, 2)] }}", "{'a'}3"),
    "filters in filters": ("{{ messages|map(attribute='content')|map('replace', 'x', 'y')|join('-') }}", "y"),
}


@pytest.mark.parametrize(("source", "shown"), ORDINARY.values(), ids=ORDINARY.keys())
def test_ordinary_operations_give_what_jinja_gives(source, shown):
    from transformers.utils.chat_template_utils import render_jinja_template

    theirs, _ = render_jinja_template([MESSAGES], chat_template=source)
    assert ChatTemplate(source).render(messages=MESSAGES) == theirs[0]
    assert shown in (None, theirs[0])


def test_the_allowance_grows_with_the_conversation():
    source = "{% set n = namespace(x='') %}{% for m in messages %}{% set n.x = n.x ~ m.content %}{% endfor %}{{ n.x }}"
    messages = [{"role": "user", "content": "word " * 20_000}] * (MAX_SIZE // 110_000)
    assert len(ChatTemplate(source).render(messages=messages)) == 100_000 * len(messages)
    nested = [{"role": "user", "content": "x"}]
    for _ in range(5000):
        nested = [{"role": "user", "content": nested}]
    with pytest.raises(ValueError, match="messages: nested too deep"):
        ChatTemplate("x").render(messages=nested)
