"""Who may call a service that listens on loopback: whoever has the home's token, over TLS with the home's certificate.

Both are made once, and lie in `HOME/serving/` (0600, in a folder of 0700): a file that others can read is refused, not used.
The token is compared in constant time (`server.py`).
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import secrets
from pathlib import Path

from stillroom_client.serving.codes import AccessError
from stillroom_client.serving.places import FOLDER, serving_folder
from stillroom_shared.files import replace_file

_VALID = dt.timedelta(days=3650)
_EARLIER = dt.timedelta(days=30)  # a certificate that ends sooner is made anew


def token_of(home: Path, *, make: bool = False) -> str:
    """The bearer token of a home.

    Raises:
        AccessError: there is none, or others could read it.
    """
    path = home.resolve() / FOLDER / "token"
    if make and not path.exists():
        replace_file(serving_folder(home) / "token", secrets.token_urlsafe(32).encode())
    return read_secret(path).decode().strip()


def certificate_of(home: Path) -> bytes:
    """The certificate that a client trusts (PEM)."""
    return read_secret(home.resolve() / FOLDER / "certificate.pem")


def key_and_certificate(home: Path) -> tuple[bytes, bytes]:
    """Of the server (PEM); made when there are none, or when the certificate is about to end."""
    folder = serving_folder(home)
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    if key.exists() and certificate.exists():
        found = read_secret(key), read_secret(certificate)
        if _fit(*found):
            return found
    made = _self_signed()
    replace_file(key, made[0])
    replace_file(certificate, made[1])
    return made


def read_secret(path: Path) -> bytes:
    """A file that only its owner may read; `AccessError` when it is missing or others can read it."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_mode & 0o077 or status.st_uid != os.getuid():
                raise AccessError(f"{path} can be read by others: `chmod 600` it, or remove it for a new one")
            return file.read()
    except OSError as error:
        raise AccessError(f"{path} cannot be read ({error.strerror}): `stillroom serve --tcp` makes it") from error


def _fit(key: bytes, certificate: bytes) -> bool:
    """Whether they belong together and are valid for some time."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        found = x509.load_pem_x509_certificate(certificate)
        own = load_pem_private_key(key, None).public_key() == found.public_key()
    except ValueError:
        return False
    return own and found.not_valid_after_utc > dt.datetime.now(dt.UTC) + _EARLIER


def _self_signed() -> tuple[bytes, bytes]:
    """A P-256 key and its certificate for this machine's loopback names (PEM)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "stillroom")])
    now = dt.datetime.now(dt.UTC)
    hosts = [x509.IPAddress(ipaddress.ip_address(host)) for host in ("127.0.0.1", "::1")]
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + _VALID)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost"), *hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private, built.public_bytes(serialization.Encoding.PEM)
