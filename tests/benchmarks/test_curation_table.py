"""`benchmarks.curation` on arrays of no size."""

import pytest

from benchmarks import curation as benchmark


@pytest.fixture(autouse=True)
def without_others(monkeypatch):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)


def test_writes_both_tables(tmp_path, capsys):
    arguments = ["--shape", "300,5,4", "--iterations", "2", "--repeats", "1"]
    assert benchmark.main([*arguments, "--output", str(tmp_path)]) == 0
    text = (tmp_path / "curation.md").read_text()
    assert text.count("| curation.kmeans (ours) |") == 2
    assert text.count("| scikit-learn KMeans |") == 2
    assert "MiniBatchKMeans" in text


def test_equal_quality_takes_as_few_iterations_as_end_no_higher(tmp_path, monkeypatch):
    x = benchmark.draw(300, 10, 4)
    reached = benchmark.curation.kmeans(x, 5, iterations=2, tolerance=0).inertia

    def starts(x, clusters, iterations=25):
        return {"other": lambda: reached * (1 + 1e-6)}

    monkeypatch.setattr(benchmark, "_faiss_starts", starts)
    arguments = ["--shape", "300,5,4", "--iterations", "2", "--repeats", "1"]
    assert benchmark.main([*arguments, "--output", str(tmp_path)]) == 0
    text = (tmp_path / "curation.md").read_text()
    assert "no higher than the best of them: 2;" in text
    assert text.count("| other |") == 2


def test_refuses_to_time_something_else(tmp_path, capsys, monkeypatch):
    same = {benchmark.OURS: lambda: 1.0, "other": lambda: 1.1}
    monkeypatch.setattr(benchmark, "_same_start", lambda *arguments: same)
    assert benchmark.main(["--shape", "300,5,4", "--output", str(tmp_path)]) == 2
    assert "ends elsewhere" in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["300,5", "5,300,4", "a,b,c"])
def test_shapes_that_make_no_sense(shape, capsys):
    assert benchmark.main(["--shape", shape]) == 2
    assert "--shape needs" in capsys.readouterr().err
