"""TLS and API keys over real sockets: who gets in, what he may do, and what the others are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme
from grpc_health.v1 import health_pb2

from pawl import (
    TLS,
    AdminClient,
    AsyncAdminClient,
    AsyncClient,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    Stop,
    Unauthenticated,
    Unavailable,
    user,
)
from pawl_server.cli import main
from pawl_server.frontend.auth import hash_key, new_key
from tests.fakes.certificates import Certificates
from tests.fakes.fake_engine import TOKEN
from tests.fakes.front_end import RunningFrontEnd, front_end, health_stub
from tests.fakes.tokenizer import write_checkpoint

FREE, LIMITED, OTHER = new_key(), new_key(), new_key()
STOP = Stop(max_tokens=4)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "toy")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(
        f'[[keys]]\nhash = "{hash_key(FREE)}"\ntenant = "acme"\nmax_priority = 3\n'
        f'[[keys]]\nhash = "{hash_key(OTHER)}"\ntenant = "umbrella"\nrequests_per_minute = 2\n'
        f'[[keys]]\nhash = "{hash_key(LIMITED)}"\ntenant = "limited"\nmax_concurrent = 1\ntokens_per_minute = 100000\n'
    )
    return path


@pytest.fixture
async def guarded(checkpoint: Path, keys: Path) -> AsyncIterator[RunningFrontEnd]:
    async with front_end(checkpoint, api_key_file=str(keys)) as running:
        yield running


def _client(server: RunningFrontEnd, key: str = "", tls: TLS | None = None) -> AsyncClient:
    return AsyncClient(server.addresses.grpc, api_key=key, retries=0, tls=tls)


async def test_no_key_and_a_wrong_key_are_refused_without_the_key(guarded: RunningFrontEnd) -> None:
    wrong = new_key()
    for key, reason in (("", "API_KEY_MISSING"), (wrong, "API_KEY_INVALID")):
        async with _client(guarded, key) as client:
            with pytest.raises(Unauthenticated) as refused:
                await client.generate("hello", stop=STOP)
            with pytest.raises(Unauthenticated):
                await client.models.list()
        assert refused.value.reason == reason
        assert wrong not in str(refused.value)
    assert guarded.engine.submits == []


async def test_health_needs_no_key(guarded: RunningFrontEnd) -> None:
    answer = await health_stub(guarded.channel).Check(health_pb2.HealthCheckRequest(service="readiness"))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_tenants_do_not_share_a_cache_whatever_they_say(guarded: RunningFrontEnd) -> None:
    for key, name in ((FREE, "umbrella"), (FREE, "somebody"), (OTHER, "acme")):
        async with _client(guarded, key) as client:
            await client.generate("hello", stop=STOP, user=name)
    mine, mine_again, theirs = (submit.cache_key for submit in guarded.engine.submits)
    assert mine == mine_again != theirs


async def test_nobody_promotes_himself(guarded: RunningFrontEnd) -> None:
    async with _client(guarded, FREE) as client:
        await client.generate("hello", stop=STOP, priority=3)
        with pytest.raises(InvalidRequest, match=r"options\.priority"):
            await client.generate("hello", stop=STOP, priority=4)
    assert [submit.priority for submit in guarded.engine.submits] == [3]


async def test_a_tenants_rate_is_his_own(guarded: RunningFrontEnd) -> None:
    async with _client(guarded, OTHER) as client:
        for _ in range(2):
            await client.generate("hello", stop=STOP)
        with pytest.raises(Overloaded, match="2 requests per minute") as refused:
            await client.generate("hello", stop=STOP)
    assert refused.value.reason == "REQUEST_RATE"
    assert refused.value.retry_after is not None
    async with _client(guarded, FREE) as client:
        await client.generate("hello", stop=STOP)


async def test_calls_of_the_tokenizer_are_requests_of_their_tenant(guarded: RunningFrontEnd) -> None:
    """Of the same minute as those that generate; nothing else of the tenant's limits holds for them."""
    async with _client(guarded, OTHER) as client:
        await client.tokenize("hello")
        await client.generate("hello", stop=STOP)
        for call in (
            client.tokenize("hello"),
            client.detokenize([1]),
            client.render_chat([user("hello")]),
            client.generate("hello", stop=STOP),
        ):
            with pytest.raises(Overloaded, match="2 requests per minute") as refused:
                await call
            assert refused.value.reason == "REQUEST_RATE"
            assert refused.value.retry_after is not None
    guarded.engine.hold_after = 1
    async with _client(guarded, LIMITED) as client, client.stream("hello", stop=Stop(max_tokens=8)) as stream:
        await anext(stream)
        assert await client.tokenize("hello")
        guarded.engine.release.set()
        await stream.final()


async def test_a_tenants_requests_at_once(guarded: RunningFrontEnd) -> None:
    guarded.engine.hold_after = 1
    async with _client(guarded, LIMITED) as client, client.stream("hello", stop=Stop(max_tokens=8)) as stream:
        await anext(stream)
        with pytest.raises(Overloaded, match="1 requests at once") as refused:
            await client.generate("hello", stop=STOP)
        assert refused.value.reason == "CONCURRENCY"
        guarded.engine.release.set()
        await stream.final()
        await client.generate("hello", stop=STOP)


async def test_an_admin_listener_beyond_loopback_wants_the_internal_token(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names under localhost always mean loopback (RFC 6761), which the server does not know of any but the first."""
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    async with front_end(checkpoint, admin_host="pawl.localhost") as server:
        target = server.addresses.admin
        for wrong in ("", "another"):
            async with AsyncAdminClient(target, internal_token=wrong, retries=0) as admin:
                with pytest.raises(Unauthenticated, match="--internal-token-file") as refused:
                    await admin.server_info()
            assert refused.value.reason == "INTERNAL_TOKEN_INVALID"
            assert TOKEN not in str(refused.value)
        async with AsyncAdminClient(target, internal_token=file) as admin, admin.watch_load() as watch:
            assert TOKEN not in str((await admin.server_info()).config)
            assert (await anext(aiter(watch))).block_count == 100
        with AdminClient(target, internal_token=TOKEN) as sync_admin:
            assert await asyncio.to_thread(sync_admin.requests) == []
        for given, code in (([], 1), (["--internal-token-file", str(file)], 0)):
            words = ["requests", "--json", "--admin-target", target, *given]
            assert await asyncio.to_thread(main, words) == code
        assert TOKEN not in "".join(capsys.readouterr())


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


async def _works(server: RunningFrontEnd, tls: TLS | None) -> bool:
    async with AsyncClient(server.addresses.grpc, retries=0, tls=tls, timeout=5.0) as client:
        try:
            await client.generate("hello", stop=STOP)
        except (Unavailable, DeadlineExceeded):
            return False
    return True


async def test_tls_serves_who_trusts_it_and_nobody_in_the_clear(checkpoint: Path, certificates: Certificates) -> None:
    async with front_end(checkpoint, tls_cert=certificates.cert, tls_key=certificates.key) as server:
        assert await _works(server, certificates.client())
        assert not await _works(server, None)
        assert not await _works(server, Certificates(_folder(certificates.folder / "stranger")).client())


async def test_client_certificates_are_asked_for_when_an_authority_is_given(
    checkpoint: Path, certificates: Certificates
) -> None:
    ca = str(certificates.ca)
    async with front_end(checkpoint, tls_cert=certificates.cert, tls_key=certificates.key, tls_client_ca=ca) as server:
        assert await _works(server, certificates.client(own=True))
        assert not await _works(server, certificates.client())


async def test_the_command_line_shows_its_certificate(
    checkpoint: Path, certificates: Certificates, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both listeners ask for it; who has none, or half of one, is told so."""
    ca, folder = str(certificates.ca), certificates.folder
    certificate = ["--tls-certificate", str(folder / "client.pem")]
    own = ["--tls-ca", ca, *certificate, "--tls-key", str(folder / "client.key")]
    (folder / "token").write_text(TOKEN)
    cert, key = certificates.cert, certificates.key
    async with front_end(
        checkpoint, admin_host="pawl.localhost", tls_cert=cert, tls_key=key, tls_client_ca=ca
    ) as server:
        generate = ["generate", "hello", "-n", "4", "--timeout", "5", "--target", server.addresses.grpc]
        requests = ["requests", "--json", "--timeout", "5", "--admin-target", server.addresses.admin]
        requests += ["--internal-token-file", str(folder / "token")]

        async def run(*words: str) -> int:
            return await asyncio.to_thread(main, list(words))

        assert await run(*generate, *own) == 0
        assert await run(*requests, *own) == 0
        capsys.readouterr()
        assert await run(*generate, "--tls-ca", ca) == 3
        assert await run(*requests, "--tls-ca", ca) == 3
        assert await run(*generate, "--tls-ca", ca, *certificate) == 1
        assert "tls has no key_file" in capsys.readouterr().err


async def test_a_replaced_certificate_is_used_at_the_next_handshake(
    checkpoint: Path, certificates: Certificates
) -> None:
    async with front_end(checkpoint, tls_cert=certificates.cert, tls_key=certificates.key) as server:
        assert await _works(server, certificates.client())
        other = trustme.CA()
        certificates.issue(other)
        other.cert_pem.write_to_path(certificates.folder / "other.pem")
        assert await _works(server, TLS(ca_file=certificates.folder / "other.pem"))
        assert not await _works(server, certificates.client())
        (certificates.folder / "server.pem").unlink()  # it keeps the last that it had
        assert await _works(server, TLS(ca_file=certificates.folder / "other.pem"))


async def test_half_of_tls_is_refused_by_name(checkpoint: Path, certificates: Certificates) -> None:
    for cert, key, authority, says in (
        (certificates.cert, "", "", "tls_cert and tls_key"),
        ("", certificates.key, "", "tls_cert and tls_key"),
        ("", "", str(certificates.ca), "tls_client_ca needs tls_cert and tls_key"),
        (certificates.cert, certificates.key + "-missing", "", "cannot read the TLS files"),
    ):
        with pytest.raises(InvalidRequest, match=says):
            async with front_end(checkpoint, tls_cert=cert, tls_key=key, tls_client_ca=authority):
                pass


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
