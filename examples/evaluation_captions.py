"""Captions and real images for `evaluate_generation.py`: from a JSONL file, the emoji, or COCO."""

import json
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emoji.images import load_rows, render_png
from emoji.tasks import EmojiTasks
from PIL import Image, ImageOps

from metamorph_hf.image_reading import read_image


COCO_CAPTIONS = Path("annotations") / "captions_val2014.json"
COCO_COUNT = 30_000


@dataclass
class Row:
    """A caption to generate an image for, or an image to reconstruct; `image` is anything that `read_image` takes."""

    id: str
    caption: str
    image: Any = None

    def reference(self, size: tuple[int, int] | None = None) -> Image.Image:
        """Read the real image: its center square, or cropped and resized to (width, height)."""
        image = read_image(self.image)
        return ImageOps.fit(image, size or (min(image.size),) * 2, Image.Resampling.BICUBIC)


def read_jsonl(path: Path, task: str) -> list[Row]:
    if not path.is_file():
        sys.exit(f"The captions file {path} does not exist: give a JSONL file, emoji, emoji-held-out or coco-30k.")
    rows, required = [], "image" if task == "reconstruct" else "caption"
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        location = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:  # neither JSON nor UTF-8
            sys.exit(f"{location}, is not JSON: {error}.")
        fields = {name: entry.get(name, "") for name in ("caption", "image")} if isinstance(entry, dict) else {}
        if not all(isinstance(text, str) for text in fields.values()) or not fields.get(required, "").strip():
            sys.exit(f'{location}: --task {task} needs {{"{required}": "..."}}; caption and image must be strings.')
        image = path.parent / entry["image"] if "image" in entry else None
        if image is not None and not image.is_file():
            sys.exit(f"{location}: the image {image} does not exist.")
        name = str(entry.get("id", number))
        if not re.fullmatch(r"\w[\w.-]*", name):
            sys.exit(f"{location}: the id {name!r} names a file, so use letters, digits, '_', '-' and '.' only.")
        rows.append(Row(name, entry.get("caption", ""), image))
    if rows and (most := Counter(row.id for row in rows).most_common(1)[0])[1] > 1:
        sys.exit(f"{path} has the id {most[0]!r} {most[1]} times: ids must be unique.")
    if len({row.image is None for row in rows}) > 1:
        sys.exit(f"{path} has images in some lines only: give one in every line, or in none.")
    return rows


def read_emoji(held_out: bool) -> list[Row]:
    """Read an image of each emoji, or 200 of Twitter's that the emoji visualizer never saw; images are SVG files."""
    rows = load_rows()
    tasks = EmojiTasks(rows)
    indices = tasks.bases
    if held_out:
        indices = [tasks.index["twitter", base, ""] for base in sorted(tasks.held_out_images)]
    return [Row(f"{rows[i]['style']}-{rows[i]['code']}", rows[i]["name"], rows[i]["svg"]) for i in indices]


def read_coco(folder: Path | None) -> list[Row]:
    """Sample 30,000 of the 40,504 images of COCO 2014 val, and a caption for each, both with seed 0."""
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


def read_rows(captions: str, task: str, coco: Path | None, limit: int | None) -> list[Row]:
    """Read the rows that the options of `evaluate_generation.py` name; `limit` samples them, always the same ones."""
    is_emoji = captions in ("emoji", "emoji-held-out")
    if is_emoji:
        rows = read_emoji(captions == "emoji-held-out")
    else:
        rows = read_coco(coco) if captions == "coco-30k" else read_jsonl(Path(captions), task)
    if limit is not None and limit < len(rows):
        rows = random.Random(0).sample(rows, max(0, limit))
    if not rows:
        sys.exit(f"{captions} holds no captions (--limit {limit}): there is nothing to measure.")
    return [replace(row, image=render_png(row.image)) for row in rows] if is_emoji else rows
