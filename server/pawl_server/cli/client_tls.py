"""The flags by which a program that talks to a server says how to encrypt, and what they mean."""

from __future__ import annotations

import argparse
from pathlib import Path

from pawl import TLS

__all__ = ["add_tls_flags", "encryption", "tls_of"]


def add_tls_flags(group: argparse._ActionsContainer) -> None:
    """Add --tls-ca, --tls-certificate and --tls-key; `encryption` reads them."""
    group.add_argument(
        "--tls-ca",
        type=Path,
        metavar="FILE",
        help="PEM file of the authorities that sign the server; turns TLS on",
    )
    group.add_argument(
        "--tls-certificate",
        type=Path,
        metavar="FILE",
        help="PEM file of your certificate, for a server that asks for one; turns TLS on",
    )
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM file of its key")


def encryption(arguments: argparse.Namespace) -> TLS | None:
    """What the flags say of TLS; None leaves it to the target.

    Raises:
        InvalidRequest: a certificate without its key, or a key without its certificate.
    """
    return tls_of(arguments.tls_ca, arguments.tls_certificate, arguments.tls_key)


def tls_of(ca: Path | None, certificate: Path | None, key: Path | None) -> TLS | None:
    """TLS with these files; None, where there are none, leaves it to the target.

    Raises:
        InvalidRequest: a certificate without its key, or a key without its certificate.
    """
    if ca is None and certificate is None and key is None:
        return None
    return TLS(ca_file=ca, certificate_file=certificate, key_file=key)
