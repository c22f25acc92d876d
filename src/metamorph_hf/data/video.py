"""Frames of videos, read by PyAV."""

import io
from collections.abc import Mapping
from typing import Any

import PIL.Image

from ..image_reading import BadSample, described


def open_video(video: Any):
    try:
        import av
    except ImportError as error:
        raise ImportError('Videos are read by PyAV: pip install "metamorph-hf[video]".') from error
    source = video
    if isinstance(video, Mapping):
        video = video["path"] if video.get("bytes") is None else video["bytes"]
    try:
        return av.open(io.BytesIO(video) if isinstance(video, bytes) else video)
    except (av.FFmpegError, OSError, ValueError, TypeError) as error:
        raise BadSample(f"has a video that cannot be read ({described(source)}): {error}") from error


def video_seconds(video: Any) -> float | None:
    """Length in seconds, if the file says it."""
    with open_video(video) as container:
        return None if container.duration is None else container.duration / 1_000_000


def video_frames(video: Any, seconds: float, limit: int | None = None) -> list[PIL.Image.Image]:
    """
    The first frame at or after 0, `seconds`, 2 `seconds` and so on, by the frames' own time stamps: a video's rate may
    change. At most `limit`.

    Raises:
        BadSample: if it cannot be read, has no frames, or ends before the length its file states.
    """
    import av

    frames, wanted, first, end = [], 0.0, None, 0.0
    with open_video(video) as container:
        if not container.streams.video:
            raise BadSample(f"has a video without pictures ({described(video)}).")
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
                if frame.time - first >= wanted - 1e-6:
                    frames.append(frame.to_image())
                    wanted += seconds * (1 + (frame.time - first - wanted) // seconds)
                if limit is not None and len(frames) == limit:
                    return frames
        except av.FFmpegError as error:
            raise BadSample(f"has a video that breaks off ({described(video)}): {error}") from error
    if frames and length is not None and end < length - 2 / float(stream.average_rate or 1):  # FFmpeg only logs it
        raise BadSample(f"has a video that breaks off after {end:.1f} of {length:.1f} s ({described(video)}).")
    if not frames:
        raise BadSample(f"has a video without frames ({described(video)}).")
    return frames


__all__ = ["video_frames", "video_seconds"]
