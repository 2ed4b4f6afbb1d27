"""The commands that talk to a server: what they print, and their exit codes."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import pawl
from pawl import AdminClient, Client
from pawl.testing import FakeServer
from pawl_server.cli import client_commands
from pawl_server.cli.render import describe, print_table

Run = Callable[..., int]


@pytest.fixture
def run(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line against the fake."""
    monkeypatch.setenv("PAWL_TARGET", server.target)
    monkeypatch.setenv("PAWL_ADMIN_TARGET", server.admin_target)

    def run_command(*words: str) -> int:
        parser = argparse.ArgumentParser(prog="pawl")
        client_commands.register(parser.add_subparsers(required=True))
        arguments = parser.parse_args(words)
        code: int = arguments.run(arguments)
        return code

    return run_command


def test_generate_streams_text(run: Run, server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """Text on stdout, nothing else; the flags reach the server."""
    assert run("generate", "Hi", "-n", "9", "-t", "0", "--seed", "3", "--stop", "X", "--stop", "Z") == 0
    assert capsys.readouterr() == ("You said:\n", "")
    request = server.calls[-1].fields["request"]
    assert isinstance(request, dict)
    assert request["sampling"] == {"temperature": 0.0, "seed": "3"}
    assert request["stop"] == {"max_output_tokens": 9, "stop_strings": ["X", "Z"]}


def test_generate_from_stdin(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """- reads the prompt; -v tells about the run on stderr."""
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert run("generate", "-", "-v") == 0
    out, err = capsys.readouterr()
    assert out == "You said: from a pipe\n"
    assert "stop, 12 prompt tokens (0 cached), 21 output tokens, seed 42, first token after 0.003 s" in err


def test_what_is_no_text_on_stdin_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8"))
    assert run("generate", "-") == 1
    assert capsys.readouterr().err.startswith("error: BAD_ARGUMENT: stdin is not utf-8")


def test_generate_json_and_logprobs(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON has every field; the table has a line per token."""
    assert run("generate", "Hi", "-n", "2", "--json", "--logprobs") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["text"], answer["finish_reason"], answer["token_ids"]) == ("Yo", "max_tokens", [89, 111])
    assert answer["logprobs"][0]["token_bytes"] == "Y"
    assert run("generate", "Hi", "-n", "2", "--logprobs", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Yo"
    assert lines[1].split() == ["position", "id", "token", "logprob", "rank", "alternatives"]
    assert lines[2].split() == ["0", "89", "'Y'", "-1.0000", "1", "'Y'", "-1.0000"]
    assert len(lines) == 4


def test_generate_samples(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Each under its number; as JSON all of them, and the first one's text as ever."""
    assert run("generate", "Hi", "--samples", "3", "--logprobs") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("[")] == [
        "[0] You said: Hi",
        "[1] You said: Hi #1",
        "[2] You said: Hi #2",
    ]
    assert run("generate", "Hi", "--samples", "2", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["text"] == "You said: Hi"
    assert [sample["text"] for sample in document["samples"]] == ["You said: Hi", "You said: Hi #1"]


def test_chat_once(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """One turn."""
    assert run("chat", "--once", "Hi", "--system", "Be brief.") == 0
    assert capsys.readouterr().out == "You said: Hi\n"


def test_chat_remembers(
    run: Run, server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines from a pipe are turns; a failed one is told and not remembered; end of input leaves."""
    server.fail(pawl.ServerError("oops"), method="StreamChat")
    monkeypatch.setattr("sys.stdin", io.StringIO("fails\n\none\ntwo\n/reset\nthree\n"))
    assert run("chat") == 0
    out, err = capsys.readouterr()
    assert out == "You said: one\nYou said: two\nYou said: three\n"
    assert err == "error: INTERNAL: oops\n"
    turns = [call.fields["request"] for call in server.calls if call.method == "StreamChat"]
    assert [len(turn["conversation"]["messages"]) for turn in turns if isinstance(turn, dict)] == [1, 1, 3, 1]


class InterruptedOutput(io.StringIO):
    """Ctrl-C falls while the first piece is written: at a known point, in the main thread, without a clock."""

    pressed = False

    def write(self, text: str) -> int:
        written = super().write(text)
        if text.strip() and not self.pressed:
            self.pressed = True
            raise KeyboardInterrupt
        return written


def test_interrupt_cancels(run: Run, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the request and gives 130."""
    server.hang(after=1)
    monkeypatch.setattr("sys.stdout", InterruptedOutput())
    assert run("generate", "Hi") == 130
    assert server.wait_abandoned()


def test_interrupt_in_a_chat(
    run: Run, server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C ends the answer, not the conversation."""
    server.hang(after=1)
    out = InterruptedOutput()
    monkeypatch.setattr("sys.stdin", io.StringIO("long\nshort\n"))
    monkeypatch.setattr("sys.stdout", out)
    assert run("chat") == 0
    assert out.getvalue().endswith("You said: short\n")
    assert "cancelled" in capsys.readouterr().err
    assert server.wait_abandoned()


def test_score(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """A line per continuation, in order."""
    assert run("score", "Hi", "You", " no") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["continuation", "logprob", "per", "token", "per", "byte", "tokens", "greedy"]
    assert lines[1].split() == ["'You'", "-2.3000", "-0.7667", "-0.7667", "3", "yes"]
    assert lines[2].endswith("no")
    assert run("score", "Hi", "You", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["greedy_match"] is True


def test_models_and_requests(run: Run, server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """Tables, and the same as JSON."""
    assert run("models") == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["fake", "FakeForCausalLM", "4096"]
    server.hang(after=1)
    with Client(server.target) as client, client.stream("Hi", request_id="r") as stream:
        next(stream.text_stream)
        assert run("requests") == 0
        headers, line = capsys.readouterr().out.splitlines()
        assert headers.endswith("because")
        assert line.split()[:3] == ["r", "decode", "3"]
        assert run("requests", "--json") == 0
        assert json.loads(capsys.readouterr().out)[0]["request_id"] == "r"


def test_cancel_and_drain(run: Run, server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown id is told and gives 1; a drain answers when nothing runs."""
    server.hang(after=1)
    with Client(server.target) as client, client.stream("Hi", request_id="r") as stream:
        next(stream.text_stream)
        assert run("cancel", "r") == 0
        assert stream.final().finish_reason == "cancelled"
    assert run("cancel", "nobody") == 1
    assert capsys.readouterr().out == "r: cancelled\nnobody: not found\n"
    assert run("drain", "--grace", "0") == 0
    assert capsys.readouterr().out == "drained; 0 requests cancelled\n"
    assert run("generate", "Hi", "--timeout", "0.1") == 1
    assert "try again in 1 s" in capsys.readouterr().err


def test_errors_are_one_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """With the reason and every violation."""
    assert run("generate", "Hi", "--top-p", "3", "-t", "-1") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: INVALID_FIELD: ")
    assert "sampling.top_p must be in (0, 1]" in err
    assert "sampling.temperature must be in [0, 100]" in err


def test_no_server(run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """3, and how to start one."""
    assert run("generate", "Hi", "--target", "127.0.0.1:1", "--timeout", "0.3") == 3
    assert "pawl serve" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["generate"],
        ["score", "Hi"],
        ["generate", "Hi", "-n", "many"],
        ["models", "--timeout", "0"],
        ["drain", "--grace", "-1"],
    ],
)
def test_wrong_usage(words: list[str], run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """2, as argparse does."""
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert caught.value.code == 2


def test_describe_names_what_the_sentence_does_not() -> None:
    """A field that the message already names is not said twice."""
    error = pawl.InvalidRequest(
        "sampling.top_p is 3",
        violations=[pawl.FieldViolation("sampling.top_p", "is 3"), pawl.FieldViolation("stop", "no")],
    )
    assert describe(error) == "INVALID_FIELD: sampling.top_p is 3; stop: no"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_table_on_a_terminal_shows_markup_as_it_is() -> None:
    """rich draws it; what a user wrote is never read as markup."""
    out = Terminal()
    print_table(("name", "count"), [("[red]x[/red]", 3)], out)
    assert "[red]x[/red]" in out.getvalue()


def test_admin_flag_wins(run: Run, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--admin-target` over the variable."""
    monkeypatch.setenv("PAWL_ADMIN_TARGET", "127.0.0.1:1")
    assert run("requests", "--admin-target", server.admin_target) == 0
    with AdminClient(server.admin_target) as admin:
        assert admin.requests() == []


@pytest.mark.parametrize(
    ("flags", "sent"),
    [
        (("--choice", "yes", "--choice", "no"), {"choices": {"values": ["yes", "no"]}}),
        (("--regex", "[a-z]+"), {"regex": "[a-z]+"}),
        (("--json-schema", '{"type": "null"}'), {"json_schema": '{"type": "null"}'}),
        (("--json-schema", "@schema.json"), {"json_schema": '{"type": "object"}'}),
        (("--grammar", "@rules.lark"), {"grammar": 'start: "a"\n'}),
    ],
)
def test_generate_under_a_constraint(
    run: Run,
    server: FakeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    sent: dict[str, object],
) -> None:
    """The flags reach the server; @ reads a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    (tmp_path / "rules.lark").write_text('start: "a"\n')
    assert run("generate", "Hi", *flags) == 0
    request = server.calls[-1].fields["request"]
    assert isinstance(request, dict)
    assert request["sampling"] == sent


def test_generate_takes_one_constraint_and_says_which_file_is_missing(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of them are a usage error; a file that is not there is named."""
    with pytest.raises(SystemExit):
        run("generate", "Hi", "--regex", "a", "--choice", "b")
    assert "not allowed with" in capsys.readouterr().err
    assert run("generate", "Hi", "--grammar", "@missing.lark") != 0
    assert "missing.lark" in capsys.readouterr().err


def test_the_fake_answers_with_a_choice_and_refuses_what_the_server_refuses(server: FakeServer) -> None:
    """The first choice, unless its reply is one of them."""
    with Client(server.target, retries=0) as client:
        assert client.generate("Hi", choices=["yes", "no"]).text == "yes"
        assert client.generate("Hi", choices=["yes", "You said: Hi"]).text == "You said: Hi"
        for options, field in (
            ({"choices": []}, "sampling.choices.values"),
            ({"json_schema": "[1]"}, "sampling.json_schema"),
            ({"regex": "a", "stop": "b"}, "stop.stop_strings"),
        ):
            with pytest.raises(pawl.InvalidRequest) as caught:
                client.generate("Hi", **options)
            assert [violation.field for violation in caught.value.violations] == [field]
