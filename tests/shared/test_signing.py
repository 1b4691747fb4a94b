"""Ed25519 keys and signatures."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from stillroom_shared.errors import ReleaseError
from stillroom_shared.signing import SigningKey, verify


def test_signature_is_of_these_bytes_by_this_key() -> None:
    """A verifier that ignores the data or the key would accept any release."""
    key, other = SigningKey.generate(), SigningKey.generate()
    signature = key.sign(b"manifest")
    assert verify(key.public, signature, b"manifest")
    assert not verify(key.public, signature, b"manifesto")
    assert not verify(other.public, signature, b"manifest")
    assert not verify(key.public, other.sign(b"manifest"), b"manifest")


@pytest.mark.parametrize("signature", ["", "00", "zz" * 64, "00" * 64, "ff" * 64, "00" * 65])
def test_malformed_signature_is_no_signature(signature: str) -> None:
    """An exception that a caller catches too widely, or a lenient parser, could turn garbage into acceptance."""
    assert not verify(SigningKey.generate().public, signature, b"manifest")


def test_malformed_public_key_is_refused_by_name() -> None:
    """Answering False would read as 'altered', and send people looking at the wrong end."""
    with pytest.raises(ReleaseError, match="'abc' is not an Ed25519 public key"):
        verify("abc", "00" * 64, b"manifest")


def test_known_answer() -> None:
    """RFC 8032, 7.1, test 2: a different encoding or pre-hash would break every release that exists."""
    public = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    signature = (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    assert verify(public, signature, b"\x72")


def test_saved_key_is_private_and_the_same(tmp_path: Path) -> None:
    """A key that others can read signs for them; a key that changes on disk orphans what it signed."""
    path, key = tmp_path / "operator.key", SigningKey.generate()
    key.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert SigningKey.load(path).public == key.public
    assert verify(key.public, SigningKey.load(path).sign(b"x"), b"x")


def test_saving_never_overwrites(tmp_path: Path) -> None:
    """An overwritten key cannot be recovered, and with it every release's continuation is lost."""
    path, key = tmp_path / "operator.key", SigningKey.generate()
    key.save(path)
    with pytest.raises(ReleaseError, match="exists"):
        SigningKey.generate().save(path)
    assert SigningKey.load(path).public == key.public


def test_secret_is_never_shown() -> None:
    """Representations end up in logs and tracebacks."""
    key = SigningKey.generate()
    secret = key._secret.private_bytes_raw()
    assert secret.hex() not in repr(key) and repr(secret) not in repr(key)
    assert repr(key) == "SigningKey()"


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    """An unexplained parser error does not tell an operator which file is wrong."""
    missing, garbage, wrong = tmp_path / "none", tmp_path / "garbage", tmp_path / "x25519"
    garbage.write_text("not a key")
    wrong.write_bytes(X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    for path, words in ((missing, "holds no signing key"), (garbage, "holds no signing key"), (wrong, "X25519")):
        with pytest.raises(ReleaseError, match=words) as caught:
            SigningKey.load(path)
        assert str(path) in str(caught.value)
