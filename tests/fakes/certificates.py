"""Certificates for tests over TLS, made on the fly."""

from __future__ import annotations

from pathlib import Path

import trustme

from pawl import TLS

__all__ = ["Certificates"]


class Certificates:
    """An authority and the files that a server and a client are given."""

    def __init__(self, folder: Path) -> None:
        self.authority = trustme.CA()
        self.folder = folder
        self.ca = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(self.ca)
        self.issue()
        client = self.authority.issue_cert("client@example.org")
        client.private_key_pem.write_to_path(folder / "client.key")
        client.cert_chain_pems[0].write_to_path(folder / "client.pem")

    def issue(self, authority: trustme.CA | None = None) -> None:
        """Give the server a new certificate."""
        made = (authority or self.authority).issue_cert("127.0.0.1", "localhost", "pawl.localhost")
        made.private_key_pem.write_to_path(self.folder / "server.key")
        made.cert_chain_pems[0].write_to_path(self.folder / "server.pem")

    @property
    def cert(self) -> str:
        """The server's certificate."""
        return str(self.folder / "server.pem")

    @property
    def key(self) -> str:
        """Its key."""
        return str(self.folder / "server.key")

    def client(self, *, own: bool = False) -> TLS:
        """What a client is told; its own certificate if asked."""
        if not own:
            return TLS(ca_file=self.ca)
        return TLS(ca_file=self.ca, certificate_file=self.folder / "client.pem", key_file=self.folder / "client.key")
