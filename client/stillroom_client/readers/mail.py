"""E-mail (RFC 5322, MIME) by the standard library: the body, who wrote it, and what is attached."""

from __future__ import annotations

import dataclasses
import email
import email.policy
from collections.abc import Callable, Iterator
from email.message import EmailMessage, Message

from stillroom_client.documents import Scalar
from stillroom_client.readers import html, plain
from stillroom_client.readers.blocks import Block, Reading, UnreadableError

_HEADERS = {"from": "author", "to": "to", "cc": "cc"}


def read(name: str, content: bytes, attached: Callable[[str, bytes], Reading] | None = None) -> Reading:
    """The blocks of the body and of every attachment that `attached` can read; `subject`, `author`, `to` and `date`."""
    message = email.message_from_bytes(content, policy=email.policy.default)
    if not message.keys():
        raise UnreadableError("is no e-mail (it has no header): skipped")
    subject = _header(message, "subject")
    metadata: dict[str, Scalar] = {"subject": subject} if subject else {}
    metadata |= {name: value for header, name in _HEADERS.items() if (value := _header(message, header))}
    if sent := _sent(message):
        metadata["date"] = sent
    notes: list[str] = []
    blocks = [*_envelope(message, subject), *_body(message, subject), *_attachments(message, subject, attached, notes)]
    return Reading("email", tuple(blocks), subject, metadata, tuple(notes))


def _envelope(message: EmailMessage, subject: str) -> Iterator[Block]:
    """So that a mail is found by who wrote it, and one without a text at all."""
    said = [f"{name.title()}: {value}" for name in ("from", "to", "cc", "date") if (value := _header(message, name))]
    if said:
        yield Block("\n".join(said), (subject,) if subject else (), line=1)


def _body(message: EmailMessage, subject: str) -> Iterator[Block]:
    try:
        body = message.get_body(("plain", "html"))
    except Exception:  # the library trips over some malformed structures
        body = message
    if body is None or body.is_multipart():
        return
    raw = _payload(body)
    reader = html if body.get_content_subtype() == "html" else plain
    for block in reader.read("", raw).blocks:
        headings = tuple(dict.fromkeys(part for part in (subject, *block.headings) if part))
        yield dataclasses.replace(block, headings=headings, line=None)


def _attachments(
    message: EmailMessage, subject: str, attached: Callable[[str, bytes], Reading] | None, notes: list[str]
) -> Iterator[Block]:
    try:
        parts = [part for part in message.iter_attachments() if isinstance(part, EmailMessage)]
    except Exception:
        return
    for part in parts:
        named = part.get_filename() or ""
        inner = part.get_payload()
        if part.get_content_type() == "message/rfc822" and isinstance(inner, list) and isinstance(inner[0], Message):
            named, raw = named or "message.eml", inner[0].as_bytes()
        else:
            raw = _payload(part, text=False)
        if not named or attached is None:
            continue
        try:
            reading = attached(named, raw)
        except UnreadableError as error:
            notes.append(f"attachment {named!r} {error}")
            continue
        notes += [f"attachment {named!r} {note}" for note in reading.notes]
        for block in reading.blocks:
            headings = tuple(dict.fromkeys(part for part in (subject, named, *block.headings) if part))
            yield dataclasses.replace(block, headings=headings, metadata={**block.metadata, "attachment": named})


def _payload(part: Message, *, text: bool = True) -> bytes:
    """The decoded bytes of a part; as UTF-8 if it is text in an encoding that it names truly."""
    raw = part.get_payload(decode=True)
    raw = raw if isinstance(raw, bytes) else b""
    charset = part.get_content_charset()
    if text and charset:
        try:
            return raw.decode(charset).encode()
        except (LookupError, UnicodeError):
            pass  # named falsely: found out by looking
    return raw


def _header(message: EmailMessage, name: str) -> str:
    try:
        return " ".join(str(message.get(name, "")).split())
    except Exception:  # the library raises several kinds of errors for malformed headers
        return ""


def _sent(message: EmailMessage) -> str:
    try:
        return str(message["date"].datetime.date().isoformat())
    except Exception:
        return ""
