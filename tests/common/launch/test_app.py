"""The launchers' application: exit codes, one line for a mistake, help, flags, interrupts."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from common.errors import UserError
from common.launch import Run, app, launch, runtime

ROOT = Path(__file__).parents[3]


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    steps: int = 10


def smoke() -> Config:
    """Tiny: seconds on anything.

    More than a help text shows.
    """
    return Config()


OPTIONS = flags.FlagValues()
PROMPT = flags.DEFINE_multi_string("prompt", [], "text to continue", flag_values=OPTIONS)
TOP_K = flags.DEFINE_integer("top_k", None, "how many to draw from", flag_values=OPTIONS)


def start(main, *argv, **changes):
    arguments = {
        "package": "paper",
        "verb": "train",
        "description": "Trains.",
        "examples": ["python -m paper.train --config=smoke", "second", "third"],
        "presets": {"smoke": smoke},
        "flags": OPTIONS,
        "accelerators": False,
        "argv": argv,
    }
    launch(main, **(arguments | changes))


def never(run):
    pytest.fail("main must not be reached")


def exit_code(main, *argv, **changes):
    with pytest.raises(SystemExit) as exit_:
        start(main, *argv, **changes)
    return exit_.value.code


@pytest.mark.smoke
def test_main_gets_what_the_command_line_says():
    seen = []
    start(
        lambda run: seen.append((run, PROMPT.value, TOP_K.value)),
        "--config=smoke",
        "--set",
        "seed=3",
        "--workdir=runs/x",
        "--prompt=a b",
        "--prompt=c",
        "--top_k=4",
    )
    run, prompts, top_k = seen[0]
    assert isinstance(run, Run)
    assert (run.config, run.preset, run.workdir) == (Config(seed=3), "smoke", Path("runs/x"))
    assert (prompts, top_k) == (["a b", "c"], 4)
    assert run.command == (
        "python -m paper.train --config=smoke --set seed=3 --workdir=runs/x '--prompt=a b' "
        "--prompt=c --top_k=4"
    )


def test_a_second_launch_starts_from_the_defaults():
    seen = []
    for argv in (["--prompt=a", "--top_k=1"], []):
        start(lambda run: seen.append((PROMPT.value, TOP_K.value)), "--config=smoke", *argv)
    assert seen == [(["a"], 1), ([], None)]


def test_the_default_workdir_names_package_verb_and_preset():
    seen = []
    start(lambda run: seen.append(run.workdir), "--config=smoke")
    assert seen == [Path("runs/paper-train-smoke")]


def test_a_verb_without_presets_has_neither_config_nor_workdir(capsys):
    seen = []
    start(seen.append, presets=None)
    assert (seen[0].config, seen[0].workdir) == (None, None)
    assert exit_code(never, "--workdir=x", presets=None) == 2
    assert "unknown flag --workdir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--config is missing: one of smoke"),
        (["--config=smok"], "unknown preset 'smok'; did you mean 'smoke'?"),
        (["--confg=smoke"], "unknown flag --confg; did you mean '--config'?"),
        (["--config=smoke", "--set", "sed=1"], "unknown field 'sed'; did you mean 'seed'?"),
        (["--config=smoke", "--set=seed=x"], "seed: 'x' is not an int"),
        (["--config=smoke", "--top_k=x"], "flag --top_k=x"),
        (["--config"], "Missing value for flag --config"),
        (["--config=smoke", "extra"], "unexpected argument 'extra'"),
        (["extra", "--config=smoke"], "unexpected argument 'extra'"),
        (["--config=smoke", "--workdir=gs://bucket/run"], "give a folder of this machine"),
    ],
)
def test_a_users_mistake_is_one_line_and_code_2(capsys, argv, message):
    assert exit_code(never, *argv) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""


def test_a_user_error_from_anywhere(capsys):
    def main(run):
        raise UserError("the corpus\n  is empty")

    assert exit_code(main, "--config=smoke") == 2
    assert capsys.readouterr().err == "error: the corpus is empty\n"


def test_debug_shows_the_traceback(capsys):
    def main(run):
        raise UserError("no")

    assert exit_code(main, "--config=smoke", "--debug") == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: no\n")


def test_a_required_flag(capsys):
    options = flags.FlagValues()
    flags.DEFINE_string("from", None, "what to read", required=True, flag_values=options)
    assert exit_code(never, "--config=smoke", flags=options) == 2
    assert capsys.readouterr().err == "error: --from is missing (what to read)\n"
    start(never, "--help", flags=options)
    assert "--from=STRING" in capsys.readouterr().out


def test_a_defect_keeps_its_exception():
    def main(run):
        raise KeyError("defect")

    with pytest.raises(KeyError):
        start(main, "--config=smoke")


def test_mains_code_is_the_exit_code():
    assert exit_code(lambda run: 1, "--config=smoke") == 1
    start(lambda run: 0, "--config=smoke")


def test_an_interrupt_is_one_line_and_code_130(capsys):
    def main(run):
        raise KeyboardInterrupt

    assert exit_code(main, "--config=smoke") == app.INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


def test_a_broken_pipe_that_is_not_stdouts_is_a_defect():
    def main(run):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        start(main, "--config=smoke")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(capsys, flag):
    start(never, flag)
    out = capsys.readouterr().out
    for line in (
        "Trains.",
        "  smoke  Tiny: seconds on anything.",
        "  steps  int  10",
        "  --top_k=INT       how many to draw from",
        "  python -m paper.train --config=smoke",
        "  third",
    ):
        assert f"{line}\n" in out
    assert "More than a help text" not in out


PROGRAM = """
import sys
from common.launch import launch
def main(run):
    for i in range(100_000):
        print("line", i)
launch(main, package="paper", verb="list", description="Lists.", examples=[], accelerators=False)
if "jax" in sys.modules or "matplotlib" in sys.modules:
    sys.exit("heavy imports before they are needed")
"""


def run_program(command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PY": sys.executable, "PROGRAM": PROGRAM}
    return subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60
    )


def test_a_reader_that_leaves_is_quiet():
    done = run_program('"$PY" -c "$PROGRAM" | head -n 1; echo "${PIPESTATUS[0]}"')
    assert done.stdout == "line 0\n141\n"
    assert done.stderr == ""


def test_help_in_a_process_imports_nothing_heavy():
    done = run_program('"$PY" -c "$PROGRAM" --help')
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Lists.")


def test_error_in_a_process():
    done = run_program('"$PY" -c "$PROGRAM" --hlep')
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: unknown flag --hlep; did you mean '--help'?\n"


def test_a_prepared_run_logs_from_process_0_and_keeps_programs(tmp_path):
    program = PROGRAM.partition("def main")[0] + (
        "import logging, jax\n"
        "def main(run):\n"
        "    logging.getLogger('paper.model').info('informative')\n"
        "    logging.getLogger('orbax').info('noise')\n"
        "    jax.jit(lambda x: x)(1)\n"
        "    print(jax.config.jax_compilation_cache_dir)\n"
        "launch(main, package='paper', verb='run', description='', examples=[])\n"
    )
    environment = {
        key: value for key, value in os.environ.items() if "COMPILATION_CACHE" not in key
    } | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "informative" in done.stderr
    assert "noise" not in done.stderr
    assert done.stdout.startswith(str(tmp_path / "tenfold" / "jax"))


def test_an_environments_cache_folder_is_kept(monkeypatch):
    import jax

    assert runtime.use_compilation_cache() == Path(jax.config.jax_compilation_cache_dir)


def test_the_process_index_is_in_every_line_of_a_cluster(capsys):
    import logging

    try:
        runtime.set_up_logging("paper", process=3, processes=16)
        logging.getLogger("paper").info("not from here")
        logging.getLogger("paper").warning("trouble")
    finally:
        runtime.set_up_logging("paper")
    err = capsys.readouterr().err
    assert "WARNING [3/16] paper: trouble" in err
    assert "not from here" not in err
