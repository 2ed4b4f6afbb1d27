"""`pawl generate`, `pawl chat` and `pawl score`: asking a running server for text.

Owns what these commands do once their flags are parsed. Errors rise to `client_commands`; only the chat keeps going
after a turn that failed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from pawl import (
    Chat,
    ChatOptions,
    Client,
    Completion,
    SampleEnd,
    Sampling,
    Stop,
    Stream,
    StreamOptions,
    TokenLogprob,
)
from pawl.errors import InvalidRequest, PawlError
from pawl_server.cli.client_tls import encryption
from pawl_server.cli.render import describe, print_json, print_table, printable

__all__ = ["chat", "connect", "generate", "score"]

_CHAT_HELP = "/reset forgets the conversation, /help shows this; Ctrl-C cancels an answer, Ctrl-D leaves"


def connect(arguments: argparse.Namespace) -> Client:
    """A client for the connection flags."""
    return Client(
        arguments.target,
        timeout=arguments.timeout,
        tls=encryption(arguments),
        default_model=arguments.model or "",
    )


def _text(argument: str) -> str:
    """An argument, or for - what is on stdin.

    Raises:
        InvalidRequest: stdin is no text.
    """
    try:
        return sys.stdin.read() if argument == "-" else argument
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"stdin is not {error.encoding}: {error.reason}", reason="BAD_ARGUMENT") from error


def _sampling(arguments: argparse.Namespace) -> Sampling:
    return Sampling(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        presence_penalty=arguments.presence_penalty,
        frequency_penalty=arguments.frequency_penalty,
        seed=arguments.seed,
        json_schema=_content(arguments.json_schema),
        regex=arguments.regex,
        grammar=_content(arguments.grammar),
        choices=arguments.choice,
    )


def _content(argument: str | None) -> str | None:
    """A flag's value, or with @ before it the content of a file.

    Raises:
        InvalidRequest: the file cannot be read.
    """
    if argument is None or not argument.startswith("@"):
        return argument
    try:
        return Path(argument[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read {argument[1:]}: {error}", reason="BAD_ARGUMENT") from error


def _stop(arguments: argparse.Namespace) -> Stop:
    return Stop(max_tokens=arguments.max_tokens, strings=arguments.stop or (), ignore_eos=arguments.ignore_eos)


def generate(arguments: argparse.Namespace) -> int:
    """Stream a completion to stdout."""
    options: StreamOptions = {
        "sampling": _sampling(arguments),
        "stop": _stop(arguments),
        "priority": arguments.priority,
        "request_id": arguments.request_id,
        "logprobs": arguments.logprobs,
        "token_ids": arguments.json,
        "sample_count": arguments.samples,
    }
    prompt = _text(arguments.prompt)
    with connect(arguments) as client:
        if arguments.json:
            with client.stream(prompt, **options) as stream:
                print_json(stream.final())
            return 0
        with client.stream(prompt, **options) as stream:
            completion = _print_stream(stream) if (arguments.samples or 1) == 1 else _print_samples(stream)
    if arguments.logprobs is not None:
        for sample in completion.samples:
            _print_logprobs(sample.logprobs)
    if arguments.verbose:
        _print_summary(completion)
    return 0


def _print_stream(stream: Stream) -> Completion:
    ended_line = True
    try:
        for piece in stream.text_stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
            ended_line = piece.endswith("\n")
    finally:
        if not ended_line:
            sys.stdout.write("\n")
            sys.stdout.flush()
    return stream.final()


def _print_samples(stream: Stream) -> Completion:
    """Each sample under its number, as soon as it is complete."""
    for event in stream:
        if isinstance(event, SampleEnd):
            text = next(sample.text for sample in stream.partial.samples if sample.index == event.index)
            print(f"[{event.index}] {text}", flush=True)
    return stream.final()


def _print_logprobs(tokens: tuple[TokenLogprob, ...]) -> None:
    rows = [
        (
            position,
            token.token_id,
            printable(token.token_bytes),
            "" if token.logprob is None else f"{token.logprob:.4f}",
            token.rank,
            "  ".join(f"{printable(other.token_bytes)} {other.logprob:.4f}" for other in token.alternatives),
        )
        for position, token in enumerate(tokens)
    ]
    print_table(("position", "id", "token", "logprob", "rank", "alternatives"), rows)


def _print_summary(completion: Completion) -> None:
    usage, timings = completion.usage, completion.timings
    reason = completion.finish_reason.value if completion.finish_reason else "incomplete"
    parts = [
        f"request {completion.request_id}",
        reason,
        f"{usage.prompt_tokens} prompt tokens ({usage.cached_prompt_tokens} cached)",
        f"{usage.output_tokens} output tokens",
        f"seed {completion.seed}",
    ]
    if timings is not None:
        parts.append(f"first token after {timings.time_to_first_token:.3f} s")
        parts.append(f"{timings.output_tokens_per_second:.1f} tokens/s")
    print(", ".join(parts), file=sys.stderr)


def chat(arguments: argparse.Namespace) -> int:
    """One turn with `--once`, else a conversation."""
    options: ChatOptions = {
        "sampling": _sampling(arguments),
        "stop": _stop(arguments),
        "priority": arguments.priority,
        "request_id": arguments.request_id,
    }
    with connect(arguments) as client:
        conversation = client.chat(system=arguments.system, **options)
        if arguments.once is not None:
            _say(conversation, _text(arguments.once), verbose=arguments.verbose)
            return 0
        names = ", ".join(model.id for model in client.models.list())
        if sys.stdin.isatty():
            _set_up_line_editing()
            print(f"{arguments.model or names}: {_CHAT_HELP}", file=sys.stderr)
        return _converse(conversation, verbose=arguments.verbose)


def _set_up_line_editing() -> None:
    with contextlib.suppress(ImportError):  # absent on some systems
        import readline  # noqa: F401, PLC0415 (importing it makes `input` editable)


def _converse(conversation: Chat, *, verbose: bool) -> int:
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:  # an unfinished line is dropped, as a shell does
            print(file=sys.stderr)
            continue
        match line:
            case "":
                continue
            case "/reset":
                conversation.reset()
            case "/help":
                print(_CHAT_HELP, file=sys.stderr)
            case _:
                _turn(conversation, line, verbose=verbose)


def _turn(conversation: Chat, text: str, *, verbose: bool) -> None:
    """One turn; a failed or cancelled one is told, leaves the conversation as it was, and ends nothing."""
    try:
        _say(conversation, text, verbose=verbose)
    except KeyboardInterrupt:
        print("cancelled; this turn is not remembered", file=sys.stderr)
    except PawlError as error:
        print(f"error: {describe(error)}", file=sys.stderr)


def _say(conversation: Chat, text: str, *, verbose: bool) -> None:
    with conversation.stream(text) as stream:
        completion = _print_stream(stream)
    if verbose:
        _print_summary(completion)


def score(arguments: argparse.Namespace) -> int:
    """A table of the continuations, in the order given."""
    with connect(arguments) as client:
        scores = client.score(_text(arguments.context), arguments.continuations)
    if arguments.json:
        print_json(scores.continuations)
        return 0
    rows = [
        (
            repr(text),
            f"{scored.total_logprob:.4f}",
            f"{scored.total_logprob / max(1, len(scored.tokens)):.4f}",
            f"{scored.total_logprob / max(1, scored.byte_count):.4f}",
            len(scored.tokens),
            "yes" if scored.greedy_match else "no",
        )
        for text, scored in zip(arguments.continuations, scores, strict=True)
    ]
    print_table(("continuation", "logprob", "per token", "per byte", "tokens", "greedy"), rows)
    return 0
