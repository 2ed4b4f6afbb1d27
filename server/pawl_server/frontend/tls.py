"""TLS of the public listener, with certificates that may be replaced while it runs."""

from __future__ import annotations

import logging
from pathlib import Path

import grpc

from pawl.errors import InvalidRequest
from pawl_server.config import SecuritySettings

__all__ = ["server_credentials"]

log = logging.getLogger(__name__)


class _Files:
    """Certificate files and the moment they were last changed."""

    def __init__(self, settings: SecuritySettings) -> None:
        self._key, self._cert = Path(settings.tls_key), Path(settings.tls_cert)
        self._client_ca = Path(settings.tls_client_ca) if settings.tls_client_ca else None
        self._stamp: list[int] = []

    def read(self) -> grpc.ServerCertificateConfiguration | None:
        """The files' content; None if nothing changed since the last call.

        Raises:
            OSError: one cannot be read.
        """
        paths = [self._key, self._cert, *([self._client_ca] if self._client_ca else [])]
        stamp = [path.stat().st_mtime_ns for path in paths]
        if stamp == self._stamp:
            return None
        key, cert, *authority = [path.read_bytes() for path in paths]
        made = grpc.ssl_server_certificate_configuration([(key, cert)], authority[0] if authority else None)
        self._stamp = stamp
        return made

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """As `read`, for gRPC, which asks at every handshake; keeps the old certificate when the new one fails."""
        try:
            return self.read()
        except OSError as error:
            log.error("keeping the TLS certificate as it was: %s", error)  # noqa: TRY400 - the trace says no more
            return None


def server_credentials(settings: SecuritySettings) -> grpc.ServerCredentials | None:
    """Credentials of the settings; None without TLS.

    Raises:
        InvalidRequest: a file is missing or cannot be read.
    """
    if not settings.tls_cert and not settings.tls_key:
        if settings.tls_client_ca:
            raise InvalidRequest("tls_client_ca needs tls_cert and tls_key", reason="BAD_SETTING")
        return None
    if not (settings.tls_cert and settings.tls_key):
        raise InvalidRequest("tls_cert and tls_key belong together: one of them is missing", reason="BAD_SETTING")
    files = _Files(settings)
    try:
        first = files.read()
    except OSError as error:
        raise InvalidRequest(f"cannot read the TLS files: {error}", reason="BAD_SETTING") from error
    # The stubs do not know that the fetcher may answer None for "as before".
    return grpc.dynamic_ssl_server_credentials(first, files.fetch, bool(settings.tls_client_ca))  # type: ignore[arg-type]
