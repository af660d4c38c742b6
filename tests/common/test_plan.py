"""`python -m common.plan`: programs compiled for devices that need not be here."""

import json

import pytest

from common.plan import __main__ as command

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
    text = json.dumps(json.loads(out))
    assert "all-reduce" in text, "gradients of eight devices are summed"
    assert "NaN" not in text


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
