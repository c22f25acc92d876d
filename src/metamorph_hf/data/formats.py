"""
Every kind of data the paper trains on (section 4, appendix), as conversations with images.

A family is a function from a source's row to a record: `messages` in the standard chat form, `images` in reading order
(paths, `PIL.Image.Image`, or what an undecoded [`~datasets.Image`] column holds). Wordings are this package's own.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw

from ..image_reading import BadSample, described, read_image
from .video import video_frames, video_seconds


Row = Mapping[str, Any]
Record = dict[str, Any]

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


def image_parts(count: int) -> list[dict[str, str]]:
    return [{"type": "image"} for _ in range(count)]


def turns(question: list[dict], answer: list[dict]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def needed(row: Row, *names: str) -> Any:
    """The first of the columns that the row has."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise BadSample(f"has none of the columns {', '.join(names)}, but {', '.join(sorted(map(str, row)))}.")


def located(image: Any, root: str | None) -> Any:
    return str(Path(root) / image) if root is not None and isinstance(image, str) and "://" not in image else image


def in_list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


# ---- Families ----


def chat(row: Row, rng: random.Random, image_root: str | None = None) -> Record:
    """`messages` and `images` as TRL has them, or text alone. Of string contents, the first holds all images."""
    given = row["images"] if row.get("images") else row.get("image")  # a single one, in some datasets
    images = [] if given is None else [located(image, image_root) for image in in_list(given)]
    messages = needed(row, "messages")
    if not isinstance(messages, list):
        raise BadSample(f"has messages of type {type(messages).__name__}, expected a list.")
    if images and all(isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in messages):
        first = next((place for place, message in enumerate(messages) if message.get("role") == "user"), 0)
        messages = [dict(message) for message in messages]
        messages[first]["content"] = [*image_parts(len(images)), text_part(messages[first]["content"])]
    return {"messages": messages, "images": images}


def llava(row: Row, rng: random.Random, image_root: str | None = None) -> Record:
    """
    LLaVA's form (Cambrian-7M and many more): `conversations` of `from` (human, gpt, system) and `value` with `<image>`
    where images stand, `image` a path or a list of them. Text alone, too. Images may stand in answers.
    """
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
    images = [located(image, image_root) for image in in_list(row["image"])] if row.get("image") is not None else []
    conversations = needed(row, "conversations")
    if not isinstance(conversations, list) or not all(isinstance(turn, Mapping) for turn in conversations):
        raise BadSample("has conversations that are no list of turns.")
    messages = []
    for turn in conversations:
        if turn.get("from") not in roles or not isinstance(turn.get("value"), str):
            raise BadSample(f"has a turn that LLaVA's form does not know: {str(dict(turn))[:100]}.")
        messages.append({"role": roles[turn["from"]], "content": split_at_images(turn["value"])})
    return {"messages": messages, "images": images}


def split_at_images(text: str) -> list[dict[str, str]]:
    """Parts of a text in which `<image>` stands for an image; the rest stays as it is, line breaks included."""
    parts = []
    for number, piece in enumerate(text.split("<image>")):
        parts += image_parts(1) if number else []
        parts += [text_part(piece)] if piece else []
    return parts or [text_part("")]


def text_to_image(row: Row, rng: random.Random, image_root: str | None = None) -> Record:
    """`caption` (or `text`, `txt`) and `image` (or `jpg`, `png`, `webp`): words ask for it, the image answers."""
    caption = needed(row, "caption", "text", "txt")
    if not isinstance(caption, str) or not caption.strip():
        raise BadSample(f"has the caption {caption!r}, expected a text.")
    caption = caption.strip().rstrip(".")
    image = located(needed(row, "image", "jpg", "png", "webp", "jpeg"), image_root)
    lead = rng.choice(GIVE_IMAGE)
    question = [text_part(rng.choice(ASK_FOR_IMAGE).format(caption))]
    return {"messages": turns(question, [text_part(lead)] * bool(lead) + image_parts(1)), "images": [image]}


def image_to_image(row: Row, rng: random.Random, image_root: str | None = None) -> Record:
    """InstructPix2Pix, Aurora: `source` (or `input_image`), `instruction` and `target` (or `edited_image`...)."""
    source = located(needed(row, "source", "input_image", "original_image", "input"), image_root)
    target = located(needed(row, "target", "edited_image", "output_image", "output"), image_root)
    instruction = needed(row, "instruction", "edit_prompt", "edit", "prompt")
    if not isinstance(instruction, str) or not instruction.strip():
        raise BadSample(f"has the instruction {instruction!r}, expected a text.")
    question = [*image_parts(1), text_part(instruction.strip())]
    return {"messages": turns(question, image_parts(1)), "images": [source, target]}


def visual_thinking(row: Row, rng: random.Random, image_root: str | None = None, show: str = "crop") -> Record:
    """
    Visual CoT and V*: the answer first shows what it looks at. `image`, `question`, `answer` and `boxes` (or `bbox`):
    [left, top, right, bottom] in pixels, one or a list; for `show="boxes"` also `names`, one a box.

    Args:
        show (`str`): `"crop"`, the part of the picture in the first box, or `"boxes"`, the picture with all boxes and
            names drawn in red.
    """
    if show not in ("crop", "boxes"):
        raise ValueError(f"show is {show!r}, expected 'crop' or 'boxes'.")
    image = read_image(located(needed(row, "image"), image_root))
    question, answer = needed(row, "question"), needed(row, "answer")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise BadSample("has a question or an answer that is no text.")
    boxes = needed(row, "boxes", "bbox", "bboxes")
    boxes = [checked_box(box, image) for box in (boxes if boxes and isinstance(boxes[0], (list, tuple)) else [boxes])]
    if show == "crop":
        shown = image.crop(boxes[0])
    else:
        names = row.get("names") or [""] * len(boxes)
        if len(names) != len(boxes):
            raise BadSample(f"has {len(boxes)} boxes, but {len(names)} names.")
        shown = image.copy()
        draw, width = PIL.ImageDraw.Draw(shown), max(1, min(image.size) // 100)
        for box, name in zip(boxes, names):
            draw.rectangle(box, outline="red", width=width)
            draw.text((box[0] + 2 * width, box[1] + 2 * width), str(name), fill="red")
    phrase = rng.choice(THINK_VISUALLY)
    ask_first = rng.random() < 0.5  # the phrase opens the question or the answer
    question = [*image_parts(1), text_part(f"{question.strip()} {phrase}" if ask_first else question.strip())]
    thought = [] if ask_first else [text_part(phrase)]
    return {
        "messages": turns(question, [*thought, *image_parts(1), text_part(answer.strip())]),
        "images": [image, shown],
    }


def checked_box(box: Any, image: PIL.Image.Image) -> tuple[int, int, int, int]:
    if not isinstance(box, Sequence) or len(box) != 4 or not all(isinstance(n, (int, float)) for n in box):
        raise BadSample(f"has the box {box}, expected [left, top, right, bottom] in pixels.")
    left, top, right, bottom = box
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        raise BadSample(f"has the box {list(box)}, which is not inside its {image.width}x{image.height} picture.")
    left, top = int(left), int(top)
    return left, top, max(left + 1, round(right)), max(top + 1, round(bottom))


def video_qa(
    row: Row, rng: random.Random, image_root: str | None = None, fps: float = 1.0, max_frames: int = 32
) -> Record:
    """
    VideoStar, ShareVideo: LLaVA's form with `video` in the place of `image`. Frames are taken `fps` times a second, in
    a long video so much less often that `max_frames` cover it. They stand where `<video>` or `<image>` does.
    """
    video = located(needed(row, "video", "mp4", "webm"), image_root)
    seconds = max(1 / fps, (video_seconds(video) or 0) / max_frames)
    frames = video_frames(video, seconds)
    if len(frames) > max_frames:  # of a file that states no length, or a wrong one
        frames = [frames[round(place)] for place in np.linspace(0, len(frames) - 1, max_frames)]
    places, conversations = 0, []
    for turn in needed(row, "conversations"):
        value = turn.get("value") if isinstance(turn, Mapping) else None
        if isinstance(value, str):
            value = value.replace("<video>", "<image>")
            places += value.count("<image>")
            turn = {**turn, "value": value.replace("<image>", "<image>" * len(frames))}
        conversations.append(turn)
    if places != 1:
        raise BadSample(f"has {places} places for its video in the conversation, expected one <video>.")
    return {"messages": llava({"conversations": conversations}, rng)["messages"], "images": frames}


def video_prediction(
    row: Row,
    rng: random.Random,
    image_root: str | None = None,
    kinds: Sequence[str] = tuple(WORDINGS),
    min_seconds: float = 0.1,
    max_seconds: float = 10.0,
    max_frames: int = 12,
) -> Record:
    """
    HowTo100M, SomethingSomethingV2: frames of `video` at a random interval, named in the question, and one of the
    tasks of `WORDINGS`: the next frames, the rest after a split, backwards, every other one, put in order, the time
    between them, the next 1 to 3 images. An answer always holds at least one image, or the time.
    """
    if unknown := set(kinds) - set(WORDINGS):
        raise ValueError(f"kinds has {sorted(unknown)}, expected some of {', '.join(WORDINGS)}.")
    video = located(needed(row, "video", "mp4", "webm"), image_root)
    length = video_seconds(video)
    if length is None:
        raise BadSample(f"has a video of unknown length ({described(video)}).")
    longest = min(max_seconds, length / 2)
    if longest < min_seconds:
        raise BadSample(f"has a video too short for two intervals of {min_seconds} s ({described(video)}).")
    seconds = round(rng.uniform(min_seconds, longest), 1)
    frames = video_frames(video, max(seconds, min_seconds), limit=max_frames)
    if len(frames) < 3:
        raise BadSample(f"has {len(frames)} frames {seconds} s apart, too few to predict any ({described(video)}).")
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
    question = rng.choice(WORDINGS[kind]).format(seconds=interval, count=images)
    answer = image_parts(len(answered)) or [text_part(interval)]
    messages = turns([*image_parts(len(asked)), text_part(question)], answer)
    return {"messages": messages, "images": [frames[place] for place in [*asked, *answered]]}


FAMILIES: dict[str, Callable[..., Record]] = {
    "chat": chat,
    "llava": llava,
    "text_to_image": text_to_image,
    "image_to_image": image_to_image,
    "visual_thinking": visual_thinking,
    "video_qa": video_qa,
    "video_prediction": video_prediction,
}


__all__ = ["FAMILIES"]
