"""Chat templates in the idioms of known families come out byte for byte as transformers renders them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from pawl_server.frontend.chat_template import ChatTemplate
from pawl_server.frontend.requests import ChatMessage, ConversationInput

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {
    "headers, a default system turn, kept whitespace": """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim
            + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "a search backwards in a namespace, thoughts cut off": """\
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<r>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n'
                + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
    "turns, a renamed role, literals and unpacking": """\
{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{% for mark, (open, close) in {'a': ('<', '>'), 'b': ('[', ']')}.items() if loop.first %}\
{{ mark ~ open ~ close }}{% endfor %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}
""",
    "macros, set blocks, JSON, filters": """\
{%- macro turn(role, text, tail='</s>') -%}
    {{- '[' ~ role | upper ~ '] ' }}{{ text }}{{ tail -}}
{%- endmacro -%}
{%- macro wrapped(kind) %}<{{ kind }}>{{ caller() }}</{{ kind }}>{% endmacro -%}
{%- set names = messages | map(attribute='role') | unique | sort | join(', ') %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- set head %}{{ names }}: {{ users | length }} of {{ messages | length }}{% endset %}
{{- head | indent(2) }}
{%- for message in messages %}
    {%- if loop.index0 % 2 == 1 and message.role == 'system' %}{% continue %}{% endif %}
    {%- generation %}{{ turn(message.role, message.content | replace('\\n', ' / ')) }}{% endgeneration %}
    {%- call wrapped('json') %}{{ message | tojson }}{{ [message.content, 1, none] | tojson(indent=2) }}{% endcall %}
{%- endfor %}
{{- '%s|%3d' | format(names, messages | length) }}{{ '{:>5}'.format(3) }}{{ ['a', 'b'] + ['c'] }}{{ '=' * 5 }}
""",
}
ROLES = st.sampled_from(["user", "assistant", "system"])
CONTENTS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        [" <think>\nhm\n</think>\n\nyes ", "<r>x</r>", "a\n  b\n", "<b>&amp;'\"</b>", "{{ bos_token }}", "日本 🙂"]
    ),
)


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
@settings(max_examples=40)
@given(turns=st.lists(st.tuples(ROLES, CONTENTS), min_size=1, max_size=6), generate=st.booleans())
def test_a_template_renders_as_in_transformers(source: str, turns: list[tuple[str, str]], generate: bool) -> None:
    conversation = [{"role": role, "content": content} for role, content in turns]
    (expected,), _ = render_jinja_template(
        [conversation], chat_template=source, add_generation_prompt=generate, **SPECIALS
    )
    messages = tuple(ChatMessage(role, content, "") for role, content in turns)
    template = ChatTemplate(source, SPECIALS, clock=lambda: 0.0)
    assert template.render(ConversationInput(messages, generate, False, {})) == expected
