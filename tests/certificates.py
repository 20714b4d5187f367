"""Certificates for tests, made by trustme: an authority that nobody else knows, and what it has signed."""

import functools
import pathlib
import ssl
import tempfile
from typing import Any

import trustme

__all__ = ["Authority", "authority", "client_context", "other_authority", "server_context"]

VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class Authority:
    """An authority, and its certificates as files.

    Attributes:
        file: its own certificate, for ``ca_certs``.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pants_green-certificates-")
        self._authority = trustme.CA()
        self._issued: dict[tuple[str, ...], Any] = {}
        self.file = self._write("authority.pem", self._authority.cert_pem)

    def _write(self, name: str, *blobs: Any) -> str:
        path = pathlib.Path(self._folder.name, name)
        path.write_bytes(b"".join(blob.bytes() for blob in blobs))
        return str(path)

    def issue(self, *names: str, **options: Any) -> dict[str, str]:
        """Return the options ``certfile`` and ``keyfile`` of a certificate for `names`; the same files for the same names."""
        key = (*names, *map(repr, options.items()))
        if key not in self._issued:
            made = self._authority.issue_cert(*names, **options)
            stem = f"{len(self._issued)}"
            self._issued[key] = {
                "certfile": self._write(f"{stem}.pem", *made.cert_chain_pems),
                "keyfile": self._write(f"{stem}.key", made.private_key_pem),
            }
        return dict(self._issued[key])

    @property
    def localhost(self) -> dict[str, str]:
        """The certificate of this machine: localhost, 127.0.0.1 and ::1."""
        return self.issue("localhost", "127.0.0.1", "::1")


@functools.cache
def authority() -> Authority:
    """Return the authority of this test run."""
    return Authority()


@functools.cache
def other_authority() -> Authority:
    """Return one that nobody trusts."""
    return Authority()


def _limited(context: Any, version: str | None) -> Any:
    if version is not None:
        context.minimum_version = context.maximum_version = VERSIONS[version]
    return context


def server_context(version: str | None = None) -> Any:
    """Return a server's context with the certificate of this machine.

    Args:
        version: "1.2" or "1.3" for that only.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(**authority().localhost)
    return _limited(context, version)


def client_context(version: str | None = None) -> Any:
    """Return a client's context that trusts the authority."""
    return _limited(ssl.create_default_context(cafile=authority().file), version)
