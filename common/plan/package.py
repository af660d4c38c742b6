"""How a paper's package tells `python -m common.plan` what to compile: its module `plan`."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

import common
from common.errors import UserError, nearest
from common.sharding.program import Inference, Program

MODULE = "plan"


class Plannable(Protocol):
    """What the module `<package>.plan` offers.

    Attributes:
      PRESETS: name to function, as the package's launchers have them.
    """

    PRESETS: Mapping[str, Callable[[], Any]]

    def programs(
        self, config: Any, devices: Sequence[jax.Device], inference: Inference
    ) -> Mapping[str, Callable[[], Program]]:
        """Returns the programs of a configuration by name; each is made when it is asked for."""
        ...


def packages() -> list[str]:
    """The packages that have something to plan."""
    root = Path(common.__file__).parent.parent
    files = [*root.glob(f"*/{MODULE}.py"), *root.glob(f"*/*/{MODULE}.py")]
    names = (".".join(file.parent.relative_to(root).parts) for file in files)
    return sorted(name for name in names if name.split(".")[0] not in ("common", "tests"))


def plannable(name: str) -> Plannable:
    """Imports the module `plan` of a package.

    Raises:
      UserError: there is no such package, or it has nothing to plan.
    """
    known = packages()
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"--package={name}: not a package{nearest(name, known)}")
    try:
        module = importlib.import_module(f"{name}.{MODULE}")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.{MODULE}.".startswith(f"{error.name}."):
            raise  # The module is there and misses something itself.
        raise UserError(
            f"--package={name}: no package with a module '{MODULE}'{nearest(name, known)} "
            f"(there is {', '.join(known)})"
        ) from error
    if not (hasattr(module, "PRESETS") and hasattr(module, "programs")):
        raise UserError(f"--package={name}: {name}.{MODULE} has no PRESETS and programs")
    return module
