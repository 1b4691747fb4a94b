"""Small real documents for tests: PDF, DOCX and e-mail, made here byte by byte or by the library that also reads them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from email.message import EmailMessage

import docx
from docx.oxml import parse_xml


def pdf(
    pages: Sequence[str], *, title: str = "", bookmarks: Sequence[tuple[str, int]] = (), encrypt: bool = False
) -> bytes:
    """A PDF of one font; `bookmarks` are (heading, page from 0); `encrypt` names a password that nobody knows."""
    bodies: list[bytes] = [b"", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for text in pages:
        shown = b" ".join(b"(" + line.encode("latin-1") + b") Tj T*" for line in text.split("\n"))
        stream = b"BT /F1 12 Tf 72 720 Td 14 TL " + shown + b" ET"
        bodies.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
        bodies.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R >> >> "
            b"/Contents %d 0 R >>" % len(bodies)
        )
        kids.append(len(bodies))
    bodies[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(b"%d 0 R" % kid for kid in kids), len(kids))
    outline = b""
    if bookmarks:
        first = len(bodies) + 2
        outline = b" /Outlines %d 0 R" % (first - 1)
        last = first + len(bookmarks) - 1
        bodies.append(b"<< /Type /Outlines /First %d 0 R /Last %d 0 R /Count %d >>" % (first, last, len(bookmarks)))
        for number, (heading, page) in enumerate(bookmarks, start=first):
            after = b" /Next %d 0 R" % (number + 1) if number < last else b""
            bodies.append(
                b"<< /Title (%s) /Parent %d 0 R /Dest [%d 0 R /Fit]%s >>"
                % (heading.encode(), first - 1, kids[page], after)
            )
    bodies[0] = b"<< /Type /Catalog /Pages 2 0 R%s >>" % outline
    bodies.append(b"<< /Title (%s) /Author (Ann Author) /CreationDate (D:20190203101500Z) >>" % title.encode())
    extra = b" /Info %d 0 R" % len(bodies)
    if encrypt:
        junk = b"<" + b"5a" * 32 + b">"
        bodies.append(b"<< /Filter /Standard /V 1 /R 2 /O %s /U %s /P -44 >>" % (junk, junk))
        extra += b" /Encrypt %d 0 R /ID [<00><00>]" % len(bodies)
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(bodies, start=1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(bodies) + 1
    trailer = b"trailer << /Size %d /Root 1 0 R%s >>\nstartxref\n%d\n%%%%EOF\n" % (size, extra, len(out))
    return out + b"xref\n0 %d\n0000000000 65535 f \n" % size + table + trailer


def word() -> bytes:
    """A DOCX with headings of two levels, a list, a table, an insertion, a deletion and a content control."""
    made = docx.Document()
    made.core_properties.title, made.core_properties.author = "Report", "Ann Author"
    made.add_heading("Fruit", 1)
    tracked = made.add_paragraph("Pears are sweet")
    for tag, inner, text in (("ins", "t", " and round"), ("del", "delText", " and blue")):
        namespace = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
        run = f"<w:r><w:{inner} xml:space='preserve'>{text}</w:{inner}></w:r>"
        tracked._p.append(parse_xml(f"<w:{tag} {namespace}>{run}</w:{tag}>"))
    made.add_paragraph("apples", style="List Bullet")
    made.add_paragraph("plums", style="List Bullet")
    table = made.add_table(rows=2, cols=2)
    for number, text in enumerate(("kind", "price", "plum", "3 euro")):
        table.cell(number // 2, number % 2).text = text
    made.add_heading("Storage", 2)
    control = (
        f"<w:sdt {namespace}><w:sdtContent><w:p><w:r><w:t>Keep them cool.</w:t></w:r></w:p></w:sdtContent></w:sdt>"
    )
    made.element.body.insert(-1, parse_xml(control))
    written = io.BytesIO()
    made.save(written)
    return written.getvalue()


def mail(*, html: bool = False, attachments: Sequence[tuple[str, bytes]] = ()) -> bytes:
    """A message of Ann to Bob about a café, of 3 February 2020."""
    message = EmailMessage()
    message["From"], message["To"] = "Ann Author <ann@example.org>", "bob@example.org"
    message["Subject"], message["Date"] = "The café", "Mon, 03 Feb 2020 10:00:00 +0100"
    message.set_content("We meet at the café.\n\nBring the plans.\n", cte="quoted-printable", charset="iso-8859-1")
    if html:
        message.add_alternative("<p>We meet at the <b>caf&eacute;</b>.</p>", subtype="html")
    for name, content in attachments:
        message.add_attachment(content, maintype="application", subtype="octet-stream", filename=name)
    return message.as_bytes()
