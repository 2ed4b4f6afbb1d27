"""Checks and times the variants: one engine process at a time, taking turns, several rounds.

Every variant of a round is started, warmed up, timed on every workload and ended before the next one starts, since
the idle threads of an engine spin; the next round goes the other way round. pawl over gRPC alone is timed with pawl in
process alive beside it, whose idle threads sleep, so that the two can take turns run by run (`timing.py`). Before
anything is timed, the variant's greedy tokens are compared with those of transformers in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from pawl_loadtest.peers.driver import Driver, EngineError, tokens_of
from pawl_loadtest.peers.environments import EnvironmentUnavailable
from pawl_loadtest.peers.machine import Machine
from pawl_loadtest.peers.timing import RUN_TIMEOUT_S, Timed, generate, time_alone, time_pairs, warm_up
from pawl_loadtest.peers.variants import BASE, Variant
from pawl_loadtest.peers.workloads import Workload

__all__ = ["Agreement", "Course", "Outcome", "Reference", "compare", "read_reference", "run_rounds"]

_ENGINES = Path(__file__).parent / "engines"
_LOAD_TIMEOUT_S = 1800.0
_CHECK_PROMPT_TOKENS = 48
# A reference's best logit that leads by no more than twice the error allowed to a table's logits is a tie: either token
# is right. The tables of 8 bits and bf16 have no tolerance, so that every difference shows.
_TIE = {"exact": 2e-4, "fp16": 4e-3, "coarse": 0.0}


@dataclass(frozen=True, slots=True)
class Reference:
    """Prompts, the greedy tokens of transformers in fp32, and by how much each led."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    margins: list[list[float]]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a variant's greedy tokens compare with the reference's.

    Attributes:
        share: of the tokens, those up to each sequence's first difference.
        first_difference: the earliest step at which a sequence differs; None when none does.
        margin: by how much the reference's token led there.
        agrees: every first difference is a tie within the table's tolerance.
    """

    share: float
    first_difference: int | None
    margin: float | None
    agrees: bool


@dataclass(slots=True)
class Outcome:
    """What a variant did. `failure` says why it did no more.

    Attributes:
        rates: tokens per second by workload, by number of the round.
        others: cores that others took meanwhile, likewise.
        pairs: likewise, for every pair of runs the seconds of the variant it is paired with over its own.
        cpu: likewise, CPU seconds of a run of it by part of the server, where it is one.
        machines: likewise, what the machine could do right before and right after; of pawl in process.
    """

    variant: Variant
    facts: Mapping[str, object] = field(default_factory=dict)
    agreement: Agreement | None = None
    rates: dict[str, dict[int, float]] = field(default_factory=dict)
    others: dict[str, dict[int, float]] = field(default_factory=dict)
    pairs: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    cpu: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    machines: dict[str, dict[int, Machine]] = field(default_factory=dict)
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Course:
    """What all variants run.

    Attributes:
        pairs: runs of each workload in a round where two variants take turns.
        measure: what the machine can do now; None where it cannot be measured quickly.
    """

    checkpoint: Path
    vocab_size: int
    workloads: Sequence[Workload]
    rounds: int
    threads: int
    check_tokens: int
    logs: Path
    interpreter: Callable[[str], Path]
    say: Callable[[str], None]
    pairs: int = 2
    measure: Callable[[], Machine | None] = lambda: None
    engines: Path = _ENGINES

    def arguments(self, settings: Mapping[str, str]) -> dict[str, object]:
        """Of an engine's `load`."""
        workloads = [
            [workload.requests, workload.prompt_tokens, workload.output_tokens]
            for workload in (*self.workloads, self.check)
        ]
        return {
            "checkpoint": str(self.checkpoint),
            "threads": self.threads,
            "workloads": workloads,
            "settings": dict(settings),
        }

    @property
    def check(self) -> Workload:
        """What outputs are compared on."""
        return Workload(4, _CHECK_PROMPT_TOKENS, self.check_tokens)

    def driver(self, variant: Variant) -> Driver:
        """Start a variant's engine.

        Raises:
            EnvironmentUnavailable: it cannot be installed.
        """
        python = self.interpreter(variant.environment)
        log = self.logs / f"{variant.name.replace(' ', '-')}.log"
        return Driver(python, self.engines / variant.engine, log, threads=self.threads, variables=variant.variables)


def read_reference(course: Course) -> Reference:
    """Ask transformers in fp32, with plain attention.

    Raises:
        EngineError: it fails.
        EnvironmentUnavailable: it cannot be installed.
    """
    variant = Variant("reference", "transformers", "transformers_engine.py", "exact", 4)
    prompts = course.check.prompts(course.vocab_size, seed=1)
    with course.driver(variant) as driver:
        driver.call("load", course.arguments({"attention": "eager"}), _LOAD_TIMEOUT_S)
        arguments = {"prompts": prompts, "output_tokens": course.check_tokens}
        result = driver.call("reference", arguments, RUN_TIMEOUT_S)
    margins = result["margins"]
    if not isinstance(margins, list):
        raise EngineError("the reference gave no margins")
    return Reference(prompts, tokens_of(result), margins)


def compare(reference: Reference, tokens: Sequence[Sequence[int]], table: str) -> Agreement:
    """Hold greedy tokens to the reference's. What follows a sequence's first difference is not compared."""
    equal, total = 0, 0
    differences: list[tuple[int, float]] = []
    for expected, margins, got in zip(reference.tokens, reference.margins, tokens, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b), len(expected))
        equal, total = equal + same, total + len(expected)
        if same < len(expected):
            differences.append((same, margins[same]))
    step, margin = min(differences, default=(None, None))
    return Agreement(equal / total, step, margin, all(margin <= _TIE[table] for _, margin in differences))


def run_rounds(course: Course, variants: Sequence[Variant], reference: Reference) -> list[Outcome]:
    """Check every variant, then time it, round after round; a variant that fails is not asked again."""
    outcomes = [Outcome(variant) for variant in variants]
    for number in range(course.rounds):
        for outcome in outcomes if number % 2 == 0 else reversed(outcomes):
            if outcome.failure is None:
                course.say(f"round {number + 1} of {course.rounds}: {outcome.variant.name}")
                try:
                    _run_round(course, outcome, variants, reference, number)
                except (EngineError, EnvironmentUnavailable) as error:
                    outcome.failure = str(error)
                    course.say(f"  {error}")
    return outcomes


def _run_round(
    course: Course, outcome: Outcome, variants: Iterable[Variant], reference: Reference, number: int
) -> None:
    variant = outcome.variant
    with ExitStack() as alive:
        driver = alive.enter_context(course.driver(variant))
        outcome.facts = driver.call("load", course.arguments(variant.settings), _LOAD_TIMEOUT_S)
        if number == 0:
            tokens, _ = generate(driver, reference.prompts, course.check_tokens)
            outcome.agreement = compare(reference, tokens, variant.table)
        partner = _partner(course, variant, variants, alive)
        for workload in course.workloads:
            prompts = workload.prompts(course.vocab_size, seed=10 + number)
            for each in (driver, partner) if partner else (driver,):
                warm_up(each, workload, course.vocab_size)
            machine = course.measure() if variant.name in BASE.values() else None
            if partner is None:
                timed = time_alone(driver, prompts, workload.output_tokens)
            else:
                timed = time_pairs(partner, driver, prompts, workload.output_tokens, course.pairs)
                outcome.pairs.setdefault(workload.name, {})[number] = timed.ratios
                outcome.cpu.setdefault(workload.name, {})[number] = timed.cpu
            if machine is not None:
                outcome.machines.setdefault(workload.name, {})[number] = machine.better(course.measure() or machine)
            _keep(outcome, workload, number, timed)


def _keep(outcome: Outcome, workload: Workload, number: int, timed: Timed) -> None:
    outcome.rates.setdefault(workload.name, {})[number] = workload.counted_tokens / timed.seconds
    outcome.others.setdefault(workload.name, {})[number] = timed.others


def _partner(course: Course, variant: Variant, variants: Iterable[Variant], alive: ExitStack) -> Driver | None:
    """The loaded engine that the variant takes turns with, if that one takes part."""
    partner = next((other for other in variants if other.name == variant.paired_with), None)
    if partner is None:
        return None
    driver = alive.enter_context(course.driver(partner))
    driver.call("load", course.arguments(partner.settings), _LOAD_TIMEOUT_S)
    return driver
