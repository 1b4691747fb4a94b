"""What a vault seals: only as it was, only under its name, only in its home."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillroom_shared import vault as module
from stillroom_shared.errors import EncryptionError
from stillroom_shared.vault import MARK, PLAIN, Vault

PIECE = 64
HEAD = len(MARK) + 32


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", PIECE)


@pytest.mark.parametrize("length", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 7])
def test_what_was_sealed_comes_back_whole(length: int) -> None:
    """Guards against a piece that is lost or doubled where content ends with one."""
    vault, content = Vault(bytes(32)), bytes(n % 251 for n in range(length))
    for parts in ((content,), (content[: length // 2], content[length // 2 :]), (b"", content, b"")):
        sealed = b"".join(vault.seal("a", *parts))
        assert vault.open("a", sealed) == content
        assert len(sealed) == HEAD + length + 16 * max(1, -(-length // PIECE))
        assert b"".join(PLAIN.seal("a", *parts)) == PLAIN.open("a", content) == content


def test_nothing_but_what_was_sealed_is_opened() -> None:
    """Guards against pieces that can be dropped, swapped, repeated or taken from an earlier version of a file."""
    vault, content = Vault(bytes(32)), bytes(range(200))  # pieces of 64, 64, 64, 8
    sealed, again = (b"".join(vault.seal("index", content)) for _ in range(2))
    assert sealed != again and sealed[:HEAD] != again[:HEAD], "two writes share a key"
    step = PIECE + 16
    pieces = [sealed[HEAD + n * step : HEAD + (n + 1) * step] for n in range(4)]
    others = [again[HEAD + n * step : HEAD + (n + 1) * step] for n in range(4)]
    assert vault.open("index", sealed[:HEAD] + b"".join(pieces)) == content
    for wrong in (pieces[:3], pieces[1:], [pieces[1], pieces[0], *pieces[2:]], [*pieces, pieces[3]], [pieces[0], *pieces],
                  [others[0], *pieces[1:]], [], [b""], [*pieces, b"\0"]):  # fmt: skip
        with pytest.raises(EncryptionError):
            vault.open("index", sealed[:HEAD] + b"".join(wrong))
    for place in (0, len(MARK), HEAD - 1, HEAD, HEAD + step, len(sealed) - 1):
        altered = bytearray(sealed)
        altered[place] ^= 1
        with pytest.raises(EncryptionError):
            vault.open("index", bytes(altered))
    for length in range(0, len(sealed), 7):
        with pytest.raises(EncryptionError):
            vault.open("index", sealed[:length])
    with pytest.raises(EncryptionError):
        vault.open("consent", sealed)
    with pytest.raises(EncryptionError):
        Vault(bytes(31) + b"\1").open("index", sealed)
    with pytest.raises(EncryptionError):
        vault.open("index", content)


def test_keys_have_one_use_and_are_not_shown() -> None:
    """Guards against one key for two files of SQLite, and a key in a log."""
    vault = Vault(bytes(range(32)))
    keys = {vault.database_key("store"), vault.database_key("ledger"), f"x'{bytes(range(32)).hex()}'"}
    assert len(keys) == 3 and PLAIN.database_key("store") is None
    assert all(key is not None and len(key) == 67 for key in keys)
    assert repr(vault) == "Vault()" and str(Path("x")) not in repr(vault)
