"""`stillroom index encrypt`, `decrypt` and `passphrase`; and `--passphrase-file`, on every command that opens a home."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from stillroom_client.encrypting import Protection

Home = Annotated[Path, typer.Option(help="Home of the device.")]
Keyring = Annotated[bool, typer.Option("--keyring", help="Keep the key in the system keyring.")]
NewFile = Annotated[
    Path | None,
    typer.Option("--new-passphrase-file", metavar="FILE", help="Read the new passphrase from a file of mode 0600."),
]


class HomeCommand(TyperCommand):
    """A command that opens a home, and so may need its passphrase."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.params.append(
            click.Option(
                ["--passphrase-file"],
                type=click.Path(path_type=Path),
                metavar="FILE",
                expose_value=False,
                callback=_use,
                help="Read the passphrase of an encrypted home from a file of mode 0600; else STILLROOM_PASSPHRASE_FILE "
                "names it, or you are asked.",
            )
        )


def register(index: typer.Typer) -> None:
    """Add the commands to the group `stillroom index`."""
    for command in (encrypt, decrypt, passphrase):
        index.command()(command)


def open_homes(app: typer.Typer) -> None:
    """Give `--passphrase-file` to every command of this room with a home: call it after they are registered."""
    for group in app.registered_groups:
        if group.typer_instance is not None:
            open_homes(group.typer_instance)
    for command in app.registered_commands:
        function = command.callback
        if (
            function is None
            or not function.__module__.startswith("stillroom_client.")
            or command.cls is not TyperCommand
        ):
            continue
        if "home" in inspect.signature(function).parameters:
            command.cls = HomeCommand


def encrypt(home: Home, keyring: Keyring = False, new_file: NewFile = None) -> None:
    """Encrypt what a device holds: documents, indexes, feedback, ledger, keys."""
    from stillroom_client import encrypting
    from stillroom_client.device import Device
    from stillroom_client.unlocking import is_encrypted

    Device.name_of(home)  # nothing is asked for a folder that is no device
    if not is_encrypted(home):
        encrypting.encrypt(home, new_protection(home, keyring=keyring, file=new_file))
        with Device.open(home) as device:
            device.refresh_index()
        typer.echo(f"{home} is encrypted.")
        typer.echo(
            "The files in the clear were overwritten and removed. What drives that spread wear, snapshots and backups still "
            "have of them is not encrypted."
        )
        _say_how(home)
        return
    from stillroom_shared.errors import EncryptionError

    raise EncryptionError(f"{home} is encrypted already; `stillroom index passphrase` changes how it is unlocked")


def decrypt(home: Home) -> None:
    """Lay what an encrypted device holds open on the disk again."""
    from stillroom_client import encrypting
    from stillroom_client.device import Device

    Device.name_of(home)
    encrypting.decrypt(home)
    with Device.open(home) as device:
        device.refresh_index()
    typer.echo(f"{home} is not encrypted any more")


def passphrase(
    home: Home,
    keyring: Annotated[
        bool | None,
        typer.Option("--keyring/--no-keyring", help="Instead: add the system keyring as a way in, or take it away."),
    ] = None,
    new_file: NewFile = None,
) -> None:
    """Change the passphrase of an encrypted device, or add one; nothing else is written anew."""
    from stillroom_client import system_keyring
    from stillroom_client.key_file import KeyFile
    from stillroom_client.unlocking import SEALED_NAME, data_key, is_encrypted
    from stillroom_shared.errors import EncryptionError
    from stillroom_shared.files import exclusive

    if not is_encrypted(home):
        raise EncryptionError(f"{home} is not encrypted: `stillroom index encrypt` does it")
    key, folder = data_key(home), home / SEALED_NAME
    words = _new_passphrase(home, new_file) if keyring is None else ""
    with exclusive(home):
        file = KeyFile.load(folder)
        if keyring is None:
            file.with_passphrase(key, words).save(folder)
        elif keyring and not file.has("keyring"):
            file.with_keyring(key).save(folder)
        elif not keyring:
            if not file.has("passphrase"):
                raise EncryptionError(f"the keyring is the only way into {home}: set a passphrase first")
            file.without_keyring().save(folder)
            system_keyring.forget(file.id)
    _say_how(home)


def new_protection(home: Path, *, keyring: bool, file: Path | None) -> Protection:
    """What the owner chose for a home that is to be encrypted; asks twice for a passphrase where he chose one."""
    from stillroom_client.encrypting import Protection
    from stillroom_client.unlocking import passphrase_file

    file = file or passphrase_file()
    return Protection(None if keyring and file is None else _new_passphrase(home, file), keyring)


def ways_in(home: Path) -> str:
    """How a home is unlocked, for whoever looks at its status."""
    from stillroom_client.key_file import KeyFile
    from stillroom_client.unlocking import SEALED_NAME, is_encrypted

    if not is_encrypted(home):
        return "none"
    return " or ".join(sorted(way.kind for way in KeyFile.load(home / SEALED_NAME).ways))


def _say_how(home: Path) -> None:
    ways = ways_in(home)
    typer.echo(f"It is unlocked by {ways}. Whoever loses {'it' if ' or ' not in ways else 'both'} loses the documents.")
    if "passphrase" not in ways:
        typer.echo(f"A passphrase is a second way in: stillroom index passphrase --home {home}")


def _new_passphrase(home: Path, file: Path | None) -> str:
    from getpass import getpass

    from stillroom_client.unlocking import read_passphrase
    from stillroom_shared.errors import EncryptionError

    if file is not None:
        return read_passphrase(file)
    if not sys.stdin.isatty():
        raise EncryptionError(
            f"there is no terminal to ask for a new passphrase of {home}: name a file with --new-passphrase-file, or take the "
            "system keyring (--keyring)"
        )
    words = getpass(f"New passphrase of {home}: ")
    if getpass("Once more: ") != words:
        raise EncryptionError("the two differ: nothing was changed")
    return words


def _use(context: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    if value is not None:
        from stillroom_client.unlocking import PASSPHRASE_FILE

        token = PASSPHRASE_FILE.set(value)
        context.call_on_close(lambda: PASSPHRASE_FILE.reset(token))
