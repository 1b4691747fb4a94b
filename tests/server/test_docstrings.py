"""The docstring corpus, on small made-up packages: the same every time, no twin across sides, never imported."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest

from stillroom_server.docstrings import FULL, SMALL, DocstringSource, docstring_corpus
from stillroom_shared.corpus import Corpus, normalize, split_of
from stillroom_shared.errors import DataError

BODY = "The tapir walks through the forest at night and eats the leaves of {} before the morning comes."
SOURCE = DocstringSource(name="zoo", public=("tapir_public",), private=("tapir_alpha", "tapir_beta"))


def document(summary: str, topic: str) -> str:
    return f'"""{summary}\n\n{BODY.format(topic)}\n"""'


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three importable packages that repeat each other in part; importing any of them raises."""
    files = {
        "tapir_public/__init__.py": f"{document('Feed the tapirs at night', 'palms')}\nraise SystemExit('imported')\n",
        "tapir_public/rivers.py": f"def swim():\n    {document('Swim across a wide river', 'reeds')}\n",
        "tapir_alpha/__init__.py": f"{document('Alpha walks in the forest', 'ferns')}\nraise SystemExit('imported')\n",
        "tapir_alpha/deep/nested.py": (
            f"class Herd:\n    {document('Count all animals of a herd', 'figs')}\n"
            f"    async def call(self):\n        {document('Call the herd together again', 'limes')}\n"
        ),
        # Repeats, in other case and spacing, a public query; and, word for word, a public passage.
        "tapir_alpha/copies.py": (
            f"def one():\n    {document('SWIM  across a Wide river', 'plums')}\n"
            f"def two():\n    {document('Another summary of that passage', 'reeds')}\n"
        ),
        "tapir_beta/__init__.py": f"def count():\n    {document('Count all animals of a herd', 'nuts')}\n",
        "tapir_beta/kept.py": f"def rest():\n    {document('Rest in the shade at noon', 'mangoes')}\n",
        "tapir_beta/tests/test_rest.py": f"def rest():\n    {document('Only a test of resting', 'berries')}\n",
        "tapir_beta/template.py": "def {{ name }}():\n    pass\n",
        "tapir_beta/short.py": 'def a():\n    """Too short.\n\n    Not twelve words."""\n',
        "tapir_beta/one_line.py": 'def a():\n    """A summary line without any body below."""\n',
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "tapir_beta" / "latin.py").write_bytes(b'"""Caf\xe9 opens at nine\n\nin another encoding"""\n')
    (tmp_path / "tapir_single.py").write_text(document("A module is no package here", "moss"))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_content(packages: Path) -> None:
    """A lost method, a summary left in the body or a wrong owner changes what is learnt and what is searched."""
    corpus = docstring_corpus(SOURCE, workers=1)
    found = [(p.owner, p.id.rpartition("#")[0], q.text) for p, q in zip(corpus.passages, corpus.queries, strict=True)]
    assert found == [
        ("tapir_public", "tapir_public.__init__", "Feed the tapirs at night"),
        ("tapir_public", "tapir_public.rivers.swim", "Swim across a wide river"),
        ("tapir_alpha", "tapir_alpha.__init__", "Alpha walks in the forest"),
        ("tapir_alpha", "tapir_alpha.deep.nested.Herd", "Count all animals of a herd"),
        ("tapir_alpha", "tapir_alpha.deep.nested.Herd.call", "Call the herd together again"),
        ("tapir_beta", "tapir_beta.kept.rest", "Rest in the shade at noon"),
    ]
    assert [p.text for p in corpus.passages][:2] == [BODY.format("palms"), BODY.format("reeds")]
    for passage, query in zip(corpus.passages, corpus.queries, strict=True):
        assert (query.owner, query.id) == (passage.owner, f"q:{passage.id}")
        assert corpus.qrels[query.id] == {passage.id: 1}


def test_packages_are_parsed_and_never_imported(packages: Path) -> None:
    """Importing a package to read its words would run its code, and change this process."""
    docstring_corpus(SOURCE, workers=1)
    assert not [name for name in sys.modules if name.startswith("tapir")]


def test_no_private_text_has_a_public_twin(packages: Path) -> None:
    """A private test query whose twin was in the public text would have been distilled on."""
    corpus = docstring_corpus(SOURCE, workers=1)
    public, private = corpus.restrict("tapir_public".__eq__), corpus.restrict("tapir_public".__ne__)
    texts = [
        [normalize(p.text) for p in side.passages] + [normalize(q.text) for q in side.queries]
        for side in (public, private)
    ]
    assert texts[0] and texts[1] and not set(texts[0]) & set(texts[1])
    assert all(len(side) == len(set(side)) for side in texts)
    # Guard: with the owner order turned round, the other side keeps the shared texts, so there were some to drop.
    turned = DocstringSource(name="zoo", public=("tapir_alpha", "tapir_beta"), private=("tapir_public",))
    kept = {q.text for q in docstring_corpus(turned, workers=1).queries}
    assert "SWIM across a Wide river" in kept and "Swim across a wide river" not in kept


def test_same_corpus_every_time(packages: Path) -> None:
    """Were the order to depend on the number of workers or on the file system, so would duplicates, and the hash."""
    one, two = (docstring_corpus(SOURCE, workers=workers) for workers in (1, 2))
    assert one == two and one.content_hash == two.content_hash
    (packages / "tapir_beta" / "kept.py").write_text("# gone\n")
    assert docstring_corpus(SOURCE, workers=1).content_hash != one.content_hash


def test_splits_do_not_depend_on_the_rest_of_the_corpus(packages: Path) -> None:
    """If an added package moved queries between splits, tuning on dev would have seen another run's test queries."""

    def splits(corpus: Corpus) -> dict[str, str]:
        return {query.text: query.split for query in corpus.queries}

    all_of_it = splits(docstring_corpus(SOURCE, workers=1))
    part = splits(docstring_corpus(DocstringSource(name="part", public=("tapir_beta",), private=()), workers=1))
    shared = part.keys() & all_of_it.keys()
    assert {text: part[text] for text in shared} == {text: all_of_it[text] for text in shared} and len(shared) == 2
    assert all(split == split_of(text) for text, split in all_of_it.items())


def test_ids_are_unique_where_a_name_is_defined_twice(packages: Path) -> None:
    """Of two passages with one id, one is lost, and the other is judged relevant to both queries."""
    first, second = document("Open the first big door", "elms"), document("Open the second big door", "oaks")
    (packages / "tapir_beta" / "doors.py").write_text(f"def door():\n    {first}\ndef door():\n    {second}\n")
    corpus = docstring_corpus(SOURCE, workers=1)
    doors = [p.id for p in corpus.passages if p.id.startswith("tapir_beta.doors.door#")]
    assert len(doors) == len(set(doors)) == 2


def test_half_a_surrogate_pair_is_no_text(packages: Path) -> None:
    """An escape in somebody's docstring that UTF-8 cannot hold must not stop the corpus of everybody."""
    strange = '"""Decode a \\ud83d character well\n\n' + BODY.format("\\ud800") + '\n"""'
    (packages / "tapir_beta" / "strange.py").write_text(f"def decode():\n    {strange}\n")
    corpus = docstring_corpus(SOURCE, workers=1)
    assert len(corpus.content_hash) == 64 and "tapir_beta" in corpus.owners
    assert not [p.id for p in corpus.passages if "strange" in p.id]


def test_progress_counts_files(packages: Path) -> None:
    """A bar that does not reach its end looks like a crash."""
    seen: list[tuple[int, int]] = []
    docstring_corpus(SOURCE, workers=1, progress=lambda done, total: seen.append((done, total)))
    # Eleven Python files of three packages, without the tests folder.
    assert seen == [(number, 11) for number in range(1, 12)]


def test_missing_package_is_refused_by_name(packages: Path) -> None:
    """A package skipped in silence makes another corpus under the same name."""
    for absent in ("tapir_nowhere", "tapir_single"):
        with pytest.raises(DataError, match=f"package '{absent}' of the docstring corpus is not installed"):
            docstring_corpus(DocstringSource(name="x", public=(absent,), private=()), workers=1)


def test_standard_library_leaves_installed_packages_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Site packages lie below the standard library: taken for public text, they would leak every private package."""
    for folder, topic in (("", "pears"), ("site-packages/tapir_alpha", "plums"), ("dist-packages/tapir_beta", "figs")):
        path = tmp_path / folder / "walk.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document(f"Walk among trees that bear {topic}", topic))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    corpus = docstring_corpus(DocstringSource(name="std", public=("python",), private=()), workers=1)
    assert [q.text for q in corpus.queries] == ["Walk among trees that bear pears"]
    assert corpus.owners == ("python",)


def test_sides_of_the_real_sources_do_not_meet() -> None:
    """An owner on both sides is public and private at once."""
    for source in (FULL, SMALL):
        assert not set(source.public) & set(source.private)
        assert len({*source.public, *source.private}) == len(source.public) + len(source.private)
    assert set(SMALL.private) <= set(FULL.private)
