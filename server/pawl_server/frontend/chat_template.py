"""The model's chat template: a conversation to the exact text of the prompt, in a sandbox with limits.

Follows the conventions of Hugging Face tokenizers. The template comes with the model and is not trusted: no
attribute of Python is reachable from it, and its output and time are bounded. Callers never bring a template.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pawl.errors import FieldViolation, InvalidRequest
from pawl_server.frontend.requests import ConversationInput

__all__ = ["ChatTemplate"]

_MAX_OPERAND = 1 << 16  # of `*` and `**` in a template: enough for arithmetic, too little to fill memory
_MAX_SHOWN = 300  # characters of a template's own complaint that are passed on


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, which training uses to mark turns; here its body alone counts."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Replace the tag by its body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """No attributes, no mutation (jinja2's own sandbox), and no operator that makes much of little."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401 - signature of the base class
        """Refuse operands of `*` and `**` that are too large."""
        for operand in (left, right):
            size = abs(operand) if isinstance(operand, int | float) else len(operand)
            if size > (_MAX_OPERAND if operator == "*" else 64):
                raise SecurityError(f"an operand of {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:  # noqa: ANN401 - options of json.dumps
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().astimezone().strftime(pattern)


class ChatTemplate:
    """A compiled template.

    Args:
        source: the template.
        special_tokens: names such as `bos_token` to their text.
        max_characters: longest output.
        max_seconds: longest time to render.
        clock: monotonic seconds.

    Raises:
        InvalidRequest: the template is not valid.
    """

    def __init__(
        self,
        source: str,
        special_tokens: dict[str, str],
        *,
        max_characters: int = 4 << 20,
        max_seconds: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the chat template is not valid: {error}", reason="BAD_TEMPLATE") from error
        self._special_tokens = special_tokens
        self._max_characters = max_characters
        self._max_seconds = max_seconds
        self._clock = clock

    def render(self, conversation: ConversationInput, field: str = "conversation") -> str:
        """The prompt of a conversation. Blocking: call it on a thread.

        Raises:
            InvalidRequest: the template refuses the conversation, or the output is too large or takes too long;
                on `field`.
        """
        turns = [
            {"role": turn.role, "content": turn.content} | ({"name": turn.name} if turn.name else {})
            for turn in conversation.messages
        ]
        variables = {**self._special_tokens, "tools": None, "documents": None, **conversation.template_kwargs}
        try:
            text = self._run(
                {**variables, "messages": turns, "add_generation_prompt": conversation.add_generation_prompt}
            )
            return _cut_after(text, turns[-1]["content"]) if conversation.continue_final_message else text
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            complaint = str(error)[:_MAX_SHOWN] or type(error).__name__
            raise InvalidRequest(
                f"the model's chat template refuses the conversation: {complaint}",
                reason="TEMPLATE_REFUSED",
                violations=[FieldViolation(field, complaint)],
            ) from error

    def _run(self, variables: dict[str, object]) -> str:
        end = self._clock() + self._max_seconds
        pieces: list[str] = []
        size = 0
        for piece in self._template.generate(variables):
            size += len(piece)
            if size > self._max_characters:
                raise ValueError(f"the rendered prompt is longer than {self._max_characters} characters")
            if self._clock() > end:
                raise ValueError(f"rendering took longer than {self._max_seconds:g} s")
            pieces.append(piece)
        return "".join(pieces)


def _cut_after(text: str, final: str) -> str:
    """The prompt up to the end of its final turn's text, so that the model goes on with it."""
    final = final.strip()
    place = text.rfind(final)
    if place < 0:
        raise ValueError("the template changes the final message, so it cannot be continued")
    return text[: place + len(final)]
