"""`benchmarks.curation_large` at no size: killed, taken up again, and checked."""

import pytest

from benchmarks import curation_large as benchmark


@pytest.mark.slow
def test_killed_and_taken_up_again(tmp_path, capsys):
    size = ["--shape", "20000,60,32", "--iterations", "5", "--memory", "0.0005"]
    arguments = [*size, "--folder", str(tmp_path), "--output", str(tmp_path / "results")]
    assert benchmark.main(arguments) == 0
    text = (tmp_path / "results" / "curation_large.md").read_text()
    assert "killed by SIGKILL" in text
    assert "of 2000 rows 0 have another centroid" in text
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


@pytest.mark.parametrize("shape", ["10", "10,20,3", "a,b,c"])
def test_mistakes_end_with_one_line(shape, tmp_path, capsys):
    assert benchmark.main(["--shape", shape, "--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "--shape needs" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
