"""Compiles a package's programs for an accelerator that need not be here, and tells what they take.

python -m common.plan --package=recurrentgemma --config=2b --topology=v5p:4x4x4
"""

import json
import logging
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from common.errors import UserError, nearest
from common.launch import Run, launch
from common.launch import config as configs
from common.plan.measure import Plan, plan
from common.plan.package import plannable
from common.plan.report import Report, add_to_table, as_json, as_text
from common.sharding.program import Inference
from common.sharding.topology import Topology, topology

EXAMPLES = (
    "python -m common.plan --package=recurrentgemma --config=smoke --topology=cpu:8",
    "python -m common.plan --package=recurrentgemma --config=2b --topology=v5e:16x16 "
    "--program=train --set train.mesh.most_fsdp=32",
    "python -m common.plan --package=recurrentgemma --config=9b --topology=v5e:2x2 "
    "--program=decode --rows=8 --context=8192 --json",
)
_LOG = logging.getLogger("common.plan")
OPTIONS = flags.FlagValues()
_own: dict[str, Any] = {"flag_values": OPTIONS}
PACKAGE = flags.DEFINE_string("package", None, "the package of the model", **_own)
CONFIG = flags.DEFINE_string("config", None, "a preset of it, or the path of a .py file", **_own)
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "<kind>:<shape>, as v5e:4x4, v5p:4x4x8, v6e:2x4, h100:8, cpu:8", **_own
)
SET = flags.DEFINE_multi_string("set", [], "field=value: overrides a field; repeatable", **_own)
PROGRAM = flags.DEFINE_multi_string(
    "program", [], "only this program of the package (train, decode, …); repeatable", **_own
)
ROWS = flags.DEFINE_integer("rows", 1, "rows of a batch in programs that do not train", **_own)
CONTEXT = flags.DEFINE_integer("context", 8192, "tokens that a decoded row has room for", **_own)
PROMPT = flags.DEFINE_integer(
    "prompt", None, "tokens of a row in a prefill (default: 2048, or the context)", **_own
)
TENSOR = flags.DEFINE_integer(
    "tensor", None, "devices that share the parameters when decoding (default: as divide)", **_own
)
QUICK = flags.DEFINE_bool(
    "quick", False, "let a TPU's compiler optimise less: a fifth of the time, near figures", **_own
)
JSON = flags.DEFINE_bool("json", False, "print JSON", **_own)
TABLE = flags.DEFINE_string("table", None, "a Markdown file whose rows these plans join", **_own)


def plans(
    package: str,
    config: str,
    where: str,
    overrides: Sequence[str] = (),
    names: Sequence[str] = (),
    inference: Inference | None = None,
    *,
    quick: bool = False,
) -> tuple[Topology, list[Plan]]:
    """Plans the programs of a package's configuration on a topology.

    Args:
      package, config, overrides: as the command line names them.
      where: the topology's name.
      names: the programs to plan; all of them if empty.
      inference: what the programs that do not train are planned for.
      quick: see `compile_lowered`.

    Raises:
      UserError: something unknown or that does not fit together.
    """
    module = plannable(package)
    chosen = configs.load_config(config, module.PRESETS, overrides)
    _use_cpu(where)
    target = topology(where)
    programs = module.programs(chosen, target.devices, inference or Inference())
    for name in names:
        if name not in programs:
            raise UserError(
                f"--program={name}: {package} has {', '.join(programs)}{nearest(name, programs)}"
            )
    # Made before any is compiled, so that mistakes show at once.
    made = {name: make() for name, make in programs.items() if not names or name in names}
    found = []
    for name, program in made.items():
        _LOG.info("compiling %s for %s", name, target.name)
        found.append(plan(name, program, target, quick=quick))
    return target, found


def _use_cpu(where: str) -> None:
    """Keeps accelerators of this machine out of it, and makes the virtual CPUs of `cpu:8`."""
    match = re.fullmatch(r"cpu:(\d+)", where)
    try:
        jax.config.update("jax_platforms", "cpu")
        if match and 0 < int(match[1]) <= 4096:
            jax.config.update("jax_num_cpu_devices", int(match[1]))
    except RuntimeError:
        pass  # JAX has started already; the topology tells if the devices do not do.


def _given() -> Mapping[str, str]:
    needed = (PACKAGE, CONFIG, TOPOLOGY)
    missing = [f"--{holder.name}" for holder in needed if not holder.value]
    if missing:
        raise UserError(f"{', '.join(missing)} missing: --help shows examples")
    return {holder.name: holder.value for holder in needed}


def _main(run: Run) -> None:
    given = _given()
    inference = Inference(
        ROWS.value,
        CONTEXT.value,
        min(2048, CONTEXT.value) if PROMPT.value is None else PROMPT.value,
        TENSOR.value,
    )
    where, planned = plans(
        given["package"],
        given["config"],
        given["topology"],
        SET.value,
        PROGRAM.value,
        inference,
        quick=QUICK.value,
    )
    report = Report(
        command=_planned(run.command),
        package=given["package"],
        config=given["config"],
        overrides=list(SET.value),
        topology=where,
        plans=planned,
    )
    if TABLE.value:
        add_to_table(report, Path(TABLE.value))
    print(json.dumps(as_json(report), indent=2, allow_nan=False) if JSON.value else as_text(report))


def _planned(command: str) -> str:
    """The command without what is printed or kept beside the plan: no part of what was planned."""
    kept, words = [], iter(shlex.split(command))
    for word in words:
        if word in ("--table", "-table"):
            next(words, None)  # Its value stands apart.
        elif not re.match(r"--?(json|table|debug)\b", word):
            kept.append(word)
    return shlex.join(kept)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    launch(
        _main,
        package="common",
        verb="plan",
        description=(
            "Compiles the programs of a package ahead of time for an accelerator that need not be "
            "here: memory against capacity, FLOPs, traffic, collectives, and the bounds they set. "
            "Exit code 0 whether or not it fits."
        ),
        examples=EXAMPLES,
        flags=OPTIONS,
        accelerators=False,
        argv=argv if argv is not None else sys.argv[1:],
    )


if __name__ == "__main__":
    main()
