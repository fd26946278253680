"""A small page of pictures with what is said of them; it holds them whole, so that no network is needed to see them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from PIL import Image
from rich.console import Console
from rich.markup import escape

from data_prep.manifest import write_atomically

TEMPLATES = Path(__file__).parent.parent / "templates"
SIDE = 240


@dataclass(frozen=True)
class Shown:
    """One picture of the page.

    Attributes:
        score: what it is there for.
        caption: what is said of it.
        place: where it lies.
        image: RGB.
    """

    score: float
    caption: str
    place: str
    image: Image.Image

    @property
    def thumbnail(self) -> str:
        """As an address that holds it whole."""
        return embedded(self.image)


def write(
    path: Path,
    title: str,
    shown: Iterable[Shown],
    *,
    query: Image.Image | None = None,
    texts: Sequence[tuple[float, str]] = (),
) -> None:
    """Write a page.

    Args:
        path: of the .html file.
        title: of the page, and its first line.
        shown: the pictures, in order.
        query: the picture that was asked for.
        texts: (score, caption) of what is only said.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("pictures.html")
    html = page.render(title=title, query=embedded(query) if query else None, shown=list(shown), texts=texts)
    write_atomically(path, html.encode("utf-8", "replace"))


def embedded(image: Image.Image, side: int = SIDE) -> str:
    """A picture, shrunk to `side` pixels at the most, as an address that holds it whole."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return address(buffer.getvalue(), "jpeg")


def address(data: bytes, kind: str) -> str:
    """An encoded picture as an address that holds it whole."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def say(console: Console, path: Path) -> None:
    """Print where a page is; terminals that know links open it at a click."""
    address = path.resolve()
    console.print(f"[link={address.as_uri()}]{escape(str(address))}[/link]", soft_wrap=True, highlight=False)
