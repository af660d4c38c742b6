"""The corpus that comes with Python: its standard library's sources and documentation.

Some 12 MB of code and 2 MB of technical English lie on every machine that can run this workspace,
so that a first training run needs no download.
"""

import ast
import inspect
import os
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.data.sources import DocumentSource, digest, key_of
from common.errors import UserError, nearest

PARTS = ("documentation", "source", "tests")
_FOREIGN = {"site-packages", "dist-packages", "__pycache__"}
_TESTS = {"test", "tests", "idle_test"}
# Tables written by programs, and the topics that are documents of their own.
_NOT_PROSE = {"encodings", "pydoc_data"}


@dataclass(frozen=True)
class _Entry:
    kind: str  # "topic", "docstrings" or "source"
    name: str  # the topic, or the file's path below the library
    size: int = 0
    modified: int = 0


class PythonCorpus(DocumentSource):
    """The running interpreter's own library, in an order that no file system decides.

    Args:
        parts: Which documents: "documentation" (the help topics, and per module its docstrings),
            "source" (files as they are), "tests" (the library's own tests, if installed).
        root: Where the library is; None asks the interpreter.
    """

    def __init__(
        self, parts: tuple[str, ...] = ("documentation", "source"), root: str | None = None
    ):
        for part in parts:
            if part not in PARTS:
                raise UserError(f"no part '{part}' in the Python corpus{nearest(part, PARTS)}")
        self._root = Path(root or sysconfig.get_paths()["stdlib"])
        files = sorted(_python_files(self._root), key=lambda entry: entry.name)
        tests = [entry for entry in files if _is_test(entry.name)]
        library = [entry for entry in files if not _is_test(entry.name)]
        self._topics = _topics() if "documentation" in parts else {}
        self._entries: list[_Entry] = [_Entry("topic", name) for name in sorted(self._topics)]
        if "documentation" in parts:
            self._entries += [_as_docstrings(entry) for entry in library]
        if "source" in parts:
            self._entries += library
        if "tests" in parts:
            self._entries += tests

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> str:
        entry = self._entries[index]
        if entry.kind == "topic":
            return self._topics[entry.name]
        try:
            text = (self._root / entry.name).read_bytes().decode()
            return text if entry.kind == "source" else docstrings(text, entry.name)
        except OSError as error:
            raise self.damaged(index, error.strerror) from error
        # What the parser may say of a file that is no Python; UnicodeDecodeError is a ValueError.
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise self.damaged(index, error) from error

    def describe(self, index: int) -> str:
        entry = self._entries[index]
        if entry.kind == "topic":
            return f"help topic {entry.name!r}"
        return f"{str(self._root / entry.name)!r} ({entry.kind})"

    def keys(self) -> np.ndarray:
        # A module's docstrings and its source share a key, so that they share a side of the split.
        names = [
            f"topic:{entry.name}" if entry.kind == "topic" else f"file:{entry.name}"
            for entry in self._entries
        ]
        return np.array([key_of(name) for name in names], np.uint64)

    def fingerprint(self) -> str:
        parts = ["python"]
        for entry in self._entries:
            parts += [entry.kind, entry.name, str(entry.size), str(entry.modified)]
        return digest(*parts, *(self._topics[name] for name in sorted(self._topics)))


def docstrings(source: str, name: str) -> str:
    """Renders the public docstrings of a module under their signatures, as `help` would.

    Returns:
        The text, or "" for a module without docstrings.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Old sources hold escapes that the parser warns about.
        tree = ast.parse(source)
    sections = list(_sections(tree, ""))
    if not sections:
        return ""
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return "\n\n".join([f"Help on module {module}", *sections]) + "\n"


def _sections(node: ast.AST, indent: str) -> Iterator[str]:
    """Yields one block of text per documented definition, depth first in source order."""
    definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, (ast.Module, *definitions)) and (text := ast.get_docstring(node)):
        heading = "" if isinstance(node, ast.Module) else f"{indent}{_signature(node)}\n"
        body = inspect.cleandoc(text)
        inner = indent if isinstance(node, ast.Module) else f"{indent}    "
        yield heading + "\n".join(f"{inner}{line}".rstrip() for line in body.split("\n"))
    if isinstance(node, ast.Module | ast.ClassDef):
        deeper = indent if isinstance(node, ast.Module) else f"{indent}    "
        for child in node.body:
            if isinstance(child, definitions) and not child.name.startswith("_"):
                yield from _sections(child, deeper)


def _signature(node: ast.AST) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return f"{node.name}({ast.unparse(node.args)})"


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # Some distributions leave the help topics out.
        return {}
    return {name: text.strip("\n") + "\n" for name, text in topics.items()}


def _python_files(root: Path) -> Iterator[_Entry]:
    for folder, folders, names in os.walk(root):
        # Folders that are no packages hold build settings of this machine.
        folders[:] = [name for name in folders if name.isidentifier() and name not in _FOREIGN]
        if Path(folder) == root:
            folders[:] = [name for name in folders if name not in _NOT_PROSE]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                status = path.stat()
                if status.st_size:
                    relative = path.relative_to(root).as_posix()
                    yield _Entry("source", relative, status.st_size, status.st_mtime_ns)


def _is_test(name: str) -> bool:
    return not _TESTS.isdisjoint(name.split("/"))


def _as_docstrings(entry: _Entry) -> _Entry:
    return _Entry("docstrings", entry.name, entry.size, entry.modified)
