"""A Ray of our own: what a start that fails leaves, and the second try."""

from __future__ import annotations

import contextlib

import psutil
import pytest

from tests.fakes.ray_marks import RAY

ray = pytest.importorskip("ray")
pytestmark = RAY


def _living() -> set[psutil.Process]:
    """All that this process started, but for those that ended and that Ray, which holds them, has not asked after."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.add(process)
    return found


class _LateNode:
    """In the place of Ray's question for a node that has just started: says `failures` times that it is not there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
        from ray._private import services

        self._ask = services.get_node
        self.failures = failures
        self.running: list[set[psutil.Process]] = []
        monkeypatch.setattr(services, "get_node", self)

    def __call__(self, *arguments: object) -> object:
        if self.failures == 0:
            return self._ask(*arguments)
        self.failures -= 1
        self.running.append(_living())
        raise Exception("The current node timed out during startup.")  # noqa: TRY002  # as bare as Ray's own


def test_a_node_that_registers_too_late_is_ended_and_started_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pawl_server.fleet.ray_session import end_ray, start_ray

    node = _LateNode(monkeypatch, failures=1)
    before = _living()
    start_ray(num_cpus=1)
    try:
        assert ray.is_initialized()
        (abandoned,) = node.running
        assert abandoned > before
        assert not abandoned & _living() - before
        assert "trying once more" in caplog.text
    finally:
        end_ray()
    assert _living() == before


def test_a_ray_that_cannot_be_started_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from pawl_server.fleet.ray_session import start_ray

    node = _LateNode(monkeypatch, failures=2)
    before = _living()
    with pytest.raises(Exception, match="timed out during startup"):
        start_ray(num_cpus=1)
    assert len(node.running) == 2
    assert not ray.is_initialized()
    assert _living() == before
