"""Prompts of GenEval, DPG-Bench and WISE, and the folders that their own scorers read.

Written from the scorers' code: djghosh13/geneval, TencentQQGYLab/ELLA (dpg_bench) and PKU-YuanGroup/WISE.
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from evaluation_captions import Row
from PIL import Image

from metamorph_hf.image_reading import read_image


GENEVAL_KEYS = {"tag", "include", "prompt"}, {"tag", "include", "exclude", "prompt"}
WISE_KEYS = ({"Prompt", "Explanation", "Category", "Subcategory", "prompt_id"},)
WISE_IDS = range(1, 1001)
SAMPLES = {"geneval": 4, "dpg": 4, "wise": 1}
COMMANDS = {
    "geneval": "python evaluation/evaluate_images.py {images} --outfile {output}/geneval.jsonl --model-path MODELS\n"
    "python evaluation/summary_scores.py {output}/geneval.jsonl",
    "dpg": "accelerate launch dpg_bench/compute_dpg_bench.py --image-root-path {images} --resolution {size} "
    "--pic-num 4 --res-path {output}/dpg.txt --vqa-model mplug",
    "wise": "IMAGE_DIR={images} bash eval_qwen.sh",
}


@dataclass
class Prompt:
    """A prompt of a benchmark; `line` is that of GenEval's file."""

    id: str
    text: str
    line: str = ""


def parse(parser: Callable, content: bytes, location: str) -> Any:
    try:
        return parser(content)
    except ValueError as error:
        sys.exit(f"{location} cannot be read: {error}.")


def check_keys(entry: Any, location: str, known: tuple[set[str], ...]) -> None:
    if not isinstance(entry, dict) or entry.keys() not in known:
        found = ", ".join(sorted(entry)) if isinstance(entry, dict) else type(entry).__name__
        expected = " or ".join(", ".join(sorted(keys)) for keys in known)
        sys.exit(f"{location} has {found}, but the benchmark's own file has {expected}.")


def read_geneval(path: Path) -> list[Prompt]:
    prompts = []
    for index, line in enumerate(path.read_bytes().splitlines()):
        location = f"{path}, line {index + 1},"
        entry = parse(json.loads, line, location)
        check_keys(entry, location, GENEVAL_KEYS)
        prompts.append(Prompt(f"{index:05}", entry["prompt"], line.decode()))
    return prompts


def read_dpg(folder: Path) -> list[Prompt]:
    files = sorted(folder.iterdir())
    if strange := [path for path in files if path.suffix != ".txt" or "." in path.stem]:
        sys.exit(f"{strange[0]} is not a prompt of DPG-Bench: its folder dpg_bench/prompts has PROMPT_ID.txt only.")
    return [Prompt(path.stem, parse(bytes.decode, path.read_bytes(), str(path)).strip()) for path in files]


def read_wise(path: Path) -> list[Prompt]:
    entries = parse(json.loads, path.read_bytes(), str(path))
    for index, entry in enumerate(entries):
        check_keys(entry, f"{path}, entry {index},", WISE_KEYS)
        if entry["prompt_id"] not in WISE_IDS:
            sys.exit(f"{path}, entry {index}: prompt_id is {entry['prompt_id']!r}, but must be 1 to 1000.")
    return [Prompt(str(entry["prompt_id"]), entry["Prompt"]) for entry in entries]


def read_prompts(layout: str, captions: str, limit: int | None) -> list[Prompt]:
    """Read a benchmark's own files or folder, or exit with a sentence; `limit` samples them, always the same ones."""
    read = {"geneval": read_geneval, "dpg": read_dpg, "wise": read_wise}[layout]
    paths = [Path(path) for path in captions.split(",")]
    for path in paths:
        if not (path.is_dir() if layout == "dpg" else path.is_file()):
            sys.exit(f"{path} does not exist: --layout {layout} needs the benchmark's own prompts by --captions.")
    prompts = [prompt for path in paths for prompt in read(path)]
    if empty := [prompt.id for prompt in prompts if not isinstance(prompt.text, str) or not prompt.text.strip()]:
        sys.exit(f"The prompt {empty[0]} is empty: --layout {layout} needs a text for each id.")
    if prompts and (most := Counter(prompt.id for prompt in prompts).most_common(1)[0])[1] > 1:
        sys.exit(f"The prompts have the id {most[0]} {most[1]} times: ids must be unique.")
    if limit is not None and limit < len(prompts):
        prompts = random.Random(0).sample(prompts, max(0, limit))
    if not prompts:
        sys.exit(f"{captions} holds no prompts (--limit {limit}): there is nothing to generate.")
    return prompts


def list_samples(layout: str, prompts: list[Prompt]) -> list[Row]:
    """Return a row for each image, whose noise follows from its id `PROMPT_NUMBER`."""
    return [Row(f"{prompt.id}_{number}", prompt.text) for prompt in prompts for number in range(SAMPLES[layout])]


def join_images(images: list[Image.Image]) -> Image.Image:
    """Join four images of one size into a 2 x 2 grid."""
    rows = [np.concatenate([np.asarray(image) for image in images[start : start + 2]], axis=1) for start in (0, 2)]
    return Image.fromarray(np.concatenate(rows))


def write_layout(layout: str, prompts: list[Prompt], samples: Path, folder: Path) -> dict[str, Any]:
    """Write a benchmark's folder from the images in `samples`; return the facts about it for `result.json`.

    In the place of a missing image GenEval and DPG-Bench get a black one: GenEval's scorer would leave it out of the
    mean, and DPG-Bench's reads all four at once. WISE's scorer asks for the ids that are missing.
    """
    missing, size = [], read_image(next(samples.glob("*.png"))).size
    if layout == "dpg" and size[0] != size[1]:
        sys.exit(f"The images have {size[0]}x{size[1]} pixels, but DPG-Bench's scorer cuts squares out of its grids.")

    def save(name: str, content: Image.Image | str) -> None:
        unfinished, path = folder.with_name("unfinished"), folder / name  # a killed run leaves no half-written file
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            unfinished.write_text(content, encoding="utf-8")
        else:
            content.save(unfinished, format="PNG")
        unfinished.replace(path)

    for prompt in prompts:
        images = []
        for row in list_samples(layout, [prompt]):
            path = samples / f"{row.id}.png"
            images.append(read_image(path) if path.is_file() else Image.new("RGB", size))
            if not path.is_file():
                answer = path.with_suffix(".txt").read_text(encoding="utf-8")
                missing.append({"id": row.id, "caption": prompt.text, "answer": answer})
        if layout == "geneval":
            save(f"{prompt.id}/metadata.jsonl", prompt.line + "\n")
            save(f"{prompt.id}/grid.png", join_images(images))
            for index, image in enumerate(images):
                save(f"{prompt.id}/samples/{index:04}.png", image)
        elif layout == "dpg":
            save(f"{prompt.id}.png", join_images(images))
        elif (samples / f"{prompt.id}_0.png").is_file():
            save(f"{prompt.id}.png", images[0])

    notes = []
    if missing:
        treated = "missing" if layout == "wise" else "black, so that they count as wrong"
        notes.append(f"{len(missing)} of the answers have no image: these images are {treated}.")
    if layout == "wise" and (lacking := sorted(set(WISE_IDS) - {int(prompt.id) for prompt in prompts})):
        notes.append(f"The prompts lack {len(lacking)} of WISE's ids 1 to 1000, the first is {lacking[0]}.")
    commands = COMMANDS[layout].format(images=folder.resolve(), output=folder.parent.resolve(), size=size[0])
    facts = {"notes": notes, "without_image": missing, "commands": commands.split("\n")}
    if layout == "geneval":  # others have published longer wordings of the same prompts
        facts["prompt_form"] = "short" if all(prompt.text.startswith("a photo of ") for prompt in prompts) else "long"
    return facts
