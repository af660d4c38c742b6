"""`python -m common.plan`: programs compiled for devices that need not be here."""

import json

import pytest

from common.plan import __main__ as command
from common.plan.measure import refused

SMOKE = ["--package=recurrentgemma", "--config=smoke", "--topology=cpu:8"]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = 0
    try:
        command.main([*arguments])
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.smoke
def test_a_training_step_as_json(capsys):
    code, out, _ = run(capsys, *SMOKE, "--program=train", "--json")
    assert code == 0
    report = json.loads(out)
    assert "NaN" not in out
    assert (report["package"], report["config"]) == ("recurrentgemma", "smoke")
    assert (report["topology"], report["devices"]) == ("cpu:8", 8)
    train = report["programs"]["train"]
    memory = train["memory"]
    assert 0 < memory["holds"]["parameters"] < memory["holds"]["optimizer"] < memory["peak"]
    assert train["flops"] > 0
    assert train["traffic"] > memory["holds"]["parameters"]
    assert "all-reduce" in {c["kind"] for c in train["collectives"]}, "gradients are summed"


@pytest.mark.parametrize(
    "beside", ["--table=a.md", "--table a.md", "--json", "--debug -table a.md"]
)
def test_the_command_is_what_was_planned(beside):
    planned = "python -m common.plan --package=t5gemma --set a=b"
    assert command._planned(f"{planned} {beside}") == planned


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--package=recurrentgema", *SMOKE[1:]], "recurrentgemma"),
        ([SMOKE[0], "--config=smoek", SMOKE[2]], "smoke"),
        ([*SMOKE[:2], "--topology=v5x:4x4"], "v5x"),
        ([*SMOKE[:2], "--topology=v5e"], "v5e:4x4"),
        ([*SMOKE, "--program=trian"], "train"),
        ([*SMOKE, "--set=model.widht=3"], "width"),
        ([*SMOKE, "--set=train.batch_size=9"], "9"),
        (SMOKE[:2], "--topology"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    lines = [line for line in err.splitlines() if " INFO " not in line]
    assert (code, out, len(lines)) == (2, "", 1)
    assert message in lines[0]


@pytest.mark.parametrize(
    ("text", "temporary", "peak"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory. Used 17.25G of 15.75G hbm.", None, 17.25 * 2**30),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (16.50G) exceeds available HBM (15.75G).",
            16.5 * 2**30,
            17.5 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: no room in scalar memory", None, None),
    ],
)
def test_what_a_refusal_says_of_memory(text, temporary, peak):
    assert refused(text, 2**30) == (temporary, peak)
