"""`python -m curation.embed`: embeddings of images or texts by any model of the workspace."""

import hashlib
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from common.checkpoint.fingerprint import fingerprints
from common.data.embedding_folder import FEATURES, EmbeddingFolder
from common.data.image_corpus import ImageConfig, open_images
from common.data.tokenizers import check_vocabulary, load_tokenizer
from common.errors import UserError
from common.launch import Run, launch
from common.sharding import make_mesh
from curation.embedding import ImageRows, TextRows, embed_images, embed_texts
from curation.inputs import open_texts

EXAMPLES = [
    "python -m curation.embed --package=dino --checkpoint=dinov2_vitl14_reg4_pretrain.pth "
    "--images=photos --output=runs/features",
    "python -m curation.embed --package=decoder --checkpoint=SmolLM2-135M --texts=pages.jsonl "
    "--output=runs/features --max_tokens=256",
    "python -m curation.embed --package=t5gemma --checkpoint=t5gemma-b-b-ul2 "
    "--texts=pages.parquet --output=runs/features --stored_dtype=float16",
]
# Models that belong to no paper, by the name that --package knows them under.
SHARED = {"decoder": "common.models.decoder_checkpoint"}
OPTIONS = flags.FlagValues()
_own: dict[str, Any] = {"flag_values": OPTIONS}
PACKAGE = flags.DEFINE_string(
    "package", None, "the model's: dino, recurrentgemma, t5gemma, …; decoder for Gemma, Llama and "
    "the like", required=True, **_own,
)  # fmt: skip
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "what to load: anything the package's load takes", required=True, **_own
)
IMAGES = flags.DEFINE_string("images", None, "a folder of images", **_own)
TEXTS = flags.DEFINE_string(
    "texts", None, "JSONL or Parquet with a field 'text', a file of lines, a folder of files, or "
    "'python' for its own library", **_own,
)  # fmt: skip
OUTPUT = flags.DEFINE_string(
    "output", None, "the folder to write; the same command goes on where it stopped",
    required=True, **_own,
)  # fmt: skip
SIZE = flags.DEFINE_integer("size", 224, "side of the square that is seen of an image", **_own)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 512, "that are read of a text", **_own)
BATCH = flags.DEFINE_integer("batch", 32, "items computed at a time, on all devices", **_own)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "compute dtype", **_own)
STORED_DTYPE = flags.DEFINE_enum(
    "stored_dtype", "float32", ["float32", "float16"], "dtype of features.npy", **_own
)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "a tokenizer's file, if not beside", **_own)


def load_model(package: str, checkpoint: str, **options: Any) -> Any:
    """Loads a model by the name of its package.

    Raises:
      UserError: there is no such package, or it has no models to load.
    """
    try:
        module = importlib.import_module(SHARED.get(package, package))
    except (ImportError, ValueError) as error:
        raise UserError(f"--package={package}: there is no such package") from error
    if not hasattr(module, "load") or package.split(".")[0] == __package__:
        raise UserError(f"--package={package}: it has no models to load")
    return module.load(checkpoint, **options)


def _main(run: Run) -> None:
    if (IMAGES.value is None) == (TEXTS.value is None):
        raise UserError("give --images or --texts, one of the two")
    for flag in (SIZE, MAX_TOKENS, BATCH):
        if flag.value < 1:
            raise UserError(f"--{flag.name} must be at least 1, not {flag.value}")
    mesh = make_mesh()
    model = load_model(PACKAGE.value, CHECKPOINT.value, dtype=DTYPE.value, mesh=mesh)
    if IMAGES.value is not None:
        if not (hasattr(model, "features") and hasattr(model, "normalize")):
            raise UserError(f"--package={PACKAGE.value} has no model for images: give --texts")
        pictures = open_images(ImageConfig(path=IMAGES.value, split="all"))
        image_rows = ImageRows(model, mesh, BATCH.value, SIZE.value)
        with _folder(run, model, pictures, image_rows.width) as folder:
            _finish(folder, embed_images(pictures, folder, image_rows, os.cpu_count() or 1))
        return
    if not (hasattr(model, "hidden") or hasattr(model, "encode")):
        raise UserError(f"--package={PACKAGE.value} has no model for texts: give --images")
    tokenizer = model.tokenizer if TOKENIZER.value is None else load_tokenizer(TOKENIZER.value)
    if tokenizer is None:
        raise UserError(
            f"there is no tokenizer beside {CHECKPOINT.value}: name one with --tokenizer"
        )
    check_vocabulary(tokenizer, model.vocab_size)
    texts = open_texts(TEXTS.value)
    longest = min(MAX_TOKENS.value, getattr(model, "max_length", None) or MAX_TOKENS.value)
    text_rows = TextRows(model, mesh, BATCH.value, longest)
    with _folder(run, model, texts, text_rows.width) as folder:
        _finish(folder, embed_texts(texts, folder, text_rows, tokenizer))


def _folder(run: Run, model: Any, source: Any, width: int) -> EmbeddingFolder:
    parameters = {
        "/".join(map(str, path)): value[...]
        for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    digest = hashlib.sha256(repr(sorted(fingerprints(parameters).items())).encode())
    settings = {
        "package": PACKAGE.value,
        "parameters": digest.hexdigest()[:16],
        "source": source.fingerprint(),
        "size": SIZE.value if IMAGES.value is not None else None,
        "max_tokens": MAX_TOKENS.value if TEXTS.value is not None else None,
        "dtype": DTYPE.value,
        "stored_dtype": STORED_DTYPE.value,
    }
    names = [source.describe(number) for number in range(len(source))]
    ones = np.ones(len(names), np.int64)
    return EmbeddingFolder(
        Path(OUTPUT.value).expanduser(),
        settings,
        names,
        ones,
        (width,),
        jnp.dtype(STORED_DTYPE.value),
    )


def _finish(folder: EmbeddingFolder, work: Any) -> None:
    from tqdm import tqdm

    if not folder.complete:
        with tqdm(total=len(folder.missing), unit="item", dynamic_ncols=True) as bar:
            for done in work:
                bar.update(done)
        if len(folder.failed) == len(folder.items):
            raise UserError(
                f"none of {len(folder.items):,} items can be read: {min(folder.failed.items())[1]}"
            )
        folder.finish()
    rows, failed = len(folder.items) - len(folder.failed), folder.failed
    print(f"written to {folder.path / FEATURES}\n{rows:,} rows; {len(failed):,} left out")
    for number in sorted(failed)[:10]:
        print(f"  {failed[number]}")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    launch(
        _main,
        package="curation",
        verb="embed",
        description="Embeddings of images or texts by any model of the workspace.",
        examples=EXAMPLES,
        flags=OPTIONS,
        argv=argv,
    )


if __name__ == "__main__":
    main()
