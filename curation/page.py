"""A web page of clusters: what is in them, how much of it, and some of what was selected."""

import base64
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.data.files import write_atomically

Show = Callable[[int], str]
_THUMBNAIL = 112  # pixels of the longer side
_CHARACTERS = 280  # of a text
_STYLE = (
    "body{font:14px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;"
    "color:#222;background:#fff}h2{font-size:1rem;margin:1.6rem 0 .4rem}h2 small{color:#666;"
    "font-weight:normal}.items{display:flex;flex-wrap:wrap;gap:6px}figure{margin:0;max-width:20rem}"
    "img{display:block;max-width:112px;max-height:112px}figcaption{font-size:11px;color:#666}"
    "blockquote{margin:0;padding:.4rem .6rem;background:#f4f4f4;font-size:12px}"
)


class Group(NamedTuple):
    """A cluster of the page: its name, points before and after, and rows to show."""

    name: str
    before: int
    after: int
    rows: Sequence[int]


def sampled_groups(
    labels: np.ndarray, selected: np.ndarray, *, groups: int = 24, each: int = 12, seed: int = 0
) -> list[Group]:
    """Clusters of all sizes, evenly by rank, with random ones of their selected points.

    Args:
      labels: the cluster of every point, int64 [N].
      selected: row numbers.
      groups, each: how many clusters and how many points of each, at most.
      seed: of the choice.
    """
    rng = np.random.default_rng(seed)
    before = np.bincount(labels)
    rows = np.unique(selected)
    after = np.bincount(labels[selected], minlength=len(before))
    ordered = np.argsort(-before, kind="stable")[: np.count_nonzero(before)]
    places = np.unique(np.linspace(0, len(ordered) - 1, min(groups, len(ordered))).astype(int))
    found = []
    for cluster in ordered[places]:
        inside = rows[labels[rows] == cluster]
        chosen = np.sort(rng.choice(inside, min(each, len(inside)), replace=False))
        counts = int(before[cluster]), int(after[cluster])
        found.append(Group(f"cluster {cluster}", *counts, chosen.tolist()))
    return found


def write_page(path: Path, title: str, groups: Sequence[Group], show: Show) -> None:
    """Writes one HTML file that needs no other.

    Args:
      path: of the file.
      title: of the page.
      groups: in the order of the page.
      show: gives the HTML of one row; `image_html` and `text_html` make such.
    """
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
    ]
    for group in groups:
        parts.append(
            f"<h2>{html.escape(group.name)} <small>{group.before:,} points, {group.after:,} "
            "selected</small></h2><div class='items'>"
        )
        parts += [f"<figure>{show(row)}</figure>" for row in group.rows]
        parts.append("</div>")
    write_atomically(path, "\n".join([*parts, "</html>", ""]).encode())


def image_html(image: np.ndarray, caption: str) -> str:
    """A thumbnail, in the page itself, of an image uint8 [H, W, 3]."""
    picture = Image.fromarray(image)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    data = base64.b64encode(file.getvalue()).decode()
    name = html.escape(caption)
    return f"<img src='data:image/jpeg;base64,{data}' alt='{name}' title='{name}'>"


def text_html(text: str, caption: str) -> str:
    """The beginning of a text."""
    short = text[:_CHARACTERS] + ("…" if len(text) > _CHARACTERS else "")
    return (
        f"<blockquote>{html.escape(short)}</blockquote>"
        f"<figcaption>{html.escape(caption)}</figcaption>"
    )
