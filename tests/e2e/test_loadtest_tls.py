"""The load generators against a server that takes TLS alone, and asks for a certificate of theirs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes.certificates import Certificates
from tests.fakes.front_end import RunningFrontEnd, front_end
from tests.fakes.load_generators import locust, run_generator
from tests.fakes.tokenizer import write_checkpoint

LOAD = ("--requests=4", "--rate=50", "--lengths=8/4", "--max-lateness-ms=60000")


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


@pytest.fixture
async def server(tmp_path: Path, certificates: Certificates) -> AsyncIterator[RunningFrontEnd]:
    cert, key, ca = certificates.cert, certificates.key, str(certificates.ca)
    async with front_end(write_checkpoint(tmp_path / "toy"), tls_cert=cert, tls_key=key, tls_client_ca=ca) as running:
        yield running


async def test_the_open_loop_shows_its_certificate(server: RunningFrontEnd, certificates: Certificates) -> None:
    folder = certificates.folder
    own = ("--tls-certificate", str(folder / "client.pem"), "--tls-key", str(folder / "client.key"))
    generate = ("pawl_loadtest", "--target", server.addresses.grpc, *LOAD)
    done = await asyncio.to_thread(run_generator, *generate, "--tls-ca", str(certificates.ca), *own)
    assert done.returncode == 0, done.stderr
    assert "4  (0 failed)" in done.stdout
    assert len(server.engine.submits) == 4
    done = await asyncio.to_thread(run_generator, *generate, "--tls-ca", str(certificates.ca), *own[:2])
    assert done.returncode == 1
    assert "tls has no key_file" in done.stderr


async def test_locust_shows_its_certificate(
    server: RunningFrontEnd, certificates: Certificates, tmp_path: Path
) -> None:
    files = {
        "PAWL_LOAD_TLS_CA": str(certificates.ca),
        "PAWL_LOAD_TLS_CERTIFICATE": str(certificates.folder / "client.pem"),
        "PAWL_LOAD_TLS_KEY": str(certificates.folder / "client.key"),
    }
    flags = ("-u", "1", "-t", "2s")
    done = await asyncio.to_thread(locust, server.addresses.grpc, tmp_path / "run", *flags, **files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert server.engine.submits
