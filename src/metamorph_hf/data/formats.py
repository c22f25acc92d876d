"""
The families of data that the paper trains on (section 4 and appendix), as conversations with images.

A family is a function from a source's row to a record: `messages` in the standard chat form, and `images` in reading
order (paths, `PIL.Image.Image`, or values of an undecoded [`~datasets.Image`] column). The wordings are our own.
"""

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
from . import BadSample
from .video import video_frames, video_seconds


Row = Mapping[str, Any]
Record = dict[str, Any]

LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE_PART = {"type": "image"}
IMAGE_KEYS = ("image", "image_url", "url", "path", "base64")  # of parts that hold their image

ASK_FOR_IMAGE = (
    "Generate an image of {}.",
    "Draw {}.",
    "Create a picture of {}.",
    "Show me {}.",
    "Can you paint {}?",
    "I would like an image of {}, please.",
)
GIVE_IMAGE = ("Here is an image based on your request:", "Here you are:", "This is what I drew:", "")
THINK_VISUALLY = (
    "Let's think about this visually.",
    "Look closely at the part that matters first.",
    "Show what you are looking at, then answer.",
)
WORDINGS = {
    "next_frames": (
        "These frames are {seconds} apart. What do the next {count} look like?",
        "A video shows this, one frame every {seconds}. Continue it by {count}.",
        "Frames of a video, {seconds} from one to the next. Predict the following {count}.",
    ),
    "split": (
        "Here is the beginning of a video, a frame every {seconds}. Show how it goes on to its end.",
        "The first part of a video, frames {seconds} apart. Show the rest, {count} frames.",
    ),
    "reverse": (
        "Play these frames, {seconds} apart, backwards.",
        "Show these frames, which are {seconds} apart, in reverse order.",
    ),
    "every_other": (
        "Every other frame is missing. Show the {count} in between, {seconds} after each.",
        "Fill the gaps in this video: the {count} frames that come {seconds} after each of these.",
    ),
    "reorder": (
        "These frames are mixed up. They were {seconds} apart. Put them in order.",
        "Sort these frames of a video, {seconds} apart, by time.",
    ),
    "time_between": (
        "How much time lies between two of these frames?",
        "What is the interval between these frames, in seconds?",
    ),
    "next_images": (
        "What comes {seconds} later? Show {count}.",
        "Show the next {count}, {seconds} apart.",
    ),
}


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def build_messages(question: list[dict], answer: list[dict]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def require_column(row: Row, *names: str) -> Any:
    """Return the first of the columns that the row has."""
    if not isinstance(row, Mapping):
        raise BadSample(f"is {type(row).__name__}, expected an object with columns.")
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


def require_turns(row: Row) -> list[Mapping[str, Any]]:
    """Return the turns of a conversation in LLaVA's form."""
    turns = require_column(row, "conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadSample("has conversations that are not a list of turns.")
    for turn in turns:
        role, value = turn.get("from"), turn.get("value")
        if not (isinstance(role, str) and role in LLAVA_ROLES and isinstance(value, str)):
            raise BadSample(f"has a turn that LLaVA's form does not know: {str(dict(turn))[:100]}.")
    return turns


def resolve_path(file: Any, image_root: str | None = None, allow_remote: bool = False) -> Any:
    """
    Prepend `image_root` to the path of an image or a video. Bytes, data URIs and PIL images are returned as they are.

    Raises:
        BadSample: If the path leads out of `image_root`, or is an address although `allow_remote` is False.
    """
    if isinstance(file, Mapping) and not isinstance(file.get("bytes"), bytes):
        file = file.get("path")
    if not isinstance(file, (str, Path, bytes, Mapping, PIL.Image.Image)):
        raise BadSample(f"has {type(file).__name__} in place of an image or a video, expected a path or bytes.")
    if not isinstance(file, (str, Path)) or str(file).startswith("data:"):
        return file
    if "://" in str(file):
        if not allow_remote:
            raise BadSample(f"has a file at {str(file)[:200]}: set allow_remote for its source to download files.")
        return file
    if image_root is None:
        return str(file)
    path, root = os.path.abspath(os.path.join(image_root, file)), os.path.abspath(image_root)
    if os.path.commonpath([path, root]) != root:
        raise BadSample(f"has the path {str(file)[:200]}, which leads out of image_root={image_root}.")
    return os.path.join(image_root, file)


def as_list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def split_at_images(text: str) -> list[dict[str, str]]:
    """Split a text into parts at each `<image>`. Everything else is kept, line breaks included."""
    pieces = re.split("(<image>)", text)
    return [IMAGE_PART if piece == "<image>" else text_part(piece) for piece in pieces if piece] or [text_part("")]


def extract_images(messages: list) -> tuple[list, list]:
    """
    Replace image parts, as transformers or OpenAI's APIs write them, by `{"type": "image"}`.

    Returns:
        The messages, and the images that stood in the parts, in reading order.
    """
    images = []

    def replace(part: Any) -> Any:
        if not isinstance(part, Mapping) or part.get("type") not in ("image", "image_url", "input_image"):
            return part
        image = next((part[key] for key in IMAGE_KEYS if part.get(key) is not None), None)
        image = image["url"] if isinstance(image, Mapping) and "url" in image else image
        images.extend([] if image is None else [image])
        return IMAGE_PART

    replaced = []
    for message in messages:
        if isinstance(message, Mapping) and isinstance(message.get("content"), list):
            message = {**message, "content": [replace(part) for part in message["content"]]}
        replaced.append(message)
    return replaced, images


# ---- Families ----


def chat(row: Row, rng: random.Random, image_root: str | None = None, allow_remote: bool = False) -> Record:
    """
    Read `messages`, `images` (or a single `image`) and `tools` as TRL has them. Images may also stand in the parts of
    `messages`. If all contents are plain strings, the images go before the text of the first user message.
    """
    messages = require_column(row, "messages")
    if not isinstance(messages, list):
        raise BadSample(f"has messages of type {type(messages).__name__}, expected a list.")
    given = row["images"] if row.get("images") else row.get("image")
    messages, within = extract_images(messages)
    images = [resolve_path(image, image_root, allow_remote) for image in (within if given is None else as_list(given))]
    if images and all(isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in messages):
        first = next((index for index, message in enumerate(messages) if message.get("role") == "user"), 0)
        content = [*[IMAGE_PART] * len(images), text_part(messages[first]["content"])]
        messages[first] = {**messages[first], "content": content}
    return {"messages": messages, "images": images, "tools": row.get("tools")}


def llava(row: Row, rng: random.Random, image_root: str | None = None, allow_remote: bool = False) -> Record:
    """
    Read LLaVA's form (Cambrian-7M and many more): `conversations` of `from` (human, gpt, system) and `value` with
    `<image>` for each image, in answers too, and optionally `image`, one or a list.
    """
    messages = [
        {"role": LLAVA_ROLES[turn["from"]], "content": split_at_images(turn["value"])} for turn in require_turns(row)
    ]
    images = [] if row.get("image") is None else as_list(row["image"])
    return {"messages": messages, "images": [resolve_path(image, image_root, allow_remote) for image in images]}


def text_to_image(row: Row, rng: random.Random, image_root: str | None = None, allow_remote: bool = False) -> Record:
    """Ask for the image of a `caption` (or `text`, `txt`); answer with `image` (or `jpg`, `png`, `webp`, `jpeg`)."""
    caption = require_text(row, "caption", "text", "txt").rstrip(".")
    image = resolve_path(require_column(row, "image", "jpg", "png", "webp", "jpeg"), image_root, allow_remote)
    lead = rng.choice(GIVE_IMAGE)
    question = [text_part(rng.choice(ASK_FOR_IMAGE).format(caption))]
    return {"messages": build_messages(question, [text_part(lead)] * bool(lead) + [IMAGE_PART]), "images": [image]}


def image_to_image(row: Row, rng: random.Random, image_root: str | None = None, allow_remote: bool = False) -> Record:
    """Edit `source` by `instruction` into `target`, under these or InstructPix2Pix's and Aurora's column names."""
    source = require_column(row, "source", "input_image", "original_image", "input")
    target = require_column(row, "target", "edited_image", "output_image", "output")
    question = [IMAGE_PART, text_part(require_text(row, "instruction", "edit_prompt", "edit", "prompt"))]
    images = [resolve_path(image, image_root, allow_remote) for image in (source, target)]
    return {"messages": build_messages(question, [IMAGE_PART]), "images": images}


def visual_thinking(
    row: Row, rng: random.Random, image_root: str | None = None, allow_remote: bool = False, show: str = "crop"
) -> Record:
    """
    Answer a question after showing the part of the image that it is about (Visual CoT, V*), from `image`, `question`,
    `answer` and `boxes` (or `bbox`, `bboxes`): one or a list of [left, top, right, bottom] in pixels.

    Args:
        show (`str`):
            `"crop"` shows the part of the image in the first box, `"boxes"` the image with all boxes in red, labeled
            by `names` if the row has them (one per box).
    """
    if show not in ("crop", "boxes"):
        raise ValueError(f"show is {show!r}, expected 'crop' or 'boxes'.")
    try:
        image = read_image(resolve_path(require_column(row, "image"), image_root, allow_remote))
    except ImageReadError as error:
        raise BadSample(f"has a bad image. {error}") from error
    question, answer = require_text(row, "question"), require_text(row, "answer")
    boxes = as_list(require_column(row, "boxes", "bbox", "bboxes"))
    boxes = [check_box(box, image) for box in (boxes if boxes and isinstance(boxes[0], (list, tuple)) else [boxes])]
    if show == "crop":
        shown = image.crop(boxes[0])
    else:
        names = as_list(row.get("names") or [""] * len(boxes))
        if len(names) != len(boxes):
            raise BadSample(f"has {len(boxes)} boxes, but {len(names)} names.")
        shown = image.copy()
        draw, width = PIL.ImageDraw.Draw(shown), max(1, min(image.size) // 100)
        for box, name in zip(boxes, names):
            draw.rectangle(box, outline="red", width=width)
            draw.text((box[0] + 2 * width, box[1] + 2 * width), str(name), fill="red")
    phrase = rng.choice(THINK_VISUALLY)
    if rng.random() < 0.5:  # the phrase ends the question or begins the answer
        question, thought = f"{question} {phrase}", []
    else:
        thought = [text_part(phrase)]
    messages = build_messages([IMAGE_PART, text_part(question)], [*thought, IMAGE_PART, text_part(answer)])
    return {"messages": messages, "images": [image, shown]}


def check_box(box: Any, image: PIL.Image.Image) -> tuple[int, int, int, int]:
    """Round a box to whole pixels after checking that it lies inside the image."""
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(isinstance(n, (int, float)) for n in box):
        raise BadSample(f"has the box {box}, expected [left, top, right, bottom] in pixels.")
    left, top, right, bottom = box
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        raise BadSample(f"has the box {list(box)}, which is not inside its {image.width}x{image.height} image.")
    left, top = int(left), int(top)
    return left, top, max(left + 1, round(right)), max(top + 1, round(bottom))


def video_qa(
    row: Row,
    rng: random.Random,
    image_root: str | None = None,
    allow_remote: bool = False,
    fps: float = 1.0,
    max_frames: int = 32,
) -> Record:
    """
    Read LLaVA's form with a `video` (VideoStar, ShareVideo). Its frames replace the one `<video>` or `<image>`.

    Args:
        fps (`float`): Frames per second of the video, fewer in one so long that they would exceed `max_frames`.
        max_frames (`int`): Largest number of frames.
    """
    video = resolve_path(require_column(row, "video", "mp4", "webm"), image_root, allow_remote)
    turns = [{**turn, "value": turn["value"].replace("<video>", "<image>")} for turn in require_turns(row)]
    if (count := sum(turn["value"].count("<image>") for turn in turns)) != 1:
        raise BadSample(f"has {count} places for its video in the conversation, expected one <video>.")
    frames = video_frames(video, max(1 / fps, (video_seconds(video) or 0) / max_frames))
    if len(frames) > max_frames:  # the file states no length, or a wrong one
        frames = [frames[round(index)] for index in np.linspace(0, len(frames) - 1, max_frames)]
    turns = [{**turn, "value": turn["value"].replace("<image>", "<image>" * len(frames))} for turn in turns]
    return {"messages": llava({"conversations": turns}, rng)["messages"], "images": frames}


def video_prediction(
    row: Row,
    rng: random.Random,
    image_root: str | None = None,
    allow_remote: bool = False,
    kinds: Sequence[str] = tuple(WORDINGS),
    min_seconds: float = 0.1,
    max_seconds: float = 10.0,
    max_frames: int = 12,
) -> Record:
    """
    Predict frames of a `video` (HowTo100M, SomethingSomethingV2), taken at a random interval that the question names.

    Args:
        kinds (`list[str]`):
            Keys of `WORDINGS`, one of which is chosen: the next frames, the rest after a split, all backwards, every
            other one, the right order, the time between two of them, or the next 1 to 3 images.
        min_seconds, max_seconds (`float`): Limits of the interval, which is also at most half of the video.
        max_frames (`int`): Largest number of frames.
    """
    if unknown := set(kinds) - set(WORDINGS):
        raise ValueError(f"kinds has {sorted(unknown)}, expected some of {', '.join(WORDINGS)}.")
    video = resolve_path(require_column(row, "video", "mp4", "webm"), image_root, allow_remote)
    name, length = describe_image(video), video_seconds(video)
    if length is None:
        raise BadSample(f"has a video of unknown length ({name}).")
    longest = min(max_seconds, length / 2)
    if longest < min_seconds:
        raise BadSample(f"has a video too short for two intervals of {min_seconds} s ({name}).")
    seconds = round(rng.uniform(min_seconds, longest), 1)
    frames = video_frames(video, max(seconds, min_seconds), limit=max_frames)
    if len(frames) < 3:
        raise BadSample(f"has {len(frames)} frames {seconds} s apart, too few to predict any ({name}).")
    kind = rng.choice(list(kinds))
    order = list(range(len(frames)))
    if kind == "reverse":
        asked, answered = order, order[::-1]
    elif kind == "every_other":
        asked, answered = order[::2], order[1::2]
    elif kind == "reorder":
        asked, answered = rng.sample(order, len(order)), order
    elif kind == "time_between":
        asked, answered = order, []
    else:
        most = {"next_images": 3, "next_frames": len(order) // 2, "split": len(order) - 1}[kind]
        count = rng.randint(1, min(most, len(order) - 1))
        asked, answered = order[:-count], order[-count:]
    images = "1 image" if len(answered) == 1 else f"{len(answered)} images"
    interval = "1 second" if seconds == 1 else f"{seconds:g} seconds"
    wording = rng.choice(WORDINGS[kind]).format(seconds=interval, count=images)
    question = [*[IMAGE_PART] * len(asked), text_part(wording)]
    answer = [IMAGE_PART] * len(answered) or [text_part(interval)]
    return {"messages": build_messages(question, answer), "images": [frames[index] for index in [*asked, *answered]]}


_families = (chat, llava, text_to_image, image_to_image, visual_thinking, video_qa, video_prediction)
FAMILIES: dict[str, Callable[..., Record]] = {family.__name__: family for family in _families}


__all__ = ["FAMILIES", "BadSample", "extract_images"]
