"""Numbers of the reference code, fp32 (specification, 2.9), through an original checkpoint."""

import numpy as np
import pytest
from golden_backbone import SIZES, images, shapes, tensors
from torch_writer import write_tensors

import dino

pytestmark = pytest.mark.usefixtures("highest_precision")

# Size, H, W; class token [1, :4]; last patch [1, -1, :3]; mean of all patches' absolute values.
GOLDEN = """
base      56 56  -0.627173  0.186907  0.303455 -1.531484  1.418178 -0.606527 -0.381844  0.907128
base      28 42  -0.575108  0.269143  0.087045 -1.274912  0.215684  0.688699  0.692297  0.811467
base      84 70  -0.603254  0.275149  0.110295 -1.318400  0.799840  0.981927  0.305842  0.811309
registers 56 56  -0.642152  0.202917  0.290417 -1.529460  1.417699 -0.605692 -0.382837  0.907133
registers 28 42  -0.620577  0.291209  0.099019 -1.320372  0.184200  0.738244  0.733503  0.810635
registers 84 70  -0.614962  0.281769  0.111489 -1.328158  0.803441  0.991264  0.309146  0.811505
swiglu    56 56   1.139855 -1.009040 -0.345255 -1.078522  1.464846 -0.641895 -0.394877  0.907190
swiglu    28 42   1.124751 -0.776138 -0.706238 -0.477110  1.667620  0.230416  0.275601  0.809025
swiglu    84 70   1.127044 -0.798792 -0.685546 -0.590940  1.993479  0.583601 -0.143341  0.818592
"""


@pytest.mark.parametrize("size", SIZES)
def test_features(size, tmp_path):
    config = SIZES[size]
    file = write_tensors(tmp_path / "golden.pth", tensors(config))
    model = dino.load(file, num_heads=config.num_heads)
    rows = [row.split() for row in GOLDEN.splitlines() if row.startswith(size)]
    assert len(rows) == 3
    for _, high, wide, *expected in rows:
        height, width = int(high), int(wide)
        found = model.features(images(height, width))
        numbers = [
            *np.asarray(found.cls[1, :4]),
            *np.asarray(found.patches[1, -1, :3]),
            np.abs(found.patches).mean(),
        ]
        np.testing.assert_allclose(numbers, np.asarray(expected, float), atol=2e-5, rtol=0)
        assert found.registers.shape == (2, config.registers, 24)
        assert found.patches.shape == (2, height * width // 14**2, 24)


def test_published_numbers_of_tensors():
    assert [len(shapes(dino.MODELS[f"vit{size}14"]())) for size in "sblg"] == [175, 175, 343, 567]
    assert [len(shapes(dino.MODELS[f"vit{size}14_reg"]())) for size in "sg"] == [176, 568]
    assert len(shapes(dino.MODELS["vitl16"]())) == 343
    assert dino.MODELS["vitl16"]().num_parameters() == 304_199_680
