"""`pawl serve --fleet local`, and its parts started apart."""

from __future__ import annotations

import pytest

from pawl import AdminClient, Client
from tests.e2e import serve_story
from tests.fakes.network import has_ipv6
from tests.fakes.servers import StartFailedError, pawl_fleet, pawl_frontend, pawl_serve


def test_a_life() -> None:
    """Answers, loses its engine, loses a client, refuses a second server on its port, drains."""
    with pawl_serve() as server:
        lines = server.output.strip().splitlines()
        assert lines[-1].startswith("READY"), server.output
        assert sum(line.startswith(f"[{step}/5]") for step in range(1, 6) for line in lines) == 5
        serve_story.answers(server)
        serve_story.frees_what_a_dead_client_held(server, serve_story.CLIENT_SCRIPT)
        serve_story.survives_the_loss_of_an_engine(server)
        port = server.target.rpartition(":")[2]
        with pytest.raises(StartFailedError) as second, pawl_serve(f"--port={port}"):
            raise AssertionError("a second server started on the port of the first")
        assert second.value.exit_code == 1
        assert port in second.value.errors
        serve_story.drains_on_sigterm(server)


def test_fleet_and_front_end_apart() -> None:
    """The same parts, started by their own commands, stream; two replicas share the work."""
    with pawl_fleet("--replicas=2") as fleet, pawl_frontend(fleet.fleet) as frontend:
        serve_story.answers(frontend)
        with AdminClient(frontend.admin) as admin:
            assert admin.server_info().replica_count == 2
        with Client(frontend.target) as client:
            client.generate("x", max_tokens=1)
        assert frontend.stop() == 0
        assert fleet.stop() == 0
        assert frontend.leftovers() == []
        assert fleet.leftovers() == []


@pytest.mark.skipif(not has_ipv6(), reason="IPv6 NOT TRIED: this machine has no ::1")
def test_everything_on_ipv6() -> None:
    hosts = [f"--{name}=::1" for name in ("host", "admin-host", "metrics-host", "fleet-host", "engine-host")]
    with pawl_serve(*hosts) as server:
        assert server.target.startswith("[::1]:")
        serve_story.answers(server)
        with AdminClient(server.admin) as admin:
            assert admin.server_info().replica_count == 1
        shown = server.scrape()
        assert "pawl_worker_up{" in shown
        assert "pawl_requests_total{" in shown, "of the front end"
        assert "pawl_output_tokens_total{" in shown, "of the engine"


def test_a_model_that_is_not_there_fails_loudly() -> None:
    """One block that says what and where; exit code 1; nothing is tried for ever."""
    with pytest.raises(StartFailedError) as failed, pawl_serve("--num-blocks=8", "./no-such-model"):
        raise AssertionError("it started")
    assert failed.value.exit_code == 1
    assert "no-such-model" in failed.value.errors


def test_a_killed_parent_leaves_no_process() -> None:
    """SIGKILL of `pawl serve`, as of the kernel out of memory: its engine and front end end by themselves."""
    with pawl_serve() as server:
        assert len(server.processes()) == 3
        server.process.kill()
        server.wait()
        assert server.leftovers() == []
