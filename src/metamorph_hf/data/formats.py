"""
Families of data: those of the paper (section 4 and appendix) and a few more. docs/data.md shows a row of each.

A family is a function from a source's row to a record: `messages` in the standard chat form, and `images` in reading
order, in any form that [`read_image`] reads. `rng` chooses among our wordings; `resolve` makes a path one that may be
read. A row that does not fit raises [`BadSample`].
"""

import json
import math
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw

from ..image_reading import ImageReadError, describe_image, read_image
from ..processing_metamorph import IMAGE_TYPES, normalize_part
from . import BadSample
from .video import video_frames, video_seconds


Row = Mapping[str, Any]
Record = dict[str, Any]

WORDINGS = json.loads(Path(__file__).with_name("wordings.json").read_text(encoding="utf-8"))
VIDEO_KINDS = tuple(WORDINGS["video_prediction"])
LLAVA_ROLES = {"human": "user", "gpt": "assistant", **{role: role for role in ("user", "assistant", "system")}}
IMAGE_PART = {"type": "image"}
IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "jpeg")


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def build_record(question: list[dict], answer: list[dict], images: list) -> Record:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": images}


def require_column(row: Row, *names: str) -> Any:
    """Return the first of the columns that the row has."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise BadSample(f"has none of the columns {', '.join(names)}, but {', '.join(sorted(map(str, row)))}.")


def require_text(row: Row, *names: str) -> str:
    """Return the text of the first of the columns that the row has, without spaces around it."""
    text = require_column(row, *names)
    if not isinstance(text, str) or not text.strip():
        raise BadSample(f"has {str(text)[:100]!r} as its {names[0]}, expected a text.")
    return text.strip()


def resolve_path(file: Any, image_root: str | None = None, allow_remote: bool = False) -> Any:
    """Prepend `image_root` to a path, which must not lead out of it. Bytes, data URIs and images stay as they are."""
    if isinstance(file, Mapping) and not isinstance(file.get("bytes"), bytes):
        file = file.get("path")
    if isinstance(file, (bytes, Mapping, PIL.Image.Image)) or str(file).startswith("data:"):
        return file
    if not isinstance(file, (str, Path)):
        raise BadSample(f"has {type(file).__name__} in place of an image or a video, expected a path or bytes.")
    is_remote = "://" in str(file)
    if is_remote and not allow_remote:
        raise BadSample(f"has a file at {str(file)[:200]}: set allow_remote for its source to download files.")
    if is_remote or image_root is None:
        return str(file)
    path = os.path.join(image_root, file)
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(image_root)):
        raise BadSample(f"has the path {str(file)[:200]}, which leads out of image_root={image_root}.")
    return path


def as_list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def extract_images(messages: list) -> tuple[list, list]:
    """Replace image parts, as transformers or OpenAI's APIs write them, by `{"type": "image"}`; return the images."""
    replaced, images = [], []
    for message in messages:
        if isinstance(message, Mapping) and isinstance(message.get("content"), list):
            message = {**message, "content": list(message["content"])}
            for index, part in enumerate(message["content"]):
                if isinstance(part, Mapping) and str(part.get("type")) in IMAGE_TYPES:
                    part = normalize_part(part)
                    images += [part["image"]] if "image" in part else []
                    message["content"][index] = IMAGE_PART
        replaced.append(message)
    return replaced, images


def count_images(messages: list[Mapping[str, Any]]) -> int:
    """Count the image parts that [`extract_images`] left."""
    return sum(m["content"].count(IMAGE_PART) for m in messages if isinstance(m.get("content"), list))


def read_turns(row: Row, media: str = "<image>") -> list[dict[str, Any]]:
    """Convert `conversations` in LLaVA's form to messages, with an image part for each match of `media`."""
    turns, messages = require_column(row, "conversations"), []
    for turn in turns if isinstance(turns, list) else [turns]:
        role, value = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
        if not (isinstance(role, str) and role in LLAVA_ROLES and isinstance(value, str)):
            raise BadSample(f"has a turn that LLaVA's form does not know: {str(turn)[:100]}.")
        pieces = [piece for piece in re.split(f"({media})", value) if piece] or [""]
        content = [IMAGE_PART if re.fullmatch(media, piece) else text_part(piece) for piece in pieces]
        messages.append({"role": LLAVA_ROLES[role], "content": content})
    return messages


def chat(row: Row, rng: random.Random, resolve: Callable = resolve_path) -> Record:
    """Read TRL's columns. If all contents are plain strings, images go before the text of the first user message."""
    messages = require_column(row, "messages")
    if not isinstance(messages, list):
        raise BadSample(f"has messages of type {type(messages).__name__}, expected a list.")
    messages, within = extract_images(messages)
    given = [as_list(row[name]) for name in ("images", "image") if row.get(name) is not None]
    images = [resolve(image) for image in next(filter(None, given), within)]
    if images and messages and all(isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in messages):
        first = next((index for index, message in enumerate(messages) if message.get("role") == "user"), 0)
        content = [*[IMAGE_PART] * len(images), text_part(messages[first]["content"])]
        messages[first] = {**messages[first], "content": content}
    return {"messages": messages, "images": images, "tools": row.get("tools")}


def llava(row: Row, rng: random.Random, resolve: Callable = resolve_path) -> Record:
    """Read LLaVA's form (Cambrian-7M and many more): `<image>` may stand in any turn, and `image` is one or a list."""
    messages = read_turns(row)
    images = [] if row.get("image") is None else as_list(row["image"])
    return {"messages": messages, "images": [resolve(image) for image in images]}


def text_to_image(row: Row, rng: random.Random, resolve: Callable = resolve_path) -> Record:
    """Ask for the image of a `caption` (or `text`, `txt`); answer with `image` (or `jpg`, `png`, `webp`, `jpeg`)."""
    caption = require_text(row, "caption", "text", "txt").rstrip(". ")
    if not caption:
        raise BadSample("has a caption of dots alone, expected a text.")
    image = resolve(require_column(row, *IMAGE_COLUMNS))
    lead = rng.choice(WORDINGS["give_image"])
    question = [text_part(rng.choice(WORDINGS["ask_for_image"]).format(caption))]
    return build_record(question, [text_part(lead)] * bool(lead) + [IMAGE_PART], [image])


def reconstruction(row: Row, rng: random.Random, resolve: Callable = resolve_path) -> Record:
    """Ask to repeat an `image` (or `jpg`, `png`, `webp`, `jpeg`), and answer with it (RecA, arXiv 2509.07295)."""
    image = resolve(require_column(row, *IMAGE_COLUMNS))
    return build_record([IMAGE_PART, text_part(rng.choice(WORDINGS["repeat_image"]))], [IMAGE_PART], [image, image])


def image_to_image(row: Row, rng: random.Random, resolve: Callable = resolve_path) -> Record:
    """Edit `source` by `instruction` into `target`, under these or InstructPix2Pix's and Aurora's column names."""
    source = require_column(row, "source", "input_image", "original_image", "input")
    target = require_column(row, "target", "edited_image", "output_image", "output")
    question = [IMAGE_PART, text_part(require_text(row, "instruction", "edit_prompt", "edit", "prompt"))]
    return build_record(question, [IMAGE_PART], [resolve(source), resolve(target)])


def visual_thinking(row: Row, rng: random.Random, resolve: Callable = resolve_path, show: str = "crop") -> Record:
    """
    Answer a question after showing the part of the image that it is about (Visual CoT, V*): by `show`, a `"crop"` of
    the first of the `boxes` (or `bbox`, `bboxes`), or the image with all `"boxes"` in red and their `names`, if given.
    """
    if show not in ("crop", "boxes"):
        raise ValueError(f"show is {show!r}, expected 'crop' or 'boxes'.")
    try:
        image = read_image(resolve(require_column(row, "image")))
    except ImageReadError as error:
        raise BadSample(f"has a bad image. {error}") from error
    question, answer = require_text(row, "question"), require_text(row, "answer")
    boxes = as_list(require_column(row, "boxes", "bbox", "bboxes"))
    boxes = boxes if boxes and isinstance(boxes[0], (list, tuple)) else [boxes]
    for index, box in enumerate(boxes):
        is_box = isinstance(box, (list, tuple)) and len(box) == 4 and all(isinstance(n, (int, float)) for n in box)
        is_inside = is_box and 0 <= box[0] < box[2] <= image.width and 0 <= box[1] < box[3] <= image.height
        if not is_inside or max(box) <= 1 < max(image.size):  # shares of the image would be a pixel in its corner
            size = f"{image.width}x{image.height}"
            raise BadSample(f"has the box {box}, expected pixels [left, top, right, bottom] inside its {size} image.")
        left, top = int(box[0]), int(box[1])
        boxes[index] = (left, top, max(left + 1, round(box[2])), max(top + 1, round(box[3])))
    if show == "crop":
        shown = image.crop(boxes[0])
    else:
        names = as_list([""] * len(boxes) if row.get("names") is None else row["names"])
        if len(names) != len(boxes):
            raise BadSample(f"has {len(boxes)} boxes, but {len(names)} names.")
        shown, width = image.copy(), max(1, min(image.size) // 100)
        draw = PIL.ImageDraw.Draw(shown)
        for box, name in zip(boxes, names):
            draw.rectangle(box, outline="red", width=width)
            draw.text((box[0] + 2 * width, box[1] + 2 * width), str(name), fill="red")
    phrase = rng.choice(WORDINGS["think_visually"])
    ends_question = rng.random() < 0.5  # or it begins the answer
    asked = [IMAGE_PART, text_part(f"{question} {phrase}" if ends_question else question)]
    thought = [] if ends_question else [text_part(phrase)]
    return build_record(asked, [*thought, IMAGE_PART, text_part(answer)], [image, shown])


def video_qa(
    row: Row, rng: random.Random, resolve: Callable = resolve_path, fps: float = 1.0, max_frames: int = 32
) -> Record:
    """
    Read LLaVA's form with a `video` (VideoStar, ShareVideo). Its frames, `fps` per second but at most `max_frames`,
    replace the one `<video>` or `<image>`.
    """
    video = resolve(require_column(row, "video", "mp4", "webm"))
    messages = read_turns(row, "<image>|<video>")
    if (count := count_images(messages)) != 1:
        raise BadSample(f"has {count} places for its video in the conversation, expected one <video>.")
    frames = video_frames(video, max(1 / fps, (video_seconds(video) or 0) / max_frames))
    if len(frames) > max_frames:  # the file states no length, or a wrong one
        frames = [frames[round(index)] for index in np.linspace(0, len(frames) - 1, max_frames)]
    for message in messages:
        parts = [[part] * (len(frames) if part == IMAGE_PART else 1) for part in message["content"]]
        message["content"] = sum(parts, [])
    return {"messages": messages, "images": frames}


def video_prediction(
    row: Row,
    rng: random.Random,
    resolve: Callable = resolve_path,
    kinds: Sequence[str] = VIDEO_KINDS,
    min_seconds: float = 0.1,
    max_seconds: float = 10.0,
    max_frames: int = 12,
) -> Record:
    """
    Predict at most `max_frames` frames of a `video` (HowTo100M, SomethingSomethingV2), in one of the `kinds`. The
    question names their interval, between `min_seconds` and `max_seconds`, and at most half of the video.
    """
    if unknown := set(kinds) - set(VIDEO_KINDS):
        raise ValueError(f"kinds has {sorted(unknown)}, expected some of {', '.join(VIDEO_KINDS)}.")
    video = resolve(require_column(row, "video", "mp4", "webm"))
    name, length = describe_image(video), video_seconds(video)
    longest = min(max_seconds, math.floor(5 * (length or 0) - 1e-6) / 10)  # the third frame is before the end
    if longest < min_seconds:
        raise BadSample(f"has a video of unknown length, or too short for two intervals of {min_seconds} s ({name}).")
    seconds = round(rng.uniform(min_seconds, longest), 1)
    frames = video_frames(video, max(seconds, min_seconds), limit=max_frames)
    if len(frames) < 3:
        raise BadSample(f"has {len(frames)} frames {seconds} s apart, too few to predict any ({name}).")
    kind = rng.choice(list(kinds))
    if kind == "reverse":
        asked, answered = frames, frames[::-1]
    elif kind == "every_other":
        asked, answered = frames[::2], frames[1::2]
    elif kind == "reorder":
        asked, answered = rng.sample(frames, len(frames)), frames
    elif kind == "time_between":
        asked, answered = frames, []
    else:
        most = {"next_images": 3, "next_frames": len(frames) // 2, "split": len(frames) - 1}[kind]
        count = rng.randint(1, min(most, len(frames) - 1))
        asked, answered = frames[:-count], frames[-count:]
    images = "1 image" if len(answered) == 1 else f"{len(answered)} images"
    interval = "1 second" if seconds == 1 else f"{seconds:g} seconds"
    wording = rng.choice(WORDINGS["video_prediction"][kind]).format(seconds=interval, count=images)
    answer = [IMAGE_PART] * len(answered) or [text_part(interval)]
    return build_record([*[IMAGE_PART] * len(asked), text_part(wording)], answer, [*asked, *answered])


_families = (chat, llava, text_to_image, image_to_image, reconstruction, visual_thinking, video_qa, video_prediction)
FAMILIES: dict[str, Callable[..., Record]] = {family.__name__: family for family in _families}
