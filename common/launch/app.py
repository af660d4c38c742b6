"""The application that every launcher is: flags, configuration, help, errors and exit codes.

A launcher defines its own flags in a private `absl.flags.FlagValues`, so that several launchers can
be imported in one process, and hands a `main(run)` to `launch`.
"""

import dataclasses
import io
import os
import re
import select
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from common.errors import UserError, nearest
from common.launch import config as configs
from common.launch import peers, runtime
from common.launch.help import help_text

DEFECT = 1
USER_ERROR = 2
INTERRUPTED = 130
# absl's message for a flag that must be given, put more plainly in ours.
_REQUIRED = re.compile(r"Flag (--\w+) must have a value other than None")


@dataclasses.dataclass(frozen=True)
class Run:
    """What the command line asked for.

    Attributes:
      config: the configuration, overrides applied; None for a verb without presets.
      preset: what `--config` said, a preset's name or a file's path.
      workdir: the run folder; None for a verb without one.
      command: the command line that started this run, to be typed again to resume it.
      debug: whether `--debug` was given.
    """

    config: Any
    preset: str | None
    workdir: Path | None
    command: str
    debug: bool


Main = Callable[[Run], int | None]


@dataclasses.dataclass(frozen=True)
class Application:
    """What `launch` knows of a launcher; see there."""

    package: str
    verb: str
    description: str
    presets: configs.Presets
    examples: Sequence[str]
    own_flags: absl_flags.FlagValues
    workdir: bool
    accelerators: bool
    several_processes: bool

    @property
    def program(self) -> str:
        return f"python -m {self.package}.{self.verb}"


def launch(
    main: Main,
    *,
    package: str,
    verb: str,
    description: str,
    examples: Sequence[str],
    presets: configs.Presets | None = None,
    flags: absl_flags.FlagValues | None = None,
    workdir: bool | None = None,
    accelerators: bool = True,
    several_processes: bool = False,
    argv: Sequence[str] | None = None,
) -> None:
    """Runs a launcher. Returns normally on success.

    Args:
      main: does the work; what it returns, if not None or 0, is the exit code.
      package, verb: the launcher is `python -m <package>.<verb>`.
      description: what it does, for `--help`.
      examples: full command lines for `--help`.
      presets: name to function that builds the configuration; with them come `--config` and
        `--set`, the first one is the example in `--help`.
      flags: the launcher's own flags; their holders' `.value` is readable in `main`.
      workdir: whether there is a `--workdir`; by default where there are presets. It defaults to
        `runs/<package>-<verb>-<preset>`.
      accelerators: whether to set up JAX (cluster, compilation cache) before `main`.
      several_processes: whether it can be one process of several; if not, it refuses to be.
      argv: the arguments after the program's name, by default the process's own.

    Raises:
      SystemExit: 2 after one line on stderr for a user's mistake (`--debug` adds the traceback),
        130 after an interrupt, or the code that `main` returned. Other exceptions pass through.
    """
    application = Application(
        package=package,
        verb=verb,
        description=description,
        presets=presets or {},
        examples=examples,
        own_flags=flags if flags is not None else absl_flags.FlagValues(),
        workdir=bool(presets) if workdir is None else workdir,
        accelerators=accelerators,
        several_processes=several_processes,
    )
    arguments = list(sys.argv[1:] if argv is None else argv)
    code, why = _guarded(application, main, arguments)
    others = peers.current()
    if others is not None and code:
        others.leave(code, why)
    if why:
        print(why, file=sys.stderr)
    if code:
        sys.exit(code)


def _guarded(application: Application, main: Main, arguments: list[str]) -> tuple[int, str]:
    """Runs the launcher; turns what ends it early into an exit code and a line that says why."""
    debug = "--debug" in arguments
    try:
        code = _execute(application, main, arguments)
        sys.stdout.flush()
        return code, ""
    except UserError as error:
        if debug:
            traceback.print_exc()
        return USER_ERROR, f"error: {' '.join(str(error).split())}"
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        return INTERRUPTED, "interrupted"
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            return 128 + 13, ""  # What the shell reports for a reader that left, as in `… | head`.
        others = peers.current()
        if others is None:
            raise
        explained = others.explain(error)
        if explained is None or debug:
            traceback.print_exc()
        return explained or (DEFECT, f"error: {traceback.format_exception_only(error)[-1].strip()}")


def _execute(application: Application, main: Main, arguments: list[str]) -> int:
    parsed = _parse(application, arguments)
    if parsed["help"].value:
        print(
            help_text(
                application.program,
                application.description,
                application.presets,
                parsed,
                application.examples,
            )
        )
        return 0
    config, preset = None, None
    if application.presets:
        preset = parsed["config"].value
        if preset is None:
            raise UserError(
                f"--config is missing: one of {', '.join(application.presets)}, or a .py file"
            )
        config = configs.load_config(preset, application.presets, parsed["set"].value or [])
    run = Run(
        config=config,
        preset=preset,
        workdir=_workdir(application, parsed, preset),
        command=shlex.join([*application.program.split(), *arguments]),
        debug=bool(parsed["debug"].value),
    )
    if application.accelerators:
        runtime.start(application.package, run.debug, alone=not application.several_processes)
    else:
        runtime.set_up_logging(application.package, run.debug)
    code = main(run) or 0
    others = peers.current()
    if others is not None and not code:
        others.finish()
    return code


def _workdir(
    application: Application, parsed: absl_flags.FlagValues, preset: str | None
) -> Path | None:
    if not application.workdir:
        return None
    given = parsed["workdir"].value
    if given:
        if "://" in given:
            raise UserError(f"--workdir={given}: give a folder of this machine or a mounted one")
        return Path(given).expanduser()
    tail = f"-{Path(preset).stem}" if preset else ""
    return Path("runs") / f"{application.package}-{application.verb}{tail}"


def _parse(application: Application, arguments: list[str]) -> absl_flags.FlagValues:
    """Parses the launcher's flags and the shared ones; `parsed[name].value` is what was given."""
    own, every = application.own_flags, absl_flags.FlagValues()
    for name in own:
        own[name].unparse()  # A second launch in one process starts from the defaults.
    _define_shared(application, every)
    every.append_flag_values(own)
    every.set_gnu_getopt(True)
    try:
        rest = every([application.program, *arguments])[1:]
    except absl_flags.UnrecognizedFlagError as error:
        given = f"--{error.flagname}"
        known = [f"--{name}" for name in every]
        raise UserError(f"unknown flag {given}{nearest(given, known)}") from error
    except absl_flags.Error as error:
        if every["help"].value:
            return every  # A flag that is required is not when help is asked for.
        missing = _REQUIRED.search(str(error))
        raise UserError(
            f"{missing[1]} is missing ({own[missing[1][2:]].help})" if missing else str(error)
        ) from error
    if rest:
        raise UserError(f"unexpected argument '{rest[0]}' (flags are written --name=value)")
    own.mark_as_parsed()
    return every


def _define_shared(application: Application, every: absl_flags.FlagValues) -> None:
    if application.presets:
        absl_flags.DEFINE_string(
            "config", None, "a preset, or the path of a .py file", flag_values=every
        )
        absl_flags.DEFINE_multi_string(
            "set", [], "field=value: overrides a field; may be repeated", flag_values=every
        )
    if application.workdir:
        absl_flags.DEFINE_string(
            "workdir", None, "the folder for all that the run writes", flag_values=every
        )
    absl_flags.DEFINE_bool("debug", False, "log more, show tracebacks", flag_values=every)
    absl_flags.DEFINE_bool("help", False, "show this", short_name="h", flag_values=every)


def _stdout_is_closed() -> bool:
    """Tells whether the reader of stdout left, and if so keeps Python quiet about it at exit."""
    try:
        descriptor = sys.stdout.fileno()
    except io.UnsupportedOperation:
        return False  # Not a stream of the system.
    poll = select.poll()
    poll.register(descriptor, 0)  # Errors are told without being asked for.
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True
