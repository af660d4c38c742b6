"""A classification task out of Python's own documentation: what does this docstring belong to?

A text is a function's or class's signature with its docstring, its label the top-level package or
module that it is from. All labels are as frequent, in training and in what is scored, and the two
share neither a file nor a docstring.
"""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np

from common.data.corpus import CorpusConfig, open_corpus
from common.data.sources import HealthyDocuments
from common.errors import UserError
from common.launch.workdir import write_atomically

HEADER = re.compile(r"Help on module (\w+)")
SIGNATURE = re.compile(r"class \w+(?:\(.*\))?|\w+\(.*\)")
SHORTEST = 24  # Characters of a docstring.

Described = dict[str, list[str]]


def described(corpus: CorpusConfig, without: frozenset[str] = frozenset()) -> Described:
    """Texts of the documentation by package, in the order of the corpus.

    A docstring counts once, for the package that has it first, and not at all if it is in
    `without`.
    """
    source = open_corpus(dataclasses.replace(corpus, parts=("documentation",), max_documents=None))
    found: Described = {}
    seen = set(without)
    for document in HealthyDocuments(source, corpus.error_budget):
        header = HEADER.match(document)
        for block in document.split("\n\n") if header else []:
            signature, _, body = block.strip().partition("\n")
            body = " ".join(body.split())
            if SIGNATURE.fullmatch(signature) and len(body) >= SHORTEST and body not in seen:
                seen.add(body)
                found.setdefault(header[1], []).append(f"{signature}\n{body}")  # type: ignore[index]
    return found


def write_labelled(
    folder: Path, corpus: CorpusConfig, classes: int, texts: int, dev_texts: int, seed: int
) -> tuple[Path, Path]:
    """Writes JSONL to fine-tune on and to score, for `fine_tuning.fine_tune`.

    Args:
      folder: for both files; what is there is not written again.
      corpus: "train" and "heldout" of it are used.
      classes: the packages that have most in the smaller of the two.
      texts, dev_texts: most texts of the files.
      seed: of the choice and the order.

    Raises:
      UserError: fewer packages than `classes` are in both parts.
    """
    paths = folder / "train.jsonl", folder / "dev.jsonl"
    if all(path.exists() for path in paths):
        return paths
    train = described(dataclasses.replace(corpus, split="train"))
    bodies = frozenset(text.partition("\n")[2] for part in train.values() for text in part)
    dev = described(dataclasses.replace(corpus, split="heldout"), bodies)
    both = [name for name in train if name in dev]
    labels = sorted(both, key=lambda name: -min(len(train[name]), len(dev[name])))[:classes]
    if len(labels) < max(2, classes):
        raise UserError(
            f"only {len(labels)} packages are in both parts of the python corpus: raise "
            "heldout_fraction, or lower objectives.classes"
        )
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for path, part, most in zip(paths, (train, dev), (texts, dev_texts)):
        each = min(most // classes, *(len(part[label]) for label in labels))
        chosen = [
            {"text": part[label][n], "label": label}
            for label in labels
            for n in rng.permutation(len(part[label]))[:each]
        ]
        lines = [json.dumps(chosen[n]) + "\n" for n in rng.permutation(len(chosen))]
        write_atomically(path, "".join(lines))
    return paths
