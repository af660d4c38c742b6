"""`benchmarks.nearest_centroid` on arrays of no size, without torch."""

import pytest

from benchmarks import nearest_centroid as benchmark


@pytest.fixture(autouse=True)
def without_torch(monkeypatch):
    monkeypatch.setattr(benchmark, "_torch_contenders", lambda x, c: {})


def test_writes_a_table_for_each_dtype(tmp_path, capsys):
    arguments = ["--shape", "40,20,8", "--repeats", "2", "--output", str(tmp_path)]
    assert benchmark.main(arguments) == 0
    text = (tmp_path / "nearest_centroid.md").read_text()
    assert text.count("| nearest_centroid (ours) |") == 2
    assert text.count("| JAX, full matrix |") == 2
    assert "## float32" in text
    assert "## bfloat16" in text


def test_refuses_to_time_something_else(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "full_matrix", lambda x, c: (x[:, 0], 2 + x[:, 0] ** 2))
    assert benchmark.main(["--shape", "40,20,8", "--output", str(tmp_path)]) == 2
    assert "JAX, full matrix finds something else" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--shape", "40,20"], "--shape needs"), (["--dtypes", "int8"], "--dtypes may hold")],
)
def test_mistakes_end_with_one_line(arguments, message, capsys):
    assert benchmark.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
