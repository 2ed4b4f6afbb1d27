"""`python -m pawl_loadtest.grammar_bench`: llguidance against xgrammar, for structured output.

Compile time, mask time per token, memory, features of JSON Schema, regex and EBNF that do what they mean, grammars
meant to hurt, and whether other threads run meanwhile; each in a process of its own, a hostile grammar with 20 s and
4 GiB. Then what constraints cost a step of pawl. xgrammar is no dependency: `pip install --no-deps xgrammar
apache-tvm-ffi` beside torch and transformers, or it is left out. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence

from pawl_loadtest.arguments import positive
from pawl_loadtest.grammar_bench.cases import HOSTILE
from pawl_loadtest.grammar_bench.libraries import LIBRARIES
from pawl_loadtest.grammar_bench.steps import lines, measure_steps

QUESTIONS = ("speed", "features", "lock", "hostile", "step")
_TIMEOUT_S = 120.0
_HOSTILE_TIMEOUT_S = 20.0

Answer = dict[str, str | float]


def _ask(library: str, question: str, vocabulary: str, *rest: str, timeout_s: float = _TIMEOUT_S) -> list[Answer]:
    command = [sys.executable, "-m", "pawl_loadtest.grammar_bench.probe", library, question, vocabulary, *rest]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return [{"case": "", "outcome": f"not done after {timeout_s:g} s"}]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return [{"case": "", "outcome": f"the process died with {done.returncode}: {last[:80]}"}]
    return [json.loads(line) for line in done.stdout.splitlines()]


def _show(title: str, answers: dict[str, list[Answer]]) -> None:
    print(f"\n## {title}\n")
    for library, found in answers.items():
        for answer in found:
            if "unavailable" in answer:
                print(f"{library}: {answer['unavailable']}")
                continue
            values = (f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in answer.items() if k != "case")
            print(f"{library:10} | {answer['case']:26} | {' '.join(values)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask both libraries and print what they answer."""
    parser = argparse.ArgumentParser(prog="python -m pawl_loadtest.grammar_bench", description=__doc__)
    parser.add_argument("questions", nargs="*", choices=[*QUESTIONS, []], help="default: all")
    parser.add_argument("--vocabulary", type=int, default=150_000, help="size of the synthetic vocabulary")
    parser.add_argument("--streams", type=positive, default=16, help="streams of a step")
    parser.add_argument("--tokens", type=positive, default=128, help="tokens of each")
    parser.add_argument("--rounds", type=positive, default=5, help="how often each kind is measured")
    parser.add_argument("--depth", type=positive, default=1, choices=(1, 2), help="steps in flight")
    parser.add_argument("--threads", type=positive, default=2, help="compute threads")
    options = parser.parse_args(arguments)
    asked = options.questions or QUESTIONS
    large = str(options.vocabulary)
    for question in ("speed", "features", "lock"):
        for vocabulary in ("embedded", large) if question == "speed" else ("embedded",):
            if question in asked:
                _show(
                    f"{question}, {vocabulary} vocabulary",
                    {name: _ask(name, question, vocabulary) for name in LIBRARIES},
                )
    if "hostile" in asked:
        for index, grammar in enumerate(HOSTILE):
            found = {}
            for name in LIBRARIES:
                found[name] = _ask(name, "hostile", large, str(index), timeout_s=_HOSTILE_TIMEOUT_S)
            _show(f"hostile: {grammar.name}", found)
    if "step" in asked:
        print(f"\n## step: {options.streams} streams, {options.depth} in flight\n")
        measured = measure_steps(options.streams, options.tokens, options.rounds, options.depth, options.threads)
        for line in lines(asyncio.run(measured)):
            print(line)


if __name__ == "__main__":
    main()
