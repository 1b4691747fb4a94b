"""From bytes to text, whatever the encoding; line breaks become `\\n`."""

from __future__ import annotations

import codecs
import re

from stillroom_client.readers.blocks import UnreadableError

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SAMPLE = 1 << 16
_DECLARED = re.compile(
    rb"""(?:<meta[^>]+charset=["']?|<\?xml[^>]+encoding=["']|coding[:=][ \t]*)([\w.:-]{2,30})""", re.I
)
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
BINARY = "is binary, not text: skipped"


def decoded(content: bytes) -> tuple[str, str]:
    """The text, and the encoding's name if it is neither UTF-8 nor ASCII, else "".

    Raises:
        UnreadableError: it is binary.
    """
    encoding = _encoding(content)
    text = content.decode(encoding, "replace").replace("\r\n", "\n").replace("\r", "\n")
    return text, "" if encoding in ("utf-8", "utf-8-sig") else encoding


def _encoding(content: bytes) -> str:
    for mark, name in _MARKS:
        if content.startswith(mark):
            return name
    sample = content[:_SAMPLE]
    if wide := _unmarked_utf16(sample):
        return wide
    if b"\0" in content or len(_CONTROL.findall(sample)) > len(sample) // 50:
        raise UnreadableError(BINARY)
    try:
        content.decode()
        return "utf-8"
    except UnicodeDecodeError:
        pass
    if declared := _DECLARED.search(content[:2048]):
        name = declared[1].decode()
        try:
            content.decode(name)
            return codecs.lookup(name).name
        except (LookupError, UnicodeDecodeError):
            pass
    return _guessed(content)


def _unmarked_utf16(sample: bytes) -> str:
    """UTF-16 without a mark: in most scripts' text every second byte of many is zero, and of the others none."""
    even, odd = sample[0::2].count(0), sample[1::2].count(0)
    half = max(len(sample) // 2, 1)
    if even + odd == 0 or min(even, odd) > half // 100 or max(even, odd) < half // 4 + 1:
        return ""
    return "utf-16-le" if odd > even else "utf-16-be"


def _guessed(content: bytes) -> str:
    from charset_normalizer import from_bytes

    # Around the first byte that is not ASCII: a sample of the start alone may be pure ASCII.
    first = next((found.start() for found in re.finditer(rb"[\x80-\xff]", content)), 0)
    sample = content[max(first - _SAMPLE // 2, 0) : first + _SAMPLE // 2]
    best = from_bytes(sample).best()
    # Several code pages may say the same; then the common one is meant.
    if best is None or best.encoding == "utf_8" or str(best) == sample.decode("cp1252", "replace"):
        return "cp1252"
    return best.encoding
