"""Plans as text for a terminal, as JSON, and as the rows of a Markdown file that grows."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.plan.measure import USABLE, Plan
from common.sharding.topology import Topology

GIB = 2.0**30
HOW_COUNTED = (
    "Memory is what the compiler allocates on each device; it has been compiled, not run.",
    "FLOPs are counted by hand: matrix products, attention over the keys that are seen. The "
    "compute bound counts those that rematerialisation repeats too; MFU counts the model's alone.",
    "Traffic is read off the compiled text: each scheduled operation's operands and results in "
    "main memory, every loop as often as it turns, of a slice or an update in place its own size. "
    "A kernel reads its operands and writes its results once.",
    "Link bytes are what a device sends at the least ((n-1)/n of what is gathered or scattered, "
    "twice that for a sum) over the speed of all its links together; the network between GPU hosts "
    "is slower and not modelled.",
    "The step at best is the greatest of the three bounds: all else overlapped, nothing measured.",
    "A prefill step reads one chunk of prompts; a decode step is one token of each row, behind a "
    "full context.",
)


@dataclasses.dataclass(frozen=True)
class Report:
    """The plans of one command.

    Attributes:
      command: what to type for it.
      package, config, overrides: what was planned.
      topology: where.
      plans: of its programs.
    """

    command: str
    package: str
    config: str
    overrides: list[str]
    topology: Topology
    plans: list[Plan]

    @property
    def fits(self) -> bool:
        return all(plan.fits for plan in self.plans)


def as_json(report: Report) -> dict[str, Any]:
    """Returns the report as JSON data: bytes, seconds, FLOPs."""
    where = report.topology
    known = where.accelerator
    return {
        "command": report.command,
        "package": report.package,
        "config": report.config,
        "set": report.overrides,
        "topology": where.name,
        "devices": len(where.devices),
        "device_kind": where.devices[0].device_kind,
        "accelerator": None if known is None else dataclasses.asdict(known),
        "versions": _versions(),
        "fits": report.fits,
        "programs": {plan.name: _plan_json(plan) for plan in report.plans},
        "how_counted": list(HOW_COUNTED),
    }


def as_text(report: Report) -> str:
    """Returns the report for a terminal."""
    where = report.topology
    kind, known = where.devices[0].device_kind, where.accelerator
    each = f", {known.memory / GIB:.1f} GiB each" if known else ""
    sets = "".join(f", {override}" for override in report.overrides)
    lines = [f"{report.package} {report.config}{sets}"]
    lines.append(f"on {where.name}: {len(where.devices)} × {kind}{each}")
    for plan in report.plans:
        lines += ["", *_plan_text(plan, where.platform)]
    lines += ["", "How it is counted:", *(f"- {line}" for line in HOW_COUNTED)]
    return "\n".join(lines)


def add_to_table(report: Report, path: Path) -> None:
    """Puts the report's rows into a Markdown table and the JSON file beside it.

    Rows of the same command are replaced; the Markdown is written anew from the JSON.
    """
    data_path = path.with_suffix(".json")
    try:
        reports = json.loads(data_path.read_text()) if data_path.exists() else []
        reports = [had for had in reports if had["command"] != report.command]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{data_path} is no table of plans: name another file") from error
    reports.append(as_json(report))
    path.parent.mkdir(parents=True, exist_ok=True)
    for file, text in (
        (data_path, json.dumps(reports, indent=1, allow_nan=False) + "\n"),
        (path, markdown(reports)),
    ):
        scratch = file.with_name(file.name + ".tmp")
        scratch.write_text(text)
        os.replace(scratch, file)


def markdown(reports: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of many reports, as `as_json` gives them."""
    lines = ["# Plans", "", "Written by `python -m common.plan … --table`.", ""]
    lines += [f"- {line}" for line in HOW_COUNTED]
    for name in dict.fromkeys(name for report in reports for name in report["programs"]):
        rows = [(r, r["programs"][name]) for r in reports if name in r["programs"]]
        lines += ["", f"## {name.capitalize()}", "", *_markdown_rows(rows)]
    lines += ["", "## Commands", ""]
    lines += [f"{n}. `{report['command']}`" for n, report in enumerate(reports, 1)]
    noted = [
        f"- {n}, {name}: {note}"
        for n, report in enumerate(reports, 1)
        for name, program in report["programs"].items()
        for note in program["notes"]
    ]
    if noted:
        lines += ["", "## Notes", "", *noted]
    versions = [f"{name} {version}" for name, version in reports[-1]["versions"].items()]
    return "\n".join([*lines, "", f"Compiled with {', '.join(versions)}."]) + "\n"


_COLUMNS = (
    ("", "config", "topology", "mesh", "a step"),
    ("params", "optimizer", "cache", "temp", "peak", "of", "fits"),
    ("TFLOP", "traffic GB", "sent GB", "compute ms", "memory ms", "link ms"),
    ("at best ms", "per s", "MFU ≤"),
)


def _markdown_rows(rows: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[str]:
    header = [column for group in _COLUMNS for column in group]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * 5 + "---:|" * (len(header) - 5)]
    numbers: dict[str, int] = {}
    for report, program in rows:
        numbers.setdefault(report["command"], len(numbers) + 1)
        cells = _cells(report, program)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cells(report: Mapping[str, Any], program: Mapping[str, Any]) -> list[str]:
    memory, bounds = program["memory"], program["bounds_seconds"] or {}
    holds, devices = memory["holds"], report["devices"]
    mesh = " × ".join(f"{axis} {size}" for axis, size in program["mesh"].items()) or "1 device"
    flops = (program["flops"] + program["recomputed_flops"]) / devices

    def number(value: float | None, unit: float = 1.0, digits: int = 1) -> str:
        return "–" if value is None else f"{value / unit:,.{digits}f}"

    def bound(name: str) -> str:
        return number(bounds.get(name), 1e-3, 2)

    return [
        report["package"],
        report["config"],
        report["topology"],
        mesh,
        program["shape"],
        *(number(holds.get(part), GIB, 2) for part in ("parameters", "optimizer", "cache")),
        number(memory["temporary"], GIB, 2),
        number(memory["peak"], GIB, 2),
        number(memory["capacity"], GIB, 1),
        "yes" if program["fits"] else "**no**",
        number(flops, 1e12, 2),
        number(program["traffic"], 1e9, 2),
        number(program["link_bytes"], 1e9, 2),
        bound("compute"),
        bound("bandwidth"),
        bound("link"),
        bound("step"),
        number(program["items_per_second"], 1, 0),
        "–" if program["mfu"] is None else f"{program['mfu']:.0%}",
    ]


def _plan_json(plan: Plan) -> dict[str, Any]:
    data = dataclasses.asdict(plan)
    bounds = plan.bounds
    data["bounds_seconds"] = (
        None if bounds is None else {**dataclasses.asdict(bounds), "step": bounds.step}
    )
    del data["bounds"], data["name"]
    data["link_bytes"] = sum(c.link_bytes for c in plan.collectives)
    return data


def _plan_text(plan: Plan, platform: str) -> list[str]:
    mesh = " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items()) or "1 device"
    lines = [f"{plan.name}: {plan.shape} on {mesh}, compiled in {plan.compile_seconds:.0f} s"]
    lines += ["  memory on one device", *_memory_text(plan, platform)]
    if plan.refusal:
        lines.append(f"    the compiler: {plan.refusal[:300]}")
    devices = max(1, round(_product(plan.mesh.values())))
    lines.append(
        f"  FLOPs of a step       {_amount(plan.flops)}FLOP, {_amount(plan.flops / devices)}FLOP "
        f"a device; recomputed {_amount(plan.recomputed_flops / devices)}FLOP"
    )
    if plan.traffic is not None and plan.least_traffic is not None:
        once = f"arguments and results once: {plan.least_traffic / 1e9:,.2f} GB"
        lines.append(f"  memory traffic        {plan.traffic / 1e9:,.2f} GB a device ({once})")
        if plan.setup_traffic:
            lines.append(f"    before the loop     {plan.setup_traffic / 1e9:,.2f} GB, once")
        lines += [
            f"  {c.kind:<20}  {c.count} × over {c.group} devices: {c.bytes / 1e9:,.3f} GB, "
            f"a device sends {c.link_bytes / 1e9:,.3f} GB"
            for c in plan.collectives
        ] or ["  collectives           none"]
    if plan.bounds and plan.mfu is not None and plan.items_per_second is not None:
        b = plan.bounds
        lines.append(
            f"  bounds                compute {b.compute * 1e3:,.2f} ms, memory "
            f"{b.bandwidth * 1e3:,.2f} ms, links {b.link * 1e3:,.2f} ms"
        )
        lines.append(
            f"  at best               {b.step * 1e3:,.2f} ms a step: {plan.items_per_second:,.0f} "
            f"{plan.unit}/s, {plan.mfu:.1%} MFU"
        )
    return [*lines, *(f"  note: {note}" for note in plan.notes)]


def _memory_text(plan: Plan, platform: str) -> list[str]:
    m = plan.memory
    rows: list[tuple[str, float | None]] = list(m.holds.items())
    rows += [("arguments", m.arguments), ("outputs", m.outputs), ("  of them in place", m.aliased)]
    rows += [("temporary", m.temporary), ("program", m.code), ("peak", m.peak)]
    lines = [f"    {name:<20}{_size(size):>12}" for name, size in rows if size is not None]
    verdict = "fits" if plan.fits else "does not fit"
    if m.capacity is None or m.peak is None:
        return [*lines, f"    {verdict}"]
    usable = USABLE[platform]
    of = f"of {_size(m.capacity)}" + (f" × {usable}" if usable < 1 else "")
    lines[-1] += f" {of} ({m.peak / m.capacity:.0%}): {verdict}"
    return lines


def _size(count: float) -> str:
    for unit, name in ((GIB, "GiB"), (2.0**20, "MiB")):
        if count >= unit / 10:
            return f"{count / unit:,.2f} {name}"
    return f"{count / 1024:,.1f} KiB"


def _product(sizes: Any) -> float:
    total = 1.0
    for size in sizes:
        total *= size
    return total


def _amount(value: float) -> str:
    for limit, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:,.2f} {letter}"
    return f"{value:,.0f} "


def _versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt")
    return {name: version for name in names if (version := _version(name))}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
