"""One reader for every way to give an image, so that the same image means the same pixels everywhere."""

import base64
import io
import os
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch


class ImageReadError(ValueError):
    """An image that cannot be read. The message is a sentence that names it and gives the reason."""


def read_image(image: Any) -> PIL.Image.Image:
    """
    Read an image as RGB pixels: upright by its EXIF data, on white where it is transparent, 16 bits scaled to 8, and
    the first frame of an animation.

    Args:
        image: `PIL.Image.Image`, path, URL, data URI, base64 text, encoded bytes, a mapping of `bytes` and `path`, or
            an array or tensor of shape (H, W), (H, W, C) or (C, H, W) with C in 1, 3, 4, of uint8, uint16, or floats
            from 0 to 1.

    Raises:
        ImageReadError: If it is missing, broken, empty, too large for PIL's limit, or has values of unknown range.
    """
    name = describe_image(image)
    try:
        image = _open(image)
        if image.mode == "I" and image.format not in ("PNG", "PPM"):  # PIL reads 16 bits of these two as mode "I"
            raise ValueError('the range of 32-bit integers (mode "I") is unknown: convert them to mode "L" or "I;16"')
        image = PIL.ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            image = _from_array(np.asarray(image, np.float32 if image.mode == "F" else np.uint16))
        if 0 in image.size:
            raise ValueError(f"it has {image.width}x{image.height} pixels")
        if image.has_transparency_data:
            white = PIL.Image.new("RGBA", image.size, "white")
            image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    except Exception as error:  # decoders and networks raise anything for broken headers and addresses
        known = {FileNotFoundError: "the file does not exist", PIL.UnidentifiedImageError: "its format is unknown"}
        reason = str(known.get(type(error), error)).rstrip(".")
        raise ImageReadError(f"The image cannot be read ({name}): {reason}.") from error


def _open(image: Any) -> PIL.Image.Image:
    """Open an image in any form, without decoding it."""
    if isinstance(image, Mapping):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
        with urllib.request.urlopen(image, timeout=60) as response:
            image = response.read()
    elif isinstance(image, str) and not os.path.exists(image):
        try:
            return PIL.Image.open(io.BytesIO(base64.b64decode(image)))
        except (ValueError, PIL.UnidentifiedImageError) as error:
            raise FileNotFoundError(image) from error
    if isinstance(image, (bytes, str, Path)):
        return PIL.Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
    return image if isinstance(image, PIL.Image.Image) else _from_array(image)


def _from_array(pixels: np.ndarray | torch.Tensor) -> PIL.Image.Image:
    """Convert pixels in one of the layouts and value ranges that [`read_image`] takes."""
    is_tensor = isinstance(pixels, torch.Tensor)
    if not is_tensor and not isinstance(pixels, np.ndarray):
        raise TypeError(f"it is {type(pixels).__name__}, expected a path, URL, bytes, PIL image, array or tensor")
    if is_tensor:
        pixels = (pixels.float() if pixels.is_floating_point() else pixels).numpy(force=True)
    first, last = (pixels.ndim == 3 and pixels.shape[axis] in (1, 3, 4) for axis in (0, -1))
    if pixels.ndim != 2 and not first and not last:
        raise ValueError(f"its shape is {pixels.shape}, expected (H, W), (H, W, C) or (C, H, W) with C in 1, 3, 4")
    if first and (is_tensor or not last):  # both layouts are possible in a 3x64x3 tensor: torch's own wins
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.dtype.kind == "f" and ((pixels >= 0) & (pixels <= 1)).all():
        pixels = (pixels * 255).round().astype(np.uint8)
    elif pixels.dtype == np.uint16:
        pixels = (pixels / 257).round().astype(np.uint8)
    elif pixels.dtype != np.uint8:
        values = f"{pixels.dtype} values from {pixels.min():g} to {pixels.max():g}"
        raise ValueError(f"it has {values}, expected uint8, uint16 or floats from 0 to 1")
    return PIL.Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels)


def describe_image(image: Any) -> str:
    """Name an image or a video in a message: by its path or address if it has one, else by its type."""
    if isinstance(image, Mapping) and isinstance(image.get("path"), (str, Path)):
        image = image["path"]
    if not isinstance(image, (str, Path)):
        return type(image).__name__
    return str(image).partition(",")[0] if str(image).startswith("data:") else str(image)[:200]
