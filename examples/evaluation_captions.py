"""Captions and real pictures for `evaluate_generation.py`: from a JSONL file, the emoji, or COCO."""

import argparse
import json
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from PIL import Image, ImageOps

from metamorph_hf.image_reading import ImageReadError, read_image


sys.path.append(str(Path(__file__).parent / "emoji"))
from emoji_pictures import PARQUET  # noqa: E402
from emoji_tasks import EmojiTasks  # noqa: E402


COCO_CAPTIONS = Path("annotations") / "captions_val2014.json"
COCO_COUNT = 30_000


@dataclass
class Row:
    """A caption to paint, or a picture to reconstruct: `image` is what `read_image` takes."""

    id: str
    caption: str
    image: Any = None

    def reference(self, size: tuple[int, int] | None = None) -> Image.Image:
        """The real picture: its centre square, or cropped and resized to (width, height)."""
        try:
            image = read_image(self.image)
        except ImageReadError as error:
            sys.exit(f"The image of {self.id!r} cannot be read. {error}")
        return ImageOps.fit(image, size or (min(image.size),) * 2, Image.Resampling.BICUBIC)


def read_jsonl(path: Path, task: str) -> list[Row]:
    if not path.is_file():
        sys.exit(f"The captions file {path} does not exist: give a JSONL file, emoji, emoji-held-out or coco-30k.")
    rows, needed = [], "image" if task == "reconstruct" else "caption"
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:  # no JSON, or no UTF-8
            sys.exit(f"{place}, is not JSON: {error}.")
        if not isinstance(entry, dict) or not isinstance(entry.get(needed), str) or not entry[needed].strip():
            sys.exit(f'{place}, has no {needed}: --task {task} needs {{"{needed}": "..."}} in every line.')
        if not all(isinstance(entry.get(field, ""), str) for field in ("caption", "image")):
            sys.exit(f"{place}: caption and image must be strings.")
        image = path.parent / entry["image"] if "image" in entry else None
        if image is not None and not image.is_file():
            sys.exit(f"{place}: the image {image} does not exist.")
        name = str(entry.get("id", number))
        if not re.fullmatch(r"\w[\w.-]*", name):
            sys.exit(f"{place}: the id {name!r} names a file, so it may have letters, digits, '_', '-' and '.' only.")
        rows.append(Row(name, entry.get("caption", ""), image))
    if rows and (most := Counter(row.id for row in rows).most_common(1)[0])[1] > 1:
        sys.exit(f"{path} has the id {most[0]!r} {most[1]} times: ids must be unique.")
    if len({row.image is None for row in rows}) > 1:
        sys.exit(f"{path} has images in some lines only: give one in every line, or in none.")
    return rows


def read_emoji(held_out: bool) -> list[Row]:
    """Google's drawings, or 200 of Twitter's: the emoji visualizer was trained on Google's alone."""
    dataset = Dataset.from_parquet(str(PARQUET))
    rows = dataset.cast_column("image", datasets.Image(decode=False)).to_list()
    tasks = EmojiTasks(rows)
    places = tasks.google
    if held_out:
        places = [tasks.index["twitter", base, ""] for base in sorted(tasks.held_out_drawings)]
    return [Row(f"{rows[i]['vendor']}-{rows[i]['unified']}", rows[i]["name"], rows[i]["image"]) for i in places]


def read_coco(folder: Path | None) -> list[Row]:
    """30,000 of the 40,504 pictures of COCO 2014 val, and for each one of its captions, both drawn with seed 0."""
    if folder is None or not (folder / COCO_CAPTIONS).is_file():
        sys.exit(
            f"coco-30k needs --coco FOLDER, which holds {COCO_CAPTIONS} (of annotations_trainval2014.zip) and "
            "val2014/ (of val2014.zip), both from cocodataset.org."
        )
    content = json.loads((folder / COCO_CAPTIONS).read_text(encoding="utf-8"))
    captions: dict[int, list[str]] = {}
    for entry in sorted(content["annotations"], key=lambda entry: entry["id"]):
        captions.setdefault(entry["image_id"], []).append(" ".join(entry["caption"].split()))
    files = {entry["id"]: folder / "val2014" / entry["file_name"] for entry in content["images"]}
    rng = random.Random(0)
    chosen = rng.sample(sorted(captions), min(COCO_COUNT, len(captions)))
    rows = [Row(str(image), rng.choice(captions[image]), files[image]) for image in chosen]
    if missing := [row.image for row in rows if not row.image.is_file()]:
        sys.exit(f"{len(missing)} of the {len(rows)} COCO images do not exist, the first is {missing[0]}.")
    return rows


def read_rows(args: argparse.Namespace) -> list[Row]:
    if args.captions in ("emoji", "emoji-held-out"):
        rows = read_emoji(args.captions == "emoji-held-out")
    else:
        rows = read_coco(args.coco) if args.captions == "coco-30k" else read_jsonl(Path(args.captions), args.task)
    if args.limit is not None and args.limit < len(rows):
        rows = random.Random(0).sample(rows, max(0, args.limit))
    if not rows:
        sys.exit(f"{args.captions} holds no captions (--limit {args.limit}): there is nothing to measure.")
    return rows
