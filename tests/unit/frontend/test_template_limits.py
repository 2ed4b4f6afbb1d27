"""A chat template that would never end, or fill memory, ends in a clear error after a bounded number of steps."""

from __future__ import annotations

import itertools
import tracemalloc

import pytest

from pawl.errors import InvalidRequest
from pawl_server.frontend.chat_template import ChatTemplate
from pawl_server.frontend.requests import ChatMessage, ConversationInput

MAX_CHARACTERS = 2000
MAX_LOOKS = 32 * MAX_CHARACTERS  # at the clock: a unit is charged with each
MAX_BYTES = 8 << 20

NESTED = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}"
ENDS = "{% endfor %}{% endfor %}{% endfor %}"
BIG = "{% set x = 'xxxxxxxxxx' * 1000 %}"

STEPS = {
    "loops without output": f"{NESTED}{ENDS}",
    "loops that pass over all": "{% for a in range(9999) %}{% for b in range(9999) if b < 0 %}{% endfor %}{% endfor %}",
    "a set in loops": f"{{% set ns = namespace(n=0) %}}{NESTED}{{% set ns.n = ns.n + 1 %}}{ENDS}",
    "calls that branch": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "a recursive loop": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 99 }}{% endfor %}",
    "blocks that branch": "{% block a %}{{ self.b() }}{{ self.b() }}{% endblock %}"
    "{% block b %}{{ self.a() }}{% endblock %}",
    "lazy filters": "{% for a in range(9999) %}{% set b = range(9999)|select('odd')|map('abs')|list %}{% endfor %}",
    "tests": "{{ range(99999)|select('eq', 'x')|first }}",
}
VALUES = {
    "~ doubles": "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "+ doubles": "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "+ doubles a list": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "* of *": "{% set x = 'x' * 65536 * 65536 %}",
    "* of a list": "{% set x = [[0] * 65536] * 65536 %}",
    "nested lists": "{% set ns = namespace(x=[]) %}{% for i in range(99) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nested tuples": "{% set ns = namespace(x=()) %}{% for i in range(99) %}"
    "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ ns.x }}",
    "nested dicts": "{% set ns = namespace(x={}) %}{% for i in range(99) %}"
    "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x|tojson }}",
    "dict()": "{% set ns = namespace(x={}) %}{% for i in range(99) %}"
    "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "set blocks": "{% set ns = namespace(x='x') %}{% for i in range(99) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "fixed text in a set block": "{% set x %}{% for i in range(9999) %}a text that is written {% endfor %}{% endset %}",
    "fixed text in macros": "{% macro f() %}a text that is written{% endmacro %}{% set x %}"
    "{% for i in range(9999) %}{{ f() }}{% endfor %}{% endset %}",
    "join": f"{BIG}{{% set y = range(9999)|join(x) %}}",
    "join of one text": f"{BIG}{{% set y = ([x] * 999)|join %}}",
    "str.join": f"{BIG}{{% set y = x.join('x' * 9999) %}}",
    "replace": f"{BIG}{{% set y = x|replace('x', x) %}}",
    "replace by keywords": f"{BIG}{{% set y = x|replace(new=x, old='') %}}",
    "str.replace": f"{BIG}{{% set y = x.replace('', x) %}}",
    "map of replace": f"{BIG}{{% set y = [x]|map('replace', 'x', x)|list %}}",
    "center": "{{ 'x'|center(1000000000) }}",
    "map of center": "{{ ['x']|map('center', 1000000000)|join }}",
    "str.ljust": "{{ 'x'.ljust(1000000000) }}",
    "str.zfill": "{{ 'x'.zfill(1000000000) }}",
    "an attribute by name": "{{ ('x'|attr('rjust'))(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(9) }}",
    "translate": f"{BIG}{{{{ x.translate({{120: x}}) }}}}",
    "bytes": "{{ 'x'.encode('utf-16') }}",
    "bytes of numbers": "{{ (1).to_bytes(1000000000) }}",
    "indent": "{{ ('\n' * 9999)|indent(4096, blank=true) }}",
    "indent by text": f"{BIG}{{{{ ('\n' * 999)|indent(x, blank=true) }}}}",
    "indent far": "{{ 'x'|indent(1000000000, true) }}",
    "batch": "{{ [1]|batch(1000000000, 'x')|list }}",
    "round": "{{ 1|round(1000000000) }}",
    "% of width": "{{ '%1000000000d' % 1 }}",
    "% of precision": "{{ '%.1000000000f' % 1 }}",
    "% of a given width": "{{ '%*d' % (1000000000, 1) }}",
    "% of one value often": f"{BIG}{{{{ ('%(a)s' * 9999) % {{'a': x}} }}}}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "str.format": "{{ '{:1000000000}'.format(1) }}",
    "str.format of a given width": "{{ '{:{}}'.format(1, 1000000000) }}",
    "str.format of one value often": f"{BIG}{{{{ ('{{0}}' * 9999).format(x) }}}}",
    "str.format_map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "tojson": "{{ {'a': 1}|tojson(indent=1000000000) }}",
    "separators": "{{ [1, 2]|tojson(separators=('x' * 99, ':')) }}",
    "sum of lists": "{{ [[1]]|sum(start=[]) }}",
    "output": f"{BIG}{{% set y %}}{{% for i in range(9999) %}}{{{{ x }}}}{{% endfor %}}{{% endset %}}",
}
DEEP = {
    "a macro of itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a block of itself": "{% block a %}{{ self.a() }}{% endblock %}",
}
TOO_DEEP_TO_COMPILE = {
    "parentheses": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "loops": "{% for a in [1] %}" * 99 + "{% endfor %}" * 99,
    "conditions": "{% if a %}" * 199 + "{% endif %}" * 199,
}
LEFT_OUT = ["{{ 'x'|urlize }}", "{{ 'x'|wordwrap(1) }}", "{{ 'x'|striptags }}", "{{ 'x'|pprint }}"]


def render(source: str, *contents: str, max_characters: int = MAX_CHARACTERS) -> str:
    """Render with a clock that stands still, so that steps and sizes alone end it."""
    looks = itertools.count()

    def clock() -> float:
        assert next(looks) < MAX_LOOKS, "too many steps"
        return 0.0

    messages = tuple(ChatMessage("user", content, "") for content in contents or ("hello",))
    conversation = ConversationInput(messages, True, False, {})
    return ChatTemplate(source, {}, max_characters=max_characters, clock=clock).render(conversation)


@pytest.mark.parametrize("source", [pytest.param(text, id=name) for name, text in {**STEPS, **VALUES, **DEEP}.items()])
def test_a_template_without_end_is_refused(source: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match=r"chat template refuses the conversation: .") as caught:
            render(source)
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()
    assert caught.value.reason == "TEMPLATE_REFUSED"


@pytest.mark.parametrize("source", STEPS.values(), ids=STEPS)
def test_what_was_used_up_is_said(source: str) -> None:
    with pytest.raises(InvalidRequest, match=r"more steps or makes longer values than 64000 units|too deeply"):
        render(source)


@pytest.mark.parametrize("source", DEEP.values(), ids=DEEP)
def test_a_recursion_without_end_is_named(source: str) -> None:
    with pytest.raises(InvalidRequest, match="calls itself, or nests values, too deeply"):
        render(source, max_characters=1 << 20)


@pytest.mark.parametrize("source", TOO_DEEP_TO_COMPILE.values(), ids=TOO_DEEP_TO_COMPILE)
def test_a_template_too_deep_to_compile_is_not_valid(source: str) -> None:
    with pytest.raises(InvalidRequest, match="not valid: it is nested too deeply") as caught:
        render(source)
    assert caught.value.reason == "BAD_TEMPLATE"


@pytest.mark.parametrize("source", LEFT_OUT)
def test_filters_beyond_linear_time_are_left_out(source: str) -> None:
    with pytest.raises(InvalidRequest, match="No filter named") as caught:
        render(source)
    assert caught.value.reason == "BAD_TEMPLATE"


def test_a_loop_without_output_ends_in_time() -> None:
    """The clock is looked at where nothing is output."""
    now = itertools.count()
    template = ChatTemplate(f"{NESTED}{ENDS}", {}, max_seconds=50, clock=lambda: float(next(now)))
    with pytest.raises(InvalidRequest, match="rendering took longer than 50 s"):
        template.render(ConversationInput((ChatMessage("user", "hello", ""),), True, False, {}))
    assert next(now) < 200


def test_a_refused_rendering_leaves_the_next_its_whole_budget() -> None:
    template = ChatTemplate("{% for a in range(messages[0].content|int) %}{% endfor %}done", {}, max_characters=1000)

    def ask(content: str) -> str:
        return template.render(ConversationInput((ChatMessage("user", content, ""),), True, False, {}))

    for _ in range(3):
        with pytest.raises(InvalidRequest, match="32000 units"):
            ask("900")
        assert ask("400") == "done"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ '%5.1f|%s' % (1.25, 'x') }}", "  1.2|x"),
        ("{{ '%05d'|format(42) }} {{ '{:>4}{a}'.format(1, a=2) }}", "00042    12"),
        ("{{ 'x'.rjust(3) }}{{ 'ab'|center(4) }}{{ '-' * 3 }}", "  x ab ---"),
        ("{{ 'a\nb'|indent(2) }}{{ [1, 2]|join(', ') }}{{ 'aXb'|replace('X', '--') }}", "a\n  b1, 2a--b"),
        (
            "{{ ['a', 'b'][1:] + ['c'] }}{{ ('a', 1) }}{{ {'a': [1]}|tojson(indent=1) }}",
            "['b', 'c']('a', 1){\n \"a\": [\n  1\n ]\n}",
        ),
        (
            "{{ [1, 2, 3]|sum }}{{ [1.25]|map('round', 1)|list }}"
            "{% for a, (b, c) in [(1, (2, 3))] %}{{ a + b + c }}{% endfor %}",
            "6[1.2]6",
        ),
        ("{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ ', '.join(['a', 'b']) }}", "2a, b"),
        (
            "{% for a in range(9) if a % 2 %}{{ loop.index }}{{ a }}{{ ' ' if not loop.last }}{% endfor %}",
            "11 23 35 47",
        ),
    ],
)
def test_what_templates_do_goes_on_working(source: str, expected: str) -> None:
    assert render(source) == expected


def test_a_long_conversation_fits_its_budget() -> None:
    """The longest prompt that limits allow by default, in few turns and in many."""
    source = "{% for m in messages[0:] %}{{ '<|' ~ m.role ~ '|>' + m['content']|trim ~ '<|end|>' }}\n{% endfor %}"
    template = ChatTemplate(source, {}, clock=lambda: 0.0)
    for count in (1, 2000):
        messages = tuple(ChatMessage("user", "x" * ((1 << 20) // count), "") for _ in range(count))
        text = template.render(ConversationInput(messages, True, False, {}))
        assert text.count("x") == (1 << 20) // count * count
