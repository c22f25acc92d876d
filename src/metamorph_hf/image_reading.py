"""One reader of images for every door: a path, URL, bytes, PIL image or array means the same pixels everywhere."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from transformers.image_utils import load_image


class BadSample(ValueError):
    """A sample that cannot be trained on: the reason, in a sentence."""


def read_image(image: Any) -> PIL.Image.Image:
    """
    An image as RGB pixels: decoded to its end, turned as its EXIF data say, on white where it is transparent, 16 bits
    scaled to 8, of an animation the first frame.

    Args:
        image: Path, URL, `PIL.Image.Image`, bytes, or what an [`~datasets.Image`] column holds undecoded.

    Raises:
        BadSample: if it is missing, broken, empty, or a decompression bomb (PIL's limit).
    """
    source = image
    try:
        if isinstance(image, Mapping):
            image = image["path"] if image.get("bytes") is None else image["bytes"]
        if isinstance(image, bytes):
            image = PIL.Image.open(io.BytesIO(image))
        elif isinstance(image, Path) or (isinstance(image, str) and os.path.isfile(image)):
            image = PIL.Image.open(image)
        if not isinstance(image, PIL.Image.Image):
            image = load_image(image)
        if image.mode.startswith("I"):  # PIL would cut 16 bits off at 255
            image = PIL.Image.fromarray((np.asarray(image, dtype=np.float32) / 257).round().astype(np.uint8))
        image = PIL.ImageOps.exif_transpose(image)
        if image.has_transparency_data:  # as image processors do
            image = image.convert("RGBA")
            image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    except PIL.Image.DecompressionBombError as error:
        raise BadSample(f"is too large to be safe ({described(source)}): {error}") from error
    except Exception as error:  # decoders and networks raise anything for broken headers and addresses
        raise BadSample(f"cannot be read ({described(source)}): {error}") from error
    if not image.width or not image.height:
        raise BadSample(f"is empty ({described(source)}): {image.width}x{image.height} pixels")
    return image


def described(image: Any) -> str:
    """What a message calls an image or a video: its path, never its bytes."""
    if isinstance(image, Mapping):
        image = image.get("path") or image.get("bytes")
    return str(image)[:200] if isinstance(image, (str, Path)) else type(image).__name__


__all__ = ["BadSample", "described", "read_image"]
