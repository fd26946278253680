"""An image file → verified RGB bytes to store, and the hashes by which copies of it are found."""

from __future__ import annotations

import hashlib
import io
import itertools
import warnings
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

# Formats that every reader of the shards decodes, and the extension under which each is stored.
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
# A JPEG with further pictures behind it (stereo, previews), as phones write them: every decoder shows the first.
MULTI_PICTURE = "MPO"
MAX_PIXELS = 100_000_000
JPEG_QUALITY = 95
# By area, as img2dataset shrinks: free of moiré, and three times as fast as Lanczos.
SHRINKING = Image.Resampling.BOX
HASH_SIDE = 8
# Shorter side from which hashes are taken.
HASHED_SIDE = 64
ORIENTATION = 0x0112


class BadImage(ValueError):  # noqa: N818 (it describes an image, not a failure of ours)
    """An image that cannot be used; the message is the reason under which it is counted."""


@dataclass(frozen=True)
class StoredImage:
    """What goes into a shard.

    Attributes:
        data, extension: the encoded RGB image.
        width, height: of it; original_width, original_height: of the file, as it is meant to be seen.
        sha256: of `data`; original_sha256: of the file.
        perceptual_hash: 64 bits in hex: whether brightness grows from each of 8 × 8 cells to the next.
        thumbnail: 8 × 8 RGB pixels, 192 bytes.
    """

    data: bytes
    extension: str
    width: int
    height: int
    original_width: int
    original_height: int
    sha256: str
    original_sha256: str
    perceptual_hash: str
    thumbnail: bytes


def prepare(data: bytes, resize: int | None) -> StoredImage:
    """Check, orient, convert, and if need be shrink an image.

    Args:
        data: the file's bytes; their type is read from them, not from a name.
        resize: pixels of the shorter side, never enlarged; None keeps the file's bytes where they are already an
            upright RGB image.

    Raises:
        BadImage: empty, not JPEG, PNG or WebP, over 100 megapixels, animated, or undecodable.
    """
    if not data:
        raise BadImage("empty_file")
    with warnings.catch_warnings():
        # Broken EXIF warns, image by image; and the pixel limit is ours, checked before a pixel is decoded.
        warnings.simplefilter("ignore")
        image = _open(data)
        size = image.size
        if resize is None and image.mode == "RGB":
            # Every byte of a JPEG is read, but fewer pixels are made of them, where only hashes are taken. (An image
            # that has to be turned or converted is decoded again below.)
            image.draft("RGB", (HASHED_SIDE, HASHED_SIDE))
        ready = _decode(image)
        if image.size != size and ready is not image:
            image = _open(data)
            ready = _decode(image)
    original_width, original_height = size if ready is image else ready.size
    if resize and min(ready.size) > resize:
        scale = resize / min(ready.size)
        ready = ready.resize((round(ready.width * scale), round(ready.height * scale)), SHRINKING)
    original_sha256 = hashlib.sha256(data).hexdigest()
    if ready is image:
        stored, extension = data, EXTENSIONS.get(str(image.format), "jpg")
    else:
        buffer = io.BytesIO()
        ready.save(buffer, "JPEG", quality=JPEG_QUALITY)
        stored, extension = buffer.getvalue(), "jpg"
    perceptual_hash, thumbnail = looks(ready)
    return StoredImage(
        data=stored,
        extension=extension,
        width=original_width if stored is data else ready.width,
        height=original_height if stored is data else ready.height,
        original_width=original_width,
        original_height=original_height,
        sha256=original_sha256 if stored is data else hashlib.sha256(stored).hexdigest(),
        original_sha256=original_sha256,
        perceptual_hash=perceptual_hash,
        thumbnail=thumbnail,
    )


def looks(image: Image.Image) -> tuple[str, bytes]:
    """The difference hash (dHash) of an RGB image, 8 × 8 comparisons of neighbouring cells as 16 hex digits, and its
    thumbnail of 8 × 8 RGB pixels."""
    # Whole pixels are averaged first, which is fast; the last of them are cut by the image's edge.
    factor = max(1, min(image.size) // HASHED_SIDE)
    small, box = image.reduce(factor), (0, 0, image.width / factor, image.height / factor)
    cells = small.resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX, box=box)
    thumbnail = small.resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX, box=box)
    pixels = cells.convert("L").tobytes()
    bits = 0
    for row in range(HASH_SIDE):
        line = pixels[row * (HASH_SIDE + 1) : (row + 1) * (HASH_SIDE + 1)]
        for left, right in itertools.pairwise(line):
            bits = bits << 1 | (right > left)
    return f"{bits:0{HASH_SIDE * HASH_SIDE // 4}x}", thumbnail.tobytes()


def _open(data: bytes) -> Image.Image:
    """Read the header: type by content, size within the limit, one picture."""
    try:
        image = Image.open(io.BytesIO(data), formats=list(EXTENSIONS))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise BadImage("not_an_image") from None
    if image.width * image.height > MAX_PIXELS:
        raise BadImage("too_many_pixels")
    if image.format != MULTI_PICTURE and getattr(image, "n_frames", 1) > 1:
        raise BadImage("animated")
    return image


def _decode(image: Image.Image) -> Image.Image:
    """Upright RGB pixels; the image itself where it already is that."""
    try:
        upright = image.getexif().get(ORIENTATION, 1) == 1
        image.load()
        return _to_rgb(image if upright else ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, EOFError):
        raise BadImage("undecodable") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB pixels; 16-bit greys are scaled, and what is transparent becomes white."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        return image.convert("I").point(lambda value: value / 256).convert("L").convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
