"""One configuration for every kind of text corpus, and the function that opens it."""

from dataclasses import dataclass

from common.data.file_sources import JsonLines, TextFiles, find_files
from common.data.python_corpus import PythonCorpus
from common.data.record_sources import ArrayRecords, ParquetRows, PreparedTfds, tfds_folder
from common.data.sources import DocumentSource, refuse_empty, select
from common.errors import UserError, nearest

KINDS = ("python", "text", "jsonl", "array_record", "tfds", "parquet")


@dataclass(frozen=True)
class CorpusConfig:
    """Where documents come from and which of them to take.

    Attributes:
        kind: "python" (the interpreter's own library), "text", "jsonl", "array_record", "tfds"
            or "parquet".
        path: A file, a folder or a glob pattern; for tfds the folder of the prepared version.
            Not used by "python".
        field: The JSON field, tfds feature or Parquet column with the text. For array_record ""
            means that the record itself is the text.
        unit: For "text": one document per "file", "line" or "paragraph".
        parts: For "python": any of "documentation", "source", "tests".
        subset: For "tfds": which of the prepared splits to read.
        split: "train", "heldout" or "all" of what was found; the first two are disjoint.
        heldout_fraction: Share of the documents that "heldout" gets and "train" does not.
        max_documents: Takes at most this many documents, spread over the corpus.
        error_budget: How many records may be damaged and skipped: below 1 a fraction of them,
            from 1 on a number.
    """

    kind: str = "python"
    path: str | None = None
    field: str = "text"
    unit: str = "file"
    parts: tuple[str, ...] = ("documentation", "source")
    subset: str = "train"
    split: str = "train"
    heldout_fraction: float = 0.05
    max_documents: int | None = None
    error_budget: float = 0.01


def open_corpus(config: CorpusConfig) -> DocumentSource:
    """Opens the corpus that `config` describes.

    Raises:
        UserError: It is missing, unreadable, of another kind, or has no documents in this split.
    """
    source = refuse_empty(_open_kind(config), _name(config))
    chosen = select(source, config.split, config.heldout_fraction, config.max_documents)
    hint = f" in split '{config.split}' ({len(source)} in all); change heldout_fraction"
    return refuse_empty(chosen, _name(config), hint)


def _open_kind(config: CorpusConfig) -> DocumentSource:
    if config.kind == "python":
        return PythonCorpus(config.parts)
    if config.kind == "text":
        return TextFiles(find_files(config.path, "*"), config.unit)
    if config.kind == "jsonl":
        return JsonLines(find_files(config.path, "*.jsonl"), config.field)
    if config.kind == "array_record":
        return ArrayRecords(find_files(config.path, "*.array_record*"), config.field)
    if config.kind == "tfds":
        return PreparedTfds(tfds_folder(config.path), config.field, config.subset)
    if config.kind == "parquet":
        return ParquetRows(find_files(config.path, "*.parquet"), config.field)
    raise UserError(f"no corpus kind '{config.kind}'{nearest(config.kind, KINDS)}")


def _name(config: CorpusConfig) -> str:
    return f"the {config.kind} corpus" + (f" '{config.path}'" if config.path else "")
