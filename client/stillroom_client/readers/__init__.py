"""From the bytes of a file to blocks of text that follow its structure: one module for each type.

| type | parser | a block is | title path |
|---|---|---|---|
| text | ours | a paragraph | - |
| markdown | markdown-it-py (CommonMark, tables) | a paragraph, list, table or code block | headings |
| html | `html.parser` | the same | title, then headings |
| pdf | PDFium (pypdfium2) | paragraphs of a page, filled up to a passage | title, then bookmarks |
| docx | python-docx | a paragraph, list or table | title, then headings |
| email | `email` | a paragraph of the body or of an attachment | subject |
| code | `ast` for Python, else lines that declare something | a function, method or class | file, then names |

Why these: markdown-it-py comes with rich. The standard library's HTML parser knows where in the source it is, never recurses,
and is one dependency less than lxml or selectolax. PDFium is fuzzed daily by a browser and, measured on two manuals of 36 and
17 pages, nine times as fast as pypdf with the same text. tree-sitter's language pack fetches grammars from the network when
they are first needed; a line that declares something is found without a grammar.

A reader trusts nothing: it runs in a process of its own (`reading.py`), which may hang, crash or fill its memory.
"""
