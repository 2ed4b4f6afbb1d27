"""Conversations: their turns and the variables of the chat template, checked against the public contract."""

from __future__ import annotations

from pawl.v1 import types_pb2
from pawl_server.config import LimitSettings
from pawl_server.frontend.requests import ChatMessage, ConversationInput
from pawl_server.frontend.violations import Violations

__all__ = ["conversation"]

_MAX_NAME_BYTES = 64
_ROLES = {
    types_pb2.ROLE_SYSTEM: "system",
    types_pb2.ROLE_USER: "user",
    types_pb2.ROLE_ASSISTANT: "assistant",
    types_pb2.ROLE_TOOL: "tool",
}
# Names that the renderer or the template language itself gives a meaning.
_RESERVED_KWARGS = frozenset(
    (
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "bos_token",
        "eos_token",
        "unk_token",
        "pad_token",
        "sep_token",
        "cls_token",
        "raise_exception",
        "strftime_now",
        "range",
        "loop",
        "namespace",
        "dict",
        "cycler",
        "joiner",
        "lipsum",
        "self",
        "caller",
        "varargs",
        "kwargs",
        "true",
        "false",
        "none",
        "True",
        "False",
        "None",
    )
)


def conversation(found: Violations, message: types_pb2.Conversation, limits: LimitSettings) -> ConversationInput:
    """Check a conversation; the template itself may refuse it later."""
    turns: list[ChatMessage] = []
    if found.count("conversation.messages", len(message.messages), limits.max_messages, "limits.max_messages", low=1):
        for index, turn in enumerate(message.messages):
            field = f"conversation.messages[{index}]"
            role = _ROLES.get(turn.role, "")
            found.check(bool(role), f"{field}.role", f"{turn.role} is not a role: set SYSTEM, USER, ASSISTANT or TOOL")
            found.text(f"{field}.name", turn.name, _MAX_NAME_BYTES)
            turns.append(ChatMessage(role, turn.content, turn.name))
    kwargs = dict(message.template_kwargs)
    name_field = "conversation.template_kwargs"
    if found.count(name_field, len(kwargs), limits.max_template_kwargs, "limits.max_template_kwargs"):
        for name in kwargs:
            shown = f"{name_field}[{name[:40]!r}]"
            if found.check(name.isidentifier() and len(name) <= _MAX_NAME_BYTES, shown, "not a variable name"):
                found.check(name not in _RESERVED_KWARGS, shown, "the renderer itself uses this name")
    size = sum(len(t.content.encode()) for t in turns) + sum(len(value.encode()) for value in kwargs.values())
    allowed = limits.max_prompt_bytes
    text = f"{size} bytes in all, at most {allowed} are allowed (server setting limits.max_prompt_bytes)"
    found.check(size <= allowed, "conversation.messages", text)
    final = message.continue_final_message
    asked = message.HasField("add_generation_prompt") and message.add_generation_prompt
    if final and asked:
        found.add("conversation.add_generation_prompt", "must be unset or false with `continue_final_message`")
    if final and turns and not turns[-1].content.strip():
        found.add(f"conversation.messages[{len(turns) - 1}].content", "there is no text to continue")
    opening = not final and (message.add_generation_prompt if message.HasField("add_generation_prompt") else True)
    return ConversationInput(tuple(turns), opening, final, kwargs)
