"""Typed configurations: presets, files, `--set` overrides, JSON and differences.

A configuration is a frozen dataclass whose fields are bool, int, float, str, Path, an Enum, a
Literal, a tuple of these, another such dataclass, or a union of them (`X | None` above all).
Nothing in it is executed when it is read back from JSON.
"""

import dataclasses
import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, TypeVar

from common import values
from common.errors import UserError, nearest

C = TypeVar("C")
Presets = Mapping[str, Callable[[], Any]]
NO_PRESETS: Presets = MappingProxyType({})


def load_config(name_or_path: str, presets: Presets, overrides: Sequence[str] = ()) -> Any:
    """Builds a configuration as the command line names it.

    Args:
      name_or_path: a key of `presets`, or the path of a Python file (it ends in `.py`) with a
        function `config()`, or with one single function that takes no argument.
      presets: name to zero-argument function.
      overrides: strings `field.field=value`; the last one for a field wins.

    Raises:
      UserError: unknown preset or field, bad value, a file that does not give a configuration.
    """
    if name_or_path.endswith(".py"):
        config = _from_python(Path(name_or_path), presets)
    elif name_or_path in presets:
        config = presets[name_or_path]()
    else:
        raise UserError(
            f"unknown preset '{name_or_path}'{nearest(name_or_path, presets)} "
            f"(presets: {', '.join(presets)}; or the path of a .py file)"
        )
    return apply_overrides(config, overrides)


def apply_overrides(config: C, overrides: Sequence[str]) -> C:
    """Returns `config` with every `field.field=value` applied, all of them before validation."""
    root = _Node()
    for override in overrides:
        field, equals, text = override.partition("=")
        if not equals or not field.strip():
            raise UserError(f"--set takes field=value, not '{override}'")
        node = root
        for part in field.strip().split("."):
            node = node.children.setdefault(part, _Node())
        node.text = text.strip()
    return _override(config, type(config), root, "", tuple(name for name, _, _ in leaves(config)))


def leaves(config: Any) -> Iterator[tuple[str, str, Any]]:
    """Yields `(dotted field, type in words, value)` for every field that holds no group."""
    for name, annotation in values.fields_of(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from ((f"{name}.{below}", kind, leaf) for below, kind, leaf in leaves(value))
        else:
            yield name, values.type_name(annotation), value


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the configuration as JSON data: nested dictionaries, lists and scalars."""
    return values.encode(config, type(config))


def from_dict(cls: type[C], data: Mapping[str, Any], where: str = "config") -> C:
    """Builds a `cls` from what `to_dict` gave.

    Raises:
      UserError: an unknown or missing field or a value of the wrong type; `where` is named.
    """
    return values.decode(data, cls, "", where)


def to_json(config: Any) -> str:
    """Returns the configuration as indented JSON text."""
    return json.dumps(to_dict(config), indent=2, allow_nan=False) + "\n"


def from_json(cls: type[C], text: str, where: str = "config.json") -> C:
    """Reads what `to_json` wrote, strictly: every field once, none unknown. See `from_dict`."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    return from_dict(cls, data, where)


def diff(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """Returns `{dotted field: (value in a, value in b)}` for the fields that differ.

    Args:
      a, b: configurations, or JSON data of configurations; a field that one side lacks is
        `"absent"` there.
    """
    left = a if isinstance(a, Mapping) else to_dict(a)
    right = b if isinstance(b, Mapping) else to_dict(b)
    found: dict[str, tuple[Any, Any]] = {}
    for name in [*left, *(key for key in right if key not in left)]:
        x, y = left.get(name, "absent"), right.get(name, "absent")
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            found |= {f"{name}.{below}": pair for below, pair in diff(x, y).items()}
        elif x != y:
            found[name] = (x, y)
    return found


@dataclasses.dataclass
class _Node:
    """Overrides as a tree: the text given for this field and those for the fields below it."""

    text: str | None = None
    children: dict[str, "_Node"] = dataclasses.field(default_factory=dict)


def _override(value: Any, annotation: Any, node: _Node, where: str, known: Sequence[str]) -> Any:
    if node.text is not None:
        value = values.parse(node.text, annotation, where)
    if not node.children:
        return value
    cls = _group_below(value, annotation, where, next(iter(node.children)), known)
    hints = values.fields_of(cls)
    # A group that was off (None) starts from its defaults.
    arguments = {} if value is None else {name: getattr(value, name) for name in hints}
    for name, child in node.children.items():
        path = f"{where}.{name}" if where else name
        if name not in hints:
            raise UserError(f"unknown field '{path}'{_suggest(path, hints, where, known)}")
        current = arguments.get(name, values.default_of(cls, name))
        arguments[name] = _override(current, hints[name], child, path, known)
    return values.construct(cls, arguments, where or "config")


def _group_below(value: Any, annotation: Any, where: str, child: str, known: Sequence[str]) -> Any:
    """Returns the dataclass whose fields the overrides below `where` name."""
    if dataclasses.is_dataclass(value):
        return type(value)
    groups = values.groups_in(annotation)
    if value is None and len(groups) == 1:
        return groups[0]
    if value is None and groups:
        choices = " or ".join(f"{where}={group.__name__}" for group in groups)
        raise UserError(f"'{where}' is none: first --set {choices}")
    path = f"{where}.{child}"
    raise UserError(f"unknown field '{path}': '{where}' has no fields{nearest(path, known)}")


def _suggest(path: str, siblings: Mapping[str, Any], where: str, known: Sequence[str]) -> str:
    """Names the nearest valid field: the same last name elsewhere, else the nearest in spelling."""
    same = [name for name in known if name.split(".")[-1] == path.split(".")[-1]]
    if same:
        return f"; did you mean '{same[0]}'?"
    prefix = f"{where}." if where else ""
    return nearest(path, [prefix + name for name in siblings]) or nearest(path, known)


def _from_python(path: Path, presets: Presets) -> Any:
    """Runs the user's own Python file and returns the configuration its function builds."""
    if not path.is_file():
        raise UserError(f"--config: there is no file '{path}'")
    # A fixed prefix keeps a file called `jax.py` from being taken for a library.
    name = "tenfold_user_config_" + re.sub(r"\W", "_", path.stem)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config: '{path}' cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = _config_function(module, path)()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config: {path} raised {type(error).__name__}: {error}") from error
    expected = {type(preset()) for preset in presets.values()}
    if expected and type(config) not in expected:
        names = " or ".join(sorted(cls.__name__ for cls in expected))
        raise UserError(f"--config: {path} returns {type(config).__name__}, not {names}")
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise UserError(f"--config: {path} returns {type(config).__name__}, not a dataclass")
    return config


def _config_function(module: ModuleType, path: Path) -> Callable[[], Any]:
    own = {
        name: function
        for name, function in vars(module).items()
        if getattr(function, "__module__", None) == module.__name__
        and hasattr(function, "__code__")
        and not name.startswith("_")
    }
    if "config" in own:
        return own["config"]
    without_arguments = [f for f in own.values() if f.__code__.co_argcount == 0]
    if len(without_arguments) != 1:
        raise UserError(f"--config: {path} needs a function config() that returns a configuration")
    return without_arguments[0]
