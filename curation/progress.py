"""A progress bar for work that comes in blocks."""

from collections.abc import Iterator
from contextlib import contextmanager

from curation.similarity import Progress


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """Gives a function that shows (done, in all) with rate and time left on standard error."""
    from tqdm import tqdm

    with tqdm(desc=what, unit="block", dynamic_ncols=True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
