"""From a model of any kind to the folder that is shipped, served or measured: the saved model with its ONNX files.

`export_model` takes the student of a recipe, `export_named` any model by its name, a teacher say, so that one runtime measures
both (`stillroom evaluate MODEL@int8`).

| model | float32 | compressed |
|---|---|---|
| tower, static table, late interaction | `students/export.py`: states that a device pools | as the recipe says |
| reranker | `stillroom_server.rerankers`: a logit for each pair | int8, as in releases |

Files lie where Sentence Transformers looks for them (`ONNX_FILES`), so its ONNX backend loads the folder too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, cast

from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer

from stillroom_server.distillery.compress.quantize import CompressSettings, compress
from stillroom_server.distillery.data.documentation import sections
from stillroom_server.distillery.students.export import export_student
from stillroom_server.distillery.teachers.loading import load_model
from stillroom_server.distillery.teachers.opening import model_type
from stillroom_server.distillery.training.train import Student
from stillroom_server.docstrings import STANDARD_LIBRARY
from stillroom_server.rerankers import write_reranker
from stillroom_server.teacher import folder_of
from stillroom_shared.release import ONNX_FILES
from stillroom_shared.sealed import new_folder

FACTS = "distillation.json"
"""What a model of a recipe says of itself, in its folder: recipe, sources, teachers, sizes."""
DOCUMENTS = "documents"
"""The document tower's folder below that of a model, where the model does not lie in its teacher's own space."""
_PROBES = 256
"""Texts that the compressed file is compared with its source on."""
_PASSAGES = 32
"""The same for a model by name; they are longer."""


def export_model(student: Student, folder: Path, settings: CompressSettings, texts: Sequence[str]) -> dict[str, Any]:
    """Save a student with its ONNX files; returns their sizes and how far the compressed one is from the model.

    Args:
        texts: public texts; some compare the files, the others calibrate where that is asked for.

    Raises:
        ReleaseError: a file computes something else than the model.
        DataError: there are too few texts.
    """
    student.save_pretrained(str(folder), create_model_card=False)
    if isinstance(student, CrossEncoder):
        return asdict(write_reranker(student, folder, tokens=int(student.max_seq_length or 256)))
    source, target = folder / ONNX_FILES["float32"], folder / ONNX_FILES["int8"]
    source.parent.mkdir(parents=True, exist_ok=True)
    export_student(cast(SentenceTransformer | MultiVectorEncoder, student), source)
    probes, calibration = texts[:_PROBES], texts[_PROBES:]
    done = compress(source, target, settings, tokenizer=_tokenizer(student), calibration=calibration, probes=probes)
    return asdict(done)


def export_named(name: str, folder: Path, settings: CompressSettings | None = None) -> dict[str, Any]:
    """Write a model into a new folder with its ONNX files: "offline", a folder or a name; a bi-encoder, cross-encoder or other.

    The compressed file is compared on documentation of the standard library.

    Raises:
        SettingsError: there is no such model, or its tower is no BERT.
        ReleaseError: the folder exists, or a file cannot hold the model: pooling that is not the mean, several outputs.
    """
    kinds: dict[str, Callable[..., Student]] = {
        "CrossEncoder": CrossEncoder,
        "MultiVectorEncoder": MultiVectorEncoder,
    }
    model = load_model(kinds.get(model_type(folder_of(name)), SentenceTransformer), name, device="cpu")
    with new_folder(folder) as partial:
        return export_model(
            model, partial, settings or CompressSettings(), list(islice(sections([STANDARD_LIBRARY]), _PASSAGES))
        )


def _tokenizer(student: Student) -> Tokenizer:
    """As a device uses it: cut to the tokens that the student reads, without padding."""
    plain = Tokenizer.from_str(_backend(student).to_str())
    plain.no_padding()
    if not isinstance(student[0], StaticEmbedding):  # whose limit stands in its tokenizer
        plain.enable_truncation(int(student.max_seq_length or 32))
    return plain


def _backend(student: Student) -> Tokenizer:
    found = student.tokenizer
    return found if isinstance(found, Tokenizer) else found.backend_tokenizer
