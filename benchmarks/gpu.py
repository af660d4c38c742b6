"""Everything that matters on one GPU, in under eight minutes, its table last.

    python -m benchmarks.gpu [--sections attention,recurrentgemma] [--minutes 7.5]

Kernels are timed inside compiled loops, without the host's share; each stands beside its plain XLA
form and what a user would run instead, and is compared with the former. Every section runs in a
process of its own: what fails, fails alone, and is tried no second time. Results go to
`benchmarks/results/`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from common.errors import UserError

_ROOT = Path(__file__).parent.parent
# Left for the end: reading results, writing the table.
_RESERVE = 5.0
# A process that reported a failure of one item; a fresh one goes on behind it.
_FAILED = 3
# What is raised before anything runs.
_REFUSALS = (NotImplementedError, TypeError, UserError, ValueError)
Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", default="", help="names between commas; all by default")
    parser.add_argument("--minutes", type=float, default=7.5, help="for all together")
    parser.add_argument("--tiny", action="store_true", help="no size, to see it run on any device")
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    parser.add_argument("--name", default="gpu", help="stem of the result files")
    parser.add_argument("--child", nargs=2, metavar=("SECTION", "RECORDS"), help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    if flags.child:
        section, records = flags.child
        return run_items(section, Path(records), tiny=flags.tiny)
    try:
        path = _run(flags)
    except UserError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    print(f"written to {path}")
    print(path.read_text())
    return 0


def _run(flags: argparse.Namespace) -> Path:
    # Imports JAX, and with it the weight of a process, but touches no device.
    from benchmarks.gpu_items import sections

    known = sections()
    names = [name for name in flags.sections.split(",") if name] or list(known)
    for name in names:
        if name not in known:
            raise UserError(f"no section '{name}'; there are {', '.join(known)}")
    end = time.monotonic() + 60 * flags.minutes - _RESERVE
    left = sum(known[name][0] for name in names)
    found: dict[str, list[Record]] = {}
    machine: dict[str, str] = {}
    for name in names:
        now = time.monotonic()
        share = known[name][0] / left
        left -= known[name][0]
        print(f"{name}: at most {share * (end - now):.0f} s", file=sys.stderr, flush=True)
        records = collect(name, deadline=now + share * (end - now), tiny=flags.tiny)
        machine = next((r["machine"] for r in records if "machine" in r), machine)
        found[name] = [record for record in records if "what" in record]
    return _write(flags, machine, found)


# --- In the section's own process ---


def run_items(section: str, path: Path, *, tiny: bool) -> int:
    """Measures a section's items that `path` does not name yet, and appends to it.

    A line before each item says that it began, so that the parent knows what a process died of.
    """
    from benchmarks.gpu_items import sections

    done = {(record["what"], record["contender"]) for record in _read(path) if "what" in record}
    with path.open("a") as file:

        def put(record: Record) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        put({"machine": harness.describe_machine()})
        for item in sections()[section][1](tiny):
            head = {"what": item.what, "contender": item.contender}
            if tuple(head.values()) in done:
                continue
            put({**head, "began": True})
            start = time.monotonic()
            try:
                put({**head, **item.measure()})
            except Exception as error:
                text = " ".join(f"{type(error).__name__}: {error}".split())
                put({**head, "note": f"failed: {text[:200]}"})
                if isinstance(error, _REFUSALS):
                    continue
                # A kernel's fault leaves the process without a usable GPU.
                return _FAILED
            print(f"  {item.key}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    return 0


# --- In the parent ---


def collect(section: str, *, deadline: float, tiny: bool = False) -> list[Record]:
    """Runs a section to its end or to the deadline; returns its records, failures among them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "records.jsonl")
        command = [sys.executable, "-m", "benchmarks.gpu", "--child", section, str(path)]
        command += ["--tiny"] if tiny else []
        while True:
            before = len(_read(path))
            code = _call(command, deadline)
            if code == 0:
                break
            records = _read(path)
            if code is None or len(records) == before:
                reason = "no time left" if code is None else f"failed: exit code {code}"
                began = [r for r in records if r.get("began")]
                last = began[-1] if began else {"what": section, "contender": ""}
                settled = any(_same(r, last) and not r.get("began") for r in records)
                last = {"what": section, "contender": "the rest"} if settled else last
                _append(path, {**last, "began": False, "note": reason})
                break
            if records[-1].get("began"):
                _append(path, {**records[-1], "began": False, "note": f"failed: exit code {code}"})
        return [record for record in _read(path) if not record.get("began")]


def _call(command: Sequence[str], deadline: float) -> int | None:
    """Returns the exit code, or None if the deadline came first."""
    try:
        done = subprocess.run(
            command,
            cwd=_ROOT,
            # Training the 2B model takes most of 80 GB.
            env={"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ},
            stdout=2,  # what a section prints is progress
            timeout=max(0.0, deadline - time.monotonic()),
        )
        return done.returncode
    except subprocess.TimeoutExpired:
        return None


def _same(one: Record, other: Record) -> bool:
    return (one.get("what"), one.get("contender")) == (other["what"], other["contender"])


def _append(path: Path, record: Record) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _read(path: Path) -> list[Record]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def _write(
    flags: argparse.Namespace, machine: dict[str, str], found: dict[str, list[Record]]
) -> Path:
    flags.output.mkdir(parents=True, exist_ok=True)
    path = flags.output / f"{flags.name}.md"
    lines = ["# One GPU", "", *(f"- {key}: {value}" for key, value in machine.items())]
    lines += [
        "- of limit: the time that the declared capacities of the device allow, over the median;"
        " × ours: the contender's time over ours, above 1 where ours is faster",
        "",
        "| what | who | median ms | rate | of limit | × ours | remarks |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for records in found.values():
        ours = {r["what"]: r["seconds"] for r in records if r["contender"] == "ours" and _timed(r)}
        lines += [_row(record, ours.get(record["what"])) for record in records]
    path.write_text("\n".join(lines) + "\n")
    text = json.dumps({"machine": machine, "sections": found}, indent=2)
    path.with_suffix(".json").write_text(text + "\n")
    return path


def _timed(record: Record) -> bool:
    return "seconds" in record


def _row(record: Record, ours: float | None) -> str:
    cells = [record["what"], record["contender"]]
    if _timed(record):
        share = "" if record["share"] is None else f"{record['share']:.0%}"
        ratio = f"{record['seconds'] / ours:.2f}" if ours else ""
        cells += [f"{1e3 * record['seconds']:.3f}", record["rate"], share, ratio]
    else:
        cells += [""] * 4
    note = record["note"].replace("|", "¦")
    return "| " + " | ".join([*cells, note]) + " |"


if __name__ == "__main__":
    sys.exit(main())
