"""The model's chat template: a conversation to the exact text of the prompt, in a sandbox with limits.

Follows the conventions of Hugging Face tokenizers. The template comes with the model and is not trusted: no
attribute of Python is reachable from it, and its output and time are bounded. Callers never bring a template.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from typing import NoReturn

import jinja2

from pawl.errors import FieldViolation, InvalidRequest
from pawl_server.frontend.requests import ConversationInput
from pawl_server.frontend.template_budget import Budget
from pawl_server.frontend.template_sandbox import TemplateSandbox

__all__ = ["ChatTemplate"]

_MAX_SHOWN = 300  # characters of a template's own complaint that are passed on
_UNITS_PER_CHARACTER = 32  # of output: how often a template may make a text anew, in pieces, before it comes out


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
        environment = TemplateSandbox()
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._environment = environment
        self._max_characters = max_characters
        self._max_seconds = max_seconds
        self._clock = clock
        try:
            self._template = environment.compile_bounded(source, self._budget())
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the chat template is not valid: {error}", reason="BAD_TEMPLATE") from error
        self._special_tokens = special_tokens

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
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            AttributeError,
            RecursionError,
            MemoryError,
        ) as error:
            complaint = (
                "it calls itself, or nests values, too deeply" if isinstance(error, RecursionError) else str(error)
            )
            complaint = complaint[:_MAX_SHOWN] or type(error).__name__
            raise InvalidRequest(
                f"the model's chat template refuses the conversation: {complaint}",
                reason="TEMPLATE_REFUSED",
                violations=[FieldViolation(field, complaint)],
            ) from error

    def _budget(self) -> Budget:
        return Budget(_UNITS_PER_CHARACTER * self._max_characters, self._max_seconds, self._clock)

    def _run(self, variables: dict[str, object]) -> str:
        self._environment.start(self._budget())
        pieces: list[str] = []
        size = 0
        for piece in self._template.generate(variables):
            size += len(piece)
            if size > self._max_characters:
                raise ValueError(f"the rendered prompt is longer than {self._max_characters} characters")
            pieces.append(piece)
        return "".join(pieces)


def _cut_after(text: str, final: str) -> str:
    """The prompt up to the end of its final turn's text, so that the model goes on with it."""
    final = final.strip()
    place = text.rfind(final)
    if place < 0:
        raise ValueError("the template changes the final message, so it cannot be continued")
    return text[: place + len(final)]
