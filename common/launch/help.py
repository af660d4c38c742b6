"""The text of `--help`: description, presets, fields, flags and examples of a launcher."""

import inspect
import textwrap
from collections.abc import Sequence

from absl import flags as absl_flags

from common import values
from common.launch import config as configs

WIDTH = 100


def help_text(
    program: str,
    description: str,
    presets: configs.Presets,
    flags: absl_flags.FlagValues,
    examples: Sequence[str],
) -> str:
    """Returns the help of the launcher `program`."""
    options = "--config=PRESET [--workdir=DIR] [--set FIELD=VALUE …] " if presets else ""
    parts = [textwrap.fill(description, WIDTH), f"Usage: {program} {options}[flags]"]
    if presets:
        parts += [_presets(presets), _fields(presets)]
    parts += [_flags(flags), "\n".join(["Examples:", *(f"  {line}" for line in examples)])]
    return "\n\n".join(parts)


def _presets(presets: configs.Presets) -> str:
    first_lines = {
        name: (inspect.getdoc(preset) or "").partition("\n")[0] for name, preset in presets.items()
    }
    return _table("Presets (--config):", list(first_lines.items()))


def _fields(presets: configs.Presets) -> str:
    name, preset = next(iter(presets.items()))
    fields = list(configs.leaves(preset()))
    width = max(len(kind) for _, kind, _ in fields if len(kind) <= 24)
    rows = [(field, f"{kind:<{width}}  {values.show(value)}") for field, kind, value in fields]
    return _table(f"Fields (--set FIELD=VALUE), their types and values in '{name}':", rows)


def _flags(flags: absl_flags.FlagValues) -> str:
    rows = []
    for name in flags:
        flag = flags[name]
        if name != flag.name:
            continue  # A short name of a flag that is listed under its full one.
        kind = "" if flag.flag_type() == "bool" else f"={flag.flag_type().split()[-1].upper()}"
        unset = flag.default is None or flag.default is False or flag.default == []
        default = "" if unset else f" (default: {flag.default})"
        rows.append((f"--{name}{kind}", flag.help.partition(";\n")[0] + default))
    return _table("Flags:", rows)


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    width = max((len(left) for left, _ in rows), default=0) + 4
    lines = [title]
    for left, right in rows:
        wrapped = textwrap.wrap(
            right, max(WIDTH - width, 40), break_on_hyphens=False, break_long_words=False
        )
        first, *rest = wrapped or [""]
        lines += [f"  {left}".ljust(width) + first, *(" " * width + line for line in rest)]
    return "\n".join(line.rstrip() for line in lines)
