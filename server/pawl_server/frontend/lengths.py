"""What can be checked only once the prompt's tokens are counted: prompt and output against the context limit.

Pure; nothing is ever cut to fit.
"""

from __future__ import annotations

from pawl.errors import InvalidRequest
from pawl_server.config import LimitSettings
from pawl_server.frontend.requests import StopRules
from pawl_server.frontend.violations import Violations

__all__ = ["check_prompt", "output_limit"]


def check_prompt(field: str, num_prompt: int, max_context: int, limits: LimitSettings, *, num_output: int = 1) -> None:
    """Check the number of prompt tokens against the context and the server's own limit.

    Args:
        field: path of the prompt in the request.
        num_prompt: tokens of the prompt.
        max_context: most tokens of prompt and output together.
        limits: the server's limits.
        num_output: least number of output tokens that must fit (0 for scoring).

    Raises:
        InvalidRequest: the prompt has no token, or too many.
    """
    found = Violations()
    room = max_context - num_output
    text = f"{num_prompt} tokens and at least {num_output} of output are more than the context of {max_context} tokens"
    found.check(num_prompt > 0, field, "the prompt has no tokens")
    if found.check(num_prompt <= room, field, text) and limits.max_prompt_tokens:
        text = f"{num_prompt} tokens, at most {limits.max_prompt_tokens} are allowed"
        text += " (server setting limits.max_prompt_tokens)"
        found.check(num_prompt <= limits.max_prompt_tokens, field, text)
    try:
        found.raise_if_any()
    except InvalidRequest as error:
        error.metadata |= {"prompt_tokens": str(num_prompt), "max_context_tokens": str(max_context)}
        raise


def output_limit(path: str, stop: StopRules, num_prompt: int, max_context: int, limits: LimitSettings) -> int:
    """Most tokens to generate; -1 = up to the context limit.

    Raises:
        InvalidRequest: the caller asked for more than the context has room for.
    """
    room = max_context - num_prompt
    found = Violations(path)
    for field, value in (
        ("max_output_tokens", stop.max_output_tokens or 0),
        ("min_output_tokens", stop.min_output_tokens),
    ):
        text = f"{value} tokens after a prompt of {num_prompt} are more than the context of {max_context}: {room} fit"
        found.check(value <= room, f"stop.{field}", text)
    found.raise_if_any()
    if stop.max_output_tokens is not None:
        return stop.max_output_tokens
    if limits.max_output_tokens and limits.max_output_tokens < room:
        return limits.max_output_tokens
    return -1
