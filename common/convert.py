"""Converts checkpoints between foreign formats and the workspace's own, both ways.

python -m common.convert --package=recurrentgemma --from=PATH --to=PATH --format=workspace
"""

import importlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from absl import flags

import common
from common.errors import UserError, nearest
from common.launch import Run, launch

FORMATS = ("huggingface", "workspace")
DTYPES = ("float32", "bfloat16")
# Models that belong to no paper, by the name that --package knows them under.
SHARED = {"decoder": "common.models.decoder_checkpoint"}
EXAMPLES = (
    "python -m common.convert --package=recurrentgemma --from=recurrentgemma-2b-it "
    "--to=checkpoints/2b-it --format=workspace",
    "python -m common.convert --package=recurrentgemma --from=runs/recurrentgemma-train-smoke "
    "--to=exported --format=huggingface",
    "python -m common.convert --package=recurrentgemma --from=checkpoints/2b-it "
    "--to=exported --format=huggingface --dtype=bfloat16",
    "python -m common.convert --package=decoder --from=SmolLM2-135M --to=checkpoints/smollm2 "
    "--format=workspace",
)

OPTIONS = flags.FlagValues()
PACKAGE = flags.DEFINE_string(
    "package",
    None,
    "the package of the model; decoder for Gemma 2 and 3, Llama, Mistral, Qwen 2 and 3",
    flag_values=OPTIONS,
)
FROM = flags.DEFINE_string("from", None, "the checkpoint to read", flag_values=OPTIONS)
TO = flags.DEFINE_string("to", None, "the folder to write, new or empty", flag_values=OPTIONS)
FORMAT = flags.DEFINE_enum("format", None, FORMATS, "the format to write", flag_values=OPTIONS)
DTYPE = flags.DEFINE_enum(
    "dtype", None, DTYPES, "of the written parameters; as loaded by default", flag_values=OPTIONS
)
NEEDED = (PACKAGE, FROM, TO, FORMAT)


class ConvertiblePackage(Protocol):
    """What a paper's package offers to have its checkpoints converted."""

    def load(self, path: str) -> Any:
        """Returns the model of a checkpoint in any format the package reads."""
        ...

    def save(self, model: Any, path: str, *, format: str, dtype: str | None) -> None:
        """Writes a model to the folder `path`, which is not there yet."""
        ...


def convert(
    package: str, source: str | Path, destination: str | Path, format: str, dtype: str | None = None
) -> None:
    """Reads the checkpoint `source` with `package` and writes it to `destination`.

    The destination appears all at once when everything is written, or not at all.

    Args:
      package: name of a package with `load` and `save`.
      source: whatever the package's `load` takes.
      destination: a folder that is new or empty.
      format: one of `FORMATS`.
      dtype: of the written parameters; None keeps theirs.

    Raises:
      UserError: no such package or checkpoint, or the destination holds something.
    """
    source, destination = Path(source).expanduser(), Path(destination).expanduser().absolute()
    converter = _package(package)
    if not source.exists():
        raise UserError(f"no checkpoint at {source}: check --from")
    _check_destination(destination)
    model = converter.load(str(source))
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{destination.name}."
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix=prefix) as scratch:
            converter.save(model, f"{scratch}/model", format=format, dtype=dtype)
            Path(scratch, "model").rename(destination)
    except OSError as error:
        raise UserError(f"cannot write {destination}: {error.strerror or error}") from error


def _package(name: str) -> ConvertiblePackage:
    """Imports the package `name` and checks that it can convert."""
    root = Path(common.__file__).parent.parent
    packages = sorted(p.parent.name for p in root.glob("*/__init__.py") if p.parent.name != "tests")
    packages += SHARED
    if name in SHARED:
        return importlib.import_module(SHARED[name])
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"--package={name}: not a package{nearest(name, packages)}")
    try:
        package = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # The package is there and misses something itself.
        raise UserError(f"--package={name}: not a package{nearest(name, packages)}") from error
    if not (hasattr(package, "load") and hasattr(package, "save")):
        raise UserError(f"--package={name}: it has no load and save to convert with")
    return package


def _check_destination(destination: Path) -> None:
    if destination.exists() and not destination.is_dir():
        raise UserError(f"--to: {destination} is a file, not a folder")
    if destination.is_dir() and any(destination.iterdir()):
        raise UserError(f"--to: {destination} is not empty: choose a new folder")


def _main(run: Run) -> None:
    given = {holder.name: holder.value for holder in NEEDED if holder.value}
    missing = [f"--{holder.name}" for holder in NEEDED if holder.name not in given]
    if missing:
        raise UserError(f"{', '.join(missing)} missing: --help shows examples")
    started = time.monotonic()
    destination = Path(given["to"]).expanduser()
    convert(given["package"], given["from"], destination, given["format"], DTYPE.value)
    size = sum(file.stat().st_size for file in destination.rglob("*") if file.is_file())
    seconds = time.monotonic() - started
    print(f"wrote {destination}: {given['format']} format, {size / 1e6:,.1f} MB in {seconds:.1f} s")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    launch(
        _main,
        package="common",
        verb="convert",
        description=(
            "Converts a model's checkpoint: from a Hugging Face folder, the original release or "
            "the workspace's own format to a Hugging Face folder or the workspace's own format."
        ),
        examples=EXAMPLES,
        flags=OPTIONS,
        argv=argv,
    )


if __name__ == "__main__":
    main()
