"""The benchmark of speculation: its model follows the chain, its tasks are what they say, and outputs are compared."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from pawl_loadtest.peers.shapes import SHAPES, Shape
from pawl_loadtest.speculation_bench import Outcome, Run, Runner, main
from pawl_loadtest.speculation_tasks import CYCLE, TASKS, Task, write_chain
from pawl_server.engine.grammar.compiler import GrammarCompiler, checkpoint_tokenizer
from pawl_server.engine.grammar.constraint import Constraint
from pawl_workers.worker import Worker, WorkerOptions

TINY = Shape("tiny", "llama", 192, 64, 2, 4, 2, 48, 1024, 2048, 10_000.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chain")


@pytest.fixture(scope="module")
def runner(folder: Path) -> Runner:
    path = write_chain(TINY, folder)
    options = WorkerOptions(str(path), max_running=8, max_batch_tokens=512, max_context=700, num_blocks=100)
    ticks = itertools.count()  # drafts cost no time, so that how many there are does not rest on the machine
    return Runner((Worker.load(options), Worker.load(options)), 40, 6, lambda: next(ticks) / 1000)


def test_a_copy_is_word_for_word_and_drafts_of_it_are_right(runner: Runner) -> None:
    off, run = runner.run(TASKS["copy"], 2)
    for number, token_ids in enumerate(run.token_ids):
        assert token_ids == [(37 * number + 1 + place) % CYCLE for place in range(40)]
    assert run.num_accepted == run.num_drafts > 50
    assert off.num_drafts == 0


def test_a_fresh_text_never_comes_again(runner: Runner) -> None:
    _, run = runner.run(TASKS["fresh"], 1)
    assert run.token_ids[0] == list(range(2 * CYCLE + 1, 2 * CYCLE + 41))
    assert run.num_drafts == 0


def test_a_list_of_objects_fits_its_schema_as_far_as_it_comes(runner: Runner) -> None:
    _, run = runner.run(TASKS["json"], 2)
    compiler = GrammarCompiler(lambda: checkpoint_tokenizer("demo", "", TINY.vocab_size, [2]))
    for token_ids in run.token_ids:
        matcher = compiler.compile(Constraint("json_schema", TASKS["json"].schema)).prototype
        assert matcher.validate_tokens(token_ids) == len(token_ids) == 40
    assert run.num_accepted > 20


@pytest.mark.parametrize("task", TASKS)
def test_both_ways_give_the_same(runner: Runner, task: str) -> None:
    outcome = Outcome(task, 3)
    for _ in range(2):
        outcome.measure(runner)
    assert min(outcome.on + outcome.off) > 0
    assert task in outcome.line()


def test_other_outputs_are_not_timed(
    runner: Runner, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def differ(self: Runner, task: Task, num_requests: int) -> tuple[Run, Run]:
        del self, task
        off, on = (Run([[token_id]] * num_requests, [[None]] * num_requests, 1, 1.0) for token_id in (0, 1))
        return off, on

    monkeypatch.setitem(SHAPES, "smollm2-135m", TINY)
    monkeypatch.setattr(Runner, "run", differ)
    assert main(["--folder", str(folder), "--requests", "1", "--rounds", "1"]) == 1
    assert "outputs with drafts are not those without" in capsys.readouterr().err
