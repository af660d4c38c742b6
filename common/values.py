"""Values of configuration fields: from command-line text, to and from JSON data, by annotation."""

import dataclasses
import enum
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Union

from common.errors import UserError, nearest

# Marks which class of a union a JSON object is; a keyword, so that no field can bear the name.
CLASS = "class"
_INT = re.compile(r"[+-]?\d+(_\d+)*([eE]\d+)?")
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True}
_BOOLEANS |= {"false": False, "no": False, "off": False, "0": False}
_SCALARS: dict[Any, str] = {bool: "bool", int: "int", float: "float", str: "str", Path: "path"}


def fields_of(cls: Any) -> dict[str, Any]:
    """Returns `{field: annotation}` of a configuration dataclass, in order of definition."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def default_of(cls: type[Any], name: str) -> Any:
    """Returns the default of a field, `None` where it has none."""
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def groups_in(annotation: Any) -> list[Any]:
    """Returns the dataclasses that a field of this annotation may hold."""
    return [member for member in _members(annotation) if dataclasses.is_dataclass(member)]


def construct(cls: type[Any], arguments: Mapping[str, Any], where: str) -> Any:
    """Calls `cls(**arguments)`, telling what it refuses as one UserError."""
    required = {
        field.name
        for field in dataclasses.fields(cls)
        if field.init
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(arguments))
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} must be set too")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def type_name(annotation: Any) -> str:
    """Returns the type as help texts and errors show it: `int`, `float|none`, `relu|gelu`."""
    if annotation is types.NoneType:
        return "none"
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    if _is_union(annotation):
        return "|".join(type_name(member) for member in _members(annotation))
    if typing.get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        members = typing.get_args(annotation)
        inner = ",".join("..." if member is ... else type_name(member) for member in members)
        return f"({inner})"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "|".join(member.name for member in annotation)
    return getattr(annotation, "__name__", str(annotation))


def show(value: Any) -> str:
    """Returns a value as `--set` would take it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, tuple):
        return ",".join(show(item) for item in value) or "()"
    return str(value)


def parse(text: str, annotation: Any, where: str) -> Any:
    """Reads a value from command-line text.

    Raises:
      UserError: the text is no value of this type; the message names the field and the type.
    """
    if _is_union(annotation):
        return _parse_union(text, annotation, where)
    if typing.get_origin(annotation) is Literal:
        choices = {str(choice): choice for choice in typing.get_args(annotation)}
        return _choose(text, choices, where)
    if typing.get_origin(annotation) is tuple:
        return _parse_tuple(text, annotation, where)
    if dataclasses.is_dataclass(annotation):
        inside = ", ".join(f"{where}.{name}" for name in fields_of(annotation))
        raise UserError(f"'{where}' is a group of fields: set one of {inside}")
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        by_value = {str(member.value): member for member in annotation}
        return _choose(text, by_value | dict(annotation.__members__), where)
    if annotation not in _PARSERS:
        raise TypeError(f"{where}: a configuration cannot hold {type_name(annotation)}")
    try:
        return _PARSERS[annotation](text)
    except ValueError:
        raise UserError(f"{where}: '{text}' is not {_article(type_name(annotation))}") from None


def encode(value: Any, annotation: Any) -> Any:
    """Turns a field's value into JSON data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = fields_of(type(value))
        data = {name: encode(getattr(value, name), hint) for name, hint in hints.items()}
        return {CLASS: type(value).__name__, **data} if len(groups_in(annotation)) > 1 else data
    if isinstance(value, tuple):
        return [
            encode(item, member)
            for item, member in zip(value, _item_types(annotation, len(value)), strict=True)
        ]
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a configuration cannot hold {type(value).__name__}: {value!r}")


def decode(data: Any, annotation: Any, path: str, where: str) -> Any:
    """Turns JSON data back into a field's value; `path` is the field, `where` the file."""
    if _is_union(annotation):
        return _decode_union(data, annotation, path, where)
    if dataclasses.is_dataclass(annotation):
        return _decode_group(data, annotation, path, where)
    if typing.get_origin(annotation) is tuple:
        if not isinstance(data, list):
            raise _wrong(data, annotation, path, where)
        members = _item_types(annotation, len(data))
        if len(members) != len(data):
            raise _wrong(data, annotation, path, where)
        return tuple(
            decode(item, member, f"{path}[{i}]", where)
            for i, (item, member) in enumerate(zip(data, members, strict=True))
        )
    if typing.get_origin(annotation) is Literal:
        for choice in typing.get_args(annotation):
            if type(choice) is type(data) and choice == data:
                return choice
        raise _wrong(data, annotation, path, where)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        if not isinstance(data, str) or data not in annotation.__members__:
            raise _wrong(data, annotation, path, where)
        return annotation[data]
    return _decode_scalar(data, annotation, path, where)


def _decode_scalar(data: Any, annotation: Any, path: str, where: str) -> Any:
    if annotation is types.NoneType and data is None:
        return None
    if annotation is float and isinstance(data, str) and data in ("inf", "-inf"):
        return float(data)
    if annotation is float and type(data) in (int, float) and not math.isnan(data):
        return float(data)
    if annotation is Path and isinstance(data, str):
        return Path(data)
    if annotation in (bool, int, str) and type(data) is annotation:
        return data
    raise _wrong(data, annotation, path, where)


def _decode_group(data: Any, cls: Any, path: str, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise _wrong(data, cls, path, where)
    hints = fields_of(cls)
    prefix = f"{path}." if path else ""
    for name in data:
        if name not in hints and name != CLASS:
            raise UserError(f"{where}: unknown field '{prefix}{name}'{nearest(name, hints)}")
    missing = [prefix + name for name in hints if name not in data]
    if missing:
        raise UserError(f"{where}: missing field {', '.join(repr(name) for name in missing)}")
    arguments = {
        name: decode(data[name], hint, prefix + name, where) for name, hint in hints.items()
    }
    return construct(cls, arguments, f"{where}: {path}" if path else where)


def _decode_union(data: Any, annotation: Any, path: str, where: str) -> Any:
    groups = groups_in(annotation)
    if isinstance(data, Mapping) and len(groups) > 1:
        named = {group.__name__: group for group in groups}
        if data.get(CLASS) not in named:
            raise UserError(f"{where}: '{path}' needs \"{CLASS}\", one of {', '.join(named)}")
        return _decode_group(data, named[data[CLASS]], path, where)
    if isinstance(data, Mapping) and groups:
        return _decode_group(data, groups[0], path, where)
    for member in _members(annotation):
        if dataclasses.is_dataclass(member):
            continue
        try:
            return decode(data, member, path, where)
        except UserError:
            continue
    raise _wrong(data, annotation, path, where)


def _parse_union(text: str, annotation: Any, where: str) -> Any:
    members = _members(annotation)
    if types.NoneType in members and text.lower() in ("none", "null"):
        return None
    groups = {group.__name__: group for group in groups_in(annotation)}
    if text in groups:
        return construct(groups[text], {}, where)
    # str takes any text, so it is tried after all others.
    rest = [m for m in members if m is not types.NoneType and m not in groups.values()]
    for member in sorted(rest, key=lambda member: member in (str, Path)):
        try:
            return parse(text, member, where)
        except UserError:
            continue
    if groups and not rest:
        inside = " or ".join(f"{where}={name}" for name in groups)
        fields = ", ".join(
            f"{where}.{name}" for group in groups.values() for name in fields_of(group)
        )
        raise UserError(f"'{where}' is a group of fields: set {inside} or one of {fields}")
    raise UserError(f"{where}: '{text}' is not {_article(type_name(annotation))}")


def _parse_tuple(text: str, annotation: Any, where: str) -> tuple[Any, ...]:
    inside = text.strip()
    if inside[:1] + inside[-1:] in ("()", "[]"):
        inside = inside[1:-1]
    parts = [part.strip() for part in inside.split(",")] if inside.strip() else []
    if parts and parts[-1] == "":
        parts.pop()
    members = _item_types(annotation, len(parts))
    if len(members) != len(parts):
        raise UserError(f"{where}: '{text}' is not {type_name(annotation)}")
    return tuple(parse(part, member, where) for part, member in zip(parts, members, strict=True))


def _parse_int(text: str) -> int:
    if not _INT.fullmatch(text):
        raise ValueError(text)
    mantissa, _, exponent = text.lower().partition("e")
    if len(exponent) > 3:
        raise ValueError(text)
    return int(mantissa) * 10 ** int(exponent or "0")


def _parse_float(text: str) -> float:
    value = float(text)
    if math.isnan(value):
        raise ValueError(text)
    return value


def _parse_bool(text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise ValueError(text)
    return _BOOLEANS[text.lower()]


_PARSERS: dict[Any, Callable[[str], Any]] = {
    bool: _parse_bool,
    int: _parse_int,
    float: _parse_float,
    str: str,
    Path: Path,
}


def _choose(text: str, choices: Mapping[str, Any], where: str) -> Any:
    if text not in choices:
        raise UserError(
            f"{where}: '{text}' is none of {', '.join(choices)}{nearest(text, choices)}"
        )
    return choices[text]


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, types.UnionType)


def _members(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if _is_union(annotation) else (annotation,)


def _item_types(annotation: Any, length: int) -> tuple[Any, ...]:
    """Returns the annotation of each item of a tuple; in a union, of its tuple member."""
    for member in _members(annotation):
        if typing.get_origin(member) is tuple:
            arguments = typing.get_args(member)
            variadic = len(arguments) == 2 and arguments[1] is ...
            return (arguments[0],) * length if variadic else arguments
    return (Any,) * length


def _wrong(data: Any, annotation: Any, path: str, where: str) -> UserError:
    what = f"{where}: {path}" if path else where
    return UserError(f"{what}: {data!r} is not {_article(type_name(annotation))}")


def _article(noun: str) -> str:
    return f"an {noun}" if noun[:1] in "aeiou" else f"a {noun}"
