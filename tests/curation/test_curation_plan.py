"""What curation plans: a pass of every level compiles, and its notes add up."""

import jax
import pytest

from common.sharding import topology
from common.sharding.program import Inference
from curation import config, plan


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
