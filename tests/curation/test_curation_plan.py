"""What curation plans: a pass of every level compiles, and its notes add up."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from common.sharding import compile_for, topology
from common.sharding.program import Inference
from curation import config, greedy_seeding, plan
from curation.hierarchy import HierarchyConfig

KERNEL = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}


def test_smoke_programs_compile_and_divide_the_rows():
    programs = plan.programs(config.smoke(), jax.devices(), Inference())
    assert list(programs) == ["level1.assign", "level1.update", "level2.assign", "level2.update"]
    program = programs["level1.assign"]()
    text = program.lower("cpu").compile().as_text()
    assert "all-reduce" not in text, "sums meet once an iteration, not once a chunk"
    assert program.flops == 2.0 * program.items * 64 * 32
    assert "chunks" in program.notes[0]
    assert "all-reduce" in programs["level1.update"]().lower("cpu").compile().as_text()


def test_the_published_setting():
    programs = plan.programs(config.web(), jax.devices(), Inference())
    assert len(programs) == 8
    first, second = (programs[f"level{level}.assign"]() for level in (1, 2))
    assert any("divided into 100 each" in note for note in first.notes)
    assert any("9 more clusterings of 5,000,000 rows" in note for note in second.notes)
    assert "of 10,000,000 rows" in second.shape


@pytest.mark.compile
def test_a_level_fits_a_pod():
    target = topology("v5p:2x2x1")
    program = plan.programs(config.web(), target.devices, Inference())["level4.assign"]()
    compiled = program.lower("tpu").compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * 2**30


@pytest.mark.compile
@pytest.mark.parametrize("name", ["v5e:1x1", "h100:1"])
def test_a_pass_over_moved_centroids_compiles(name):
    target = topology(name)
    levels = HierarchyConfig(clusters=(1024, 100))
    pool = dataclasses.replace(config.smoke(), rows=65_536, width=256, memory=1.0, levels=levels)
    program = plan.programs(pool, target.devices, Inference())["level1.assign"]()
    assert program.arguments[-1] is not None, "the rows stay, rounded before"
    keywords = {**program.keywords, "most_moved": 256}
    text = (
        dataclasses.replace(program, keywords=keywords).lower(target.platform).compile().as_text()
    )
    assert KERNEL[target.platform] in text
    assert "[65536,1024]" not in text


@pytest.mark.compile
@pytest.mark.parametrize("name", ["v5e:1x1", "h100:1"])
@pytest.mark.parametrize("width", [2, 256])
def test_seeding_compiles(name, width):
    target = topology(name)
    alone = jax.sharding.SingleDeviceSharding(target.devices[0])
    key = jax.eval_shape(lambda: jax.random.key(0))
    operands = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=alone)
        for shape, dtype in (
            ((65_536, width), jnp.float32),
            ((65_536,), jnp.float32),
            ((1024,), jnp.int32),
            ((65_536,), jnp.float32),
            (key.shape, key.dtype),
            ((), jnp.int32),
            ((), jnp.int32),
        )
    ]
    steps = functools.partial(greedy_seeding._steps, candidates=8, drawn=8)
    assert "while" in compile_for(target, steps, *operands).as_text()
