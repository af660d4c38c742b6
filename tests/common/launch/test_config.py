"""Configurations: overrides by type, what is refused and how, JSON, differences, Python files."""

import dataclasses
import enum
import json
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.launch import config as configs


class Remat(enum.Enum):
    NONE = "none"
    FULL = "full"


@dataclasses.dataclass(frozen=True)
class Text:
    path: Path = Path("corpus.txt")
    repeat: bool = False


@dataclasses.dataclass(frozen=True)
class Tokens:
    count: int = 8


@dataclasses.dataclass(frozen=True)
class Model:
    width: int = 32
    heads: int = 4
    act: Literal["relu", "gelu"] = "gelu"
    dropout: float | None = None
    pattern: tuple[str, ...] = ("recurrent", "attention")
    window: tuple[int, int] = (8, 0)
    remat: Remat = Remat.NONE

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")


@dataclasses.dataclass(frozen=True)
class Average:
    decay: float = 0.999


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    name: str = "run"
    limit: int | str = 3
    model: Model = Model()
    data: Text | Tokens = Text()
    average: Average | None = None

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError("seed: give 0 or more")


def smoke() -> Config:
    """Tiny."""
    return Config()


PRESETS = {"smoke": smoke, "2b": lambda: Config(model=Model(width=2560, heads=10))}


def value_at(config: Any, field: str) -> Any:
    for part in field.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=7", 7),
        ("seed=1e3", 1000),
        ("seed=1_000", 1000),
        ("name=a=b", "a=b"),
        ("name=", ""),
        ("limit=5", 5),
        ("limit=most", "most"),
        ("model.act=relu", "relu"),
        ("model.dropout=1e-3", 0.001),
        ("model.dropout=1", 1.0),
        ("model.dropout=inf", float("inf")),
        ("model.dropout=none", None),
        ("model.pattern=a,b,c", ("a", "b", "c")),
        ("model.pattern=()", ()),
        ("model.pattern=one,", ("one",)),
        ("model.window=(1, 2)", (1, 2)),
        ("model.remat=FULL", Remat.FULL),
        ("model.remat=full", Remat.FULL),
        ("data.path=x/y", Path("x/y")),
        ("data.repeat=yes", True),
        ("data=Tokens", Tokens()),
        ("average.decay=0.5", 0.5),
        ("average=Average", Average()),
    ],
)
def test_override(override, expected):
    config = configs.load_config("smoke", PRESETS, [override])
    value = value_at(config, override.partition("=")[0])
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1.5", "seed: '1.5' is not an int"),
        ("seed=1.5e3", "seed: '1.5e3' is not an int"),
        ("seed=true", "seed: 'true' is not an int"),
        ("seed=-1", "seed: give 0 or more"),
        ("sead=1", "unknown field 'sead'; did you mean 'seed'?"),
        ("width=64", "unknown field 'width'; did you mean 'model.width'?"),
        ("model.widht=64", "unknown field 'model.widht'; did you mean 'model.width'?"),
        ("seed.x=1", "unknown field 'seed.x': 'seed' has no fields; did you mean 'seed'?"),
        ("model=big", "'model' is a group of fields: set one of model.width"),
        ("model.width=33", "model: width 33 is not a multiple of heads 4"),
        ("model.act=rely", "'rely' is none of relu, gelu; did you mean 'relu'?"),
        ("model.dropout=nan", "model.dropout: 'nan' is not a float|none"),
        ("model.dropout=much", "model.dropout: 'much' is not a float|none"),
        ("model.window=1,2,3", "model.window: '1,2,3' is not (int,int)"),
        ("model.window=1,x", "model.window: 'x' is not an int"),
        ("model.remat=half", "'half' is none of"),
        ("data=Bytes", "'data' is a group of fields: set data=Text or data=Tokens"),
        ("data.repeat=maybe", "data.repeat: 'maybe' is not a bool"),
        ("data.count=1", "unknown field 'data.count'"),
        ("seed", "--set takes field=value, not 'seed'"),
        ("=3", "--set takes field=value, not '=3'"),
    ],
)
def test_refused_override(override, message):
    with pytest.raises(UserError) as error:
        configs.load_config("smoke", PRESETS, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_overrides_are_validated_together_and_the_last_counts():
    overrides = ["model.width=66", "model.heads=3", "seed=1", "seed=2"]
    config = configs.load_config("smoke", PRESETS, overrides)
    assert (config.model.width, config.model.heads, config.seed) == (66, 3, 2)


def test_choice_of_a_union_and_its_fields_in_one_command():
    config = configs.load_config("smoke", PRESETS, ["data=Tokens", "data.count=3"])
    assert config.data == Tokens(3)


def test_the_preset_itself_is_untouched():
    config = Config()
    configs.apply_overrides(config, ["model.width=64"])
    assert config == Config()


def test_unknown_preset():
    with pytest.raises(UserError, match=r"unknown preset 'smokee'; did you mean 'smoke'\?.*2b"):
        configs.load_config("smokee", PRESETS)


@pytest.mark.parametrize("name", ["config", "anything"])
def test_python_file(tmp_path, name):
    path = tmp_path / "mine.py"
    path.write_text(
        f"from {Config.__module__} import Config\nimport math\n\ndef _private(): pass\n\n"
        f"def {name}():\n    return Config(seed=5)\n"
    )
    assert configs.load_config(str(path), PRESETS, ["name=x"]) == Config(seed=5, name="x")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def config():\n    return 3\n", "returns int, not Config"),
        ("def config():\n    return 1 / 0\n", "raised ZeroDivisionError"),
        ("def config(:\n", "raised SyntaxError"),
        ("x = 1\n", "needs a function config()"),
        ("def a(): pass\ndef b(): pass\n", "needs a function config()"),
    ],
)
def test_refused_python_file(tmp_path, source, message):
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(UserError) as error:
        configs.load_config(str(path), PRESETS)
    assert message in str(error.value)


def test_missing_python_file():
    with pytest.raises(UserError, match=r"there is no file 'nowhere\.py'"):
        configs.load_config("nowhere.py", PRESETS)


models = st.builds(
    Model,
    width=st.integers(1, 99).map(lambda n: 4 * n),
    act=st.sampled_from(["relu", "gelu"]),
    dropout=st.none() | st.floats(allow_nan=False),
    pattern=st.lists(st.text(max_size=5), max_size=3).map(tuple),
    window=st.tuples(st.integers(), st.integers()),
    remat=st.sampled_from(Remat),
)
config_strategy = st.builds(
    Config,
    seed=st.integers(0, 10**20),
    name=st.text(max_size=10),
    limit=st.integers() | st.text(max_size=5),
    model=models,
    data=st.builds(Text, path=st.just(Path("a/b")), repeat=st.booleans()) | st.builds(Tokens),
    average=st.none() | st.builds(Average, decay=st.floats(0, 1)),
)


@settings(max_examples=100, deadline=None)
@given(config_strategy)
def test_json_round_trip(config):
    text = configs.to_json(config)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert configs.from_json(Config, text) == config
    assert configs.diff(config, configs.from_json(Config, text)) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(sed=1), "config.json: unknown field 'sed'; did you mean 'seed'?"),
        (lambda d: d.pop("seed"), "config.json: missing field 'seed'"),
        (lambda d: d["model"].pop("act"), "config.json: missing field 'model.act'"),
        (lambda d: d["model"].update(width=32.0), "model.width: 32.0 is not an int"),
        (lambda d: d["model"].update(width=True), "model.width: True is not an int"),
        (lambda d: d["model"].update(width=33), "model: width 33 is not a multiple"),
        (lambda d: d["model"].update(window=[1]), "model.window: [1] is not a (int,int)"),
        (lambda d: d["model"].update(remat="x"), "model.remat: 'x' is not"),
        (lambda d: d["model"].update(act="x"), "model.act: 'x' is not"),
        (lambda d: d.update(model=3), "model: 3 is not"),
        (lambda d: d["data"].pop("class"), "'data' needs \"class\", one of Text, Tokens"),
    ],
)
def test_refused_json(change, message):
    data = configs.to_dict(Config())
    change(data)
    with pytest.raises(UserError) as error:
        configs.from_json(Config, json.dumps(data))
    assert message in str(error.value)


def test_text_that_is_not_json():
    with pytest.raises(UserError, match=r"run/config\.json is not JSON"):
        configs.from_json(Config, "{", where="run/config.json")


def test_diff_names_dotted_fields():
    other = Config(seed=1, model=Model(width=64), data=Tokens(), average=Average())
    found = configs.diff(Config(), other)
    assert found["seed"] == (0, 1)
    assert found["model.width"] == (32, 64)
    assert found["data.class"] == ("Text", "Tokens")
    assert found["data.count"] == ("absent", 8)
    assert found["average"] == (None, {"decay": 0.999})


def test_leaves_show_types_and_values():
    rows = {name: (kind, value) for name, kind, value in configs.leaves(Config())}
    assert rows["model.width"] == ("int", 32)
    assert rows["model.act"] == ("relu|gelu", "gelu")
    assert rows["model.dropout"] == ("float|none", None)
    assert rows["model.window"] == ("(int,int)", (8, 0))
