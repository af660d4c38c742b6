"""The corpus that comes with Python."""

import numpy as np
import pytest

from common.data.corpus import CorpusConfig, open_corpus
from common.data.python_corpus import PythonCorpus, docstrings
from common.data.sources import HealthyDocuments
from common.errors import UserError


@pytest.fixture
def library(tmp_path):
    files = {
        "b.py": '"""Module b."""\n\ndef f(x, *, y=1):\n    """Does f."""\n',
        "a.py": "x = 1\n",
        "pack/__init__.py": "",
        "pack/deep.py": 'class C(int):\n    """A class."""\n',
        "test/test_a.py": "assert True\n",
        "site-packages/foreign.py": "nope = 1\n",
        "__pycache__/c.py": "nope = 1\n",
        "config-3.11-x86/build.py": "nope = 1\n",
        "_sysconfigdata_linux.py": "nope = 1\n",
        "encodings/cp1.py": "table = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def described(source):
    return [source.describe(i) for i in range(len(source))]


def test_which_files_and_in_what_order(library):
    source = PythonCorpus(("source",), str(library))
    names = [text.split("'")[1].removeprefix(f"{library}/") for text in described(source)]
    assert names == ["a.py", "b.py", "pack/deep.py"]
    assert source[0] == "x = 1\n"
    tests = PythonCorpus(("tests",), str(library))
    assert [tests[i] for i in range(len(tests))] == ["assert True\n"]


def test_docstrings_are_rendered_with_signatures():
    source = '"""Top.\n\n    Indented."""\nclass C(int):\n    """A class."""\n'
    source += "    def m(self, x=1):\n        '''Says m.'''\n    def _p(self):\n        '''No.'''\n"
    assert docstrings(source, "pack/__init__.py") == (
        "Help on module pack\n\nTop.\n\nIndented.\n\nclass C(int)\n    A class.\n\n"
        "    m(self, x=1)\n        Says m.\n"
    )
    assert docstrings("x = 1", "a.py") == ""


def test_module_and_its_docstrings_share_a_key(library):
    both = PythonCorpus(("documentation", "source"), str(library))
    keys = dict(zip(described(both), both.keys().tolist()))
    path = str(library / "b.py")
    assert keys[f"{path!r} (docstrings)"] == keys[f"{path!r} (source)"]
    assert len(set(keys.values())) > len(keys) // 2


def test_damaged_sources_are_named(library):
    (library / "bad.py").write_bytes(b"# \xff\n")
    (library / "torn.py").write_bytes(b"def (\n")
    with pytest.raises(UserError, match=r"bad\.py"):
        list(HealthyDocuments(PythonCorpus(("source",), str(library))))
    reader = HealthyDocuments(PythonCorpus(("documentation",), str(library)), 2)
    list(reader)
    assert reader.skipped == 2


def test_fingerprint_sees_an_edit(library):
    before = PythonCorpus(root=str(library)).fingerprint()
    assert PythonCorpus(root=str(library)).fingerprint() == before
    (library / "a.py").write_text("x = 12\n")
    assert PythonCorpus(root=str(library)).fingerprint() != before


@pytest.mark.smoke
def test_the_real_library():
    train = open_corpus(CorpusConfig())
    heldout = open_corpus(CorpusConfig(split="heldout"))
    everything = open_corpus(CorpusConfig(split="all"))
    assert len(train) + len(heldout) == len(everything) > 500
    assert not np.intersect1d(train.keys(), heldout.keys()).size
    assert not any("site-packages" in text for text in described(everything))
    reader = HealthyDocuments(heldout, 0.01)
    texts = list(reader)
    assert reader.skipped == 0
    assert sum(map(len, texts)) > 100_000


def test_unknown_part():
    with pytest.raises(UserError, match="did you mean 'source'"):
        open_corpus(CorpusConfig(parts=("sources",)))
