"""Frames of videos by time. [`~transformers.video_utils.load_video`] takes them by index, which is wrong at varying
rates, and does not notice a file that is cut off."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image

from ..image_reading import describe_image
from . import BadSample


def open_video(video: Any):
    """Open a video as a PyAV container, or raise [`BadSample`]."""
    try:
        import av
    except ImportError as error:
        raise ImportError(
            'Reading videos needs PyAV: pip install ".[video]" in the folder of metamorph_hf.'
        ) from error
    source = video
    if isinstance(video, Mapping):
        source = video.get("path") if video.get("bytes") is None else video["bytes"]
    if isinstance(source, (str, Path)) and "://" not in str(source) and not str(source).startswith("data:"):
        source = f"file:{source}"  # FFmpeg would take "http:host" and "concat:a|b" as more than names of files
    try:
        return av.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except (av.FFmpegError, OSError, ValueError, TypeError, AttributeError) as error:
        raise BadSample(f"has a video that cannot be read ({describe_image(video)}): {error}") from error


def video_seconds(video: Any) -> float | None:
    """Return a video's length in seconds, or None if its file does not state it."""
    with open_video(video) as container:
        return None if container.duration is None else container.duration / 1_000_000


def video_frames(video: Any, seconds: float, limit: int | None = None) -> list[PIL.Image.Image]:
    """
    Read at most `limit` frames: the first at or after 0, `seconds`, 2 `seconds` and so on.

    Raises:
        BadSample: If it cannot be read, has no frames, or ends before the length that its file states.
    """
    import av

    name, frames, index, first, end = describe_image(video), [], 0, None, 0.0
    with open_video(video) as container:
        if not container.streams.video:
            raise BadSample(f"has a video without images ({name}).")
        stream = container.streams.video[0]
        length = None if stream.duration is None else float(stream.duration * stream.time_base)
        if length is None and len(container.streams) == 1 and container.duration is not None:  # WebM
            length = container.duration / 1_000_000
        try:
            for frame in container.decode(stream):
                if frame.time is None:
                    continue
                first = frame.time if first is None else first
                end = frame.time + float((frame.duration or 0) * frame.time_base) - first
                time = frame.time - first + 1e-6  # so that rounding makes no frame too early
                if time >= index * seconds:
                    frames.append(frame.to_image())
                    index = max(index, int(time // seconds)) + 1
                if limit is not None and len(frames) == limit:
                    return frames
        except av.FFmpegError as error:
            raise BadSample(f"has a video that breaks off ({name}): {error}") from error
    if frames and length is not None and end < length - 2 / float(stream.average_rate or 1):  # FFmpeg only logs it
        raise BadSample(f"has a video that breaks off after {end:.1f} of {length:.1f} s ({name}).")
    if not frames:
        raise BadSample(f"has a video without frames ({name}).")
    return frames
