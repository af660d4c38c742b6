"""The original release's formats: the flax tree as an Orbax folder; torch is in tests/parity."""

import numpy as np
import pytest
from flax import nnx

import recurrentgemma
from common.checkpoint import export_tensors
from common.errors import UserError
from recurrentgemma.convert import release_rows
from recurrentgemma.model import Griffin, GriffinConfig

CONFIG = GriffinConfig(
    vocab_size=48,
    width=16,
    mlp_width=24,
    num_heads=2,
    lru_width=32,
    num_layers=5,
)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A release folder and the model that it was made from."""
    import orbax.checkpoint as ocp

    model = Griffin(CONFIG, rngs=nnx.Rngs(3))
    tensors = export_tensors(nnx.to_pure_dict(nnx.state(model)), release_rows(CONFIG))
    tree: dict = {}
    for name, values in tensors.items():
        *path, leaf = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = values()
    assert "blocks.4" in tree  # the release's keys have a dot in them
    folder = tmp_path_factory.mktemp("release") / "2b"
    ocp.PyTreeCheckpointer().save(folder, {"params": tree})
    return folder, model


def test_load_infers_the_shape(release):
    folder, model = release
    loaded = recurrentgemma.load(folder)
    assert loaded.config == CONFIG
    assert loaded.stop_tokens == (1,)
    tokens = np.arange(12)[None]
    np.testing.assert_array_equal(loaded(tokens), model(tokens))


def test_load_onto_a_mesh(release):
    from common.sharding import MeshConfig, make_mesh

    folder, model = release
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    loaded = recurrentgemma.load(folder, mesh=mesh)
    kernel = loaded.units.blocks[0].mixer.linear_x.kernel[...]
    assert {s.data.shape for s in kernel.addressable_shards} == {(1, 4, 16)}
    expected = model.units.blocks[0].mixer.linear_x.kernel[...]
    np.testing.assert_array_equal(kernel, expected)


def test_bf16_parameters(release):
    folder, model = release
    loaded = recurrentgemma.load(folder, dtype="bfloat16")
    assert loaded.embed.table[...].dtype == "bfloat16"
    assert loaded.config.dtype == "bfloat16"
    tokens = np.arange(12)[None]
    exact = model(tokens)
    assert np.abs(loaded(tokens) - exact).mean() < 0.05 * np.abs(exact).mean()


def test_another_models_tree_is_refused(tmp_path):
    import orbax.checkpoint as ocp

    ocp.PyTreeCheckpointer().save(tmp_path / "x", {"params": {"dense": {"kernel": np.ones(3)}}})
    with pytest.raises(UserError, match="not a RecurrentGemma"):
        recurrentgemma.load(tmp_path / "x")
