"""Which package may import which: walks every import, lazy ones inside functions included."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the bottom up. A module imports its own package and packages of lower rows only.
LAYERS = (
    ("common.errors",),
    ("common.kernels", "common.sharding", "common.values"),
    ("common.nn",),
    ("common.checkpoint",),
    ("common.data",),
    ("common.models",),
    ("common.generate", "common.train"),
    ("common.launch",),
    ("PAPERS",),
    ("common.convert", "common.doctor", "common.plan"),
)
# Against the order of the rows.
FORBIDDEN = {("common.data", "common.nn"), ("common.checkpoint", "common.nn")}

NEVER = {"tensorflow", "ml_collections", "haiku"}
REFERENCES = {"torch", "transformers"}  # Only to compare with.
REFERENCE_FOLDERS = ("tests/parity", "benchmarks")
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "misc", "lib"}
MOST_LINES = 600


def python_files() -> list[Path]:
    folders = ["common", "tests", "benchmarks", "scripts", *papers()]
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def papers() -> list[str]:
    others = {"common", "tests", "benchmarks"}
    packages = (path.parent.name for path in ROOT.glob("*/__init__.py"))
    return sorted(name for name in packages if name not in others)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in python_files()}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yields `(module, line)` of every import; `from a import b` is `a.b` if that is a module."""
    name = module_name(path)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                below = f"{origin}.{alias.name}"
                yield (below if below in MODULES else origin), node.lineno


def layer(module: str) -> tuple[int, str] | None:
    """Returns the row of LAYERS that a module stands in, and the package it belongs to."""
    top = module.split(".")[0]
    if top in papers():
        return next(i for i, row in enumerate(LAYERS) if "PAPERS" in row), top
    package = ".".join(module.split(".")[:2])
    row = next((i for i, row in enumerate(LAYERS) if package in row), None)
    return None if row is None else (row, package)


def backward_arrow(importer: str, imported: str) -> bool:
    """Tells whether the order of layers forbids that `importer` imports `imported`."""
    source, target = layer(importer), layer(imported)
    if source is None or target is None or source[1] == target[1]:
        return False
    pair = (source[1], target[1])
    return pair in FORBIDDEN or target[0] >= source[0]


def shown(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_imports_point_down():
    arrows = [
        f"{shown(path, line)}: {name} imports {imported}"
        for name, path in MODULES.items()
        for imported, line in imports(path)
        if backward_arrow(name, imported)
    ]
    assert not arrows, "\n".join(arrows)


def test_every_module_has_a_layer():
    shared = [name for name in MODULES if name.startswith("common.")]
    assert [name for name in shared if layer(name) is None] == []


def test_no_cycles():
    graph = {
        name: {
            imported for imported, _ in imports(path) if imported in MODULES and imported != name
        }
        for name, path in MODULES.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"imports go in a circle: {' → '.join(error.args[1])}")


def test_no_foreign_frameworks():
    found = [
        f"{shown(path, line)}: {imported}"
        for path in MODULES.values()
        for imported, line in imports(path)
        if imported.split(".")[0] in NEVER
        or (
            imported.split(".")[0] in REFERENCES
            and not path.relative_to(ROOT).as_posix().startswith(REFERENCE_FOLDERS)
        )
    ]
    assert not found, "\n".join(found)


def test_files_are_short_and_named_for_what_they_hold():
    long = [
        f"{path.relative_to(ROOT)}: {lines} lines"
        for path in MODULES.values()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    ]
    vague = [name for name in MODULES if VAGUE_NAMES & set(name.replace("_", ".").split("."))]
    assert not long, long
    assert not vague, vague


@pytest.mark.parametrize(
    ("importer", "imported", "forbidden"),
    [
        ("common.nn.mlp", "common.kernels", False),
        ("common.kernels.attention", "common.nn", True),
        ("common.sharding.mesh", "common.kernels", True),
        ("common.data.text", "common.nn.norms", True),
        ("common.train.trainer", "common.checkpoint.store", False),
        ("common.models.decoder_checkpoint", "common.checkpoint", False),
        ("common.checkpoint.store", "common.models", True),
        ("common.checkpoint.keymap", "common.nn.param", True),
        ("common.checkpoint.store", "common.train.state", True),
        ("common.launch.app", "recurrentgemma", True),
        ("recurrentgemma.train", "common.launch", False),
        ("recurrentgemma.train", "common.doctor", True),
    ],
)
def test_the_rule_itself(importer, imported, forbidden):
    assert backward_arrow(importer, imported) is forbidden


def test_papers_do_not_import_each_other(monkeypatch):
    monkeypatch.setitem(globals(), "papers", lambda: ["aim", "dino"])
    assert backward_arrow("aim.train", "dino.model")
    assert not backward_arrow("dino.raydino.train", "dino.model")


def test_imports_are_read_in_functions_and_relative(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "common" / "nn" / "mlp.py"
    path.parent.mkdir(parents=True)
    path.write_text("def f():\n    import torch\n\nfrom . import norms\nfrom ..errors import E\n")
    assert sorted(imports(path)) == [("common.errors", 5), ("common.nn.norms", 4), ("torch", 2)]
