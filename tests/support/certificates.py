"""A certificate authority of a test's own, made with openssl."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]


@dataclass(frozen=True)
class Certificate:
    """A certificate and its key, both in PEM form."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates for servers on 127.0.0.1 and for clients.

    Args:
        folder: Where the files are; made when missing.
        name: Whom the authority's certificate names.
    """

    def __init__(self, folder: Path, name: str = "Authority of the tests") -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._own = Certificate(folder / "ca.crt", folder / "ca.key")
        self.path = self._own.certificate
        _openssl("req", "-x509", *_KEY, "-days", "2", "-subj", f"/CN={name}", *_out(self._own))

    def issue(self, name: str, *, host: str = "IP:127.0.0.1") -> Certificate:
        """Give a certificate for a server at ``host``, or for a client."""
        issued = Certificate(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        signed_by = ["-CA", str(self._own.certificate), "-CAkey", str(self._own.key)]
        names = ["-addext", f"subjectAltName={host}", "-addext", "basicConstraints=CA:FALSE"]
        _openssl(
            *("req", "-x509", *signed_by, *_KEY, "-days", "2", "-subj", f"/CN={name}"),
            *names,
            *_out(issued),
        )
        return issued


def _out(pair: Certificate) -> list[str]:
    return ["-out", str(pair.certificate), "-keyout", str(pair.key)]


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
