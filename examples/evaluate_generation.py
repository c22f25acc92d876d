"""Measure the pictures of a pipeline: FID, CLIP score, PSNR, and whether a picture is found again among the right ones.

    python examples/evaluate_generation.py --output runs/emoji                             # the emoji model, no download
    python examples/evaluate_generation.py --output runs/visualizer --task reconstruct     # its visualizer alone
    python examples/evaluate_generation.py --output runs/coco --pipeline my-pipeline --captions coco-30k --coco coco/ \\
        --clip-network openai/clip-vit-large-patch14
    python examples/evaluate_generation.py --output runs/sd --pipeline stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --captions mine.jsonl --judge my-pipeline

`--captions` takes a JSONL file. A line is {"caption": "a cat", "image": "cat.png", "id": "cat"}: `image`, the real
picture, from the file's folder, is optional for text-to-image (without it neither FID nor retrieval are measured), and
`caption` for reconstruct; `id` names the painted picture and is the line's number if it is left out.

OUTPUT gets pictures/ID.png (pictures/ID.txt for an answer without a picture), contact_sheet.png and result.json. Started
again, it goes on: a picture's noise depends on the seed and its id alone. On several devices: accelerate launch
examples/evaluate_generation.py ...
"""

import argparse
import hashlib
import importlib.util
import inspect
import json
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from generate import EMOJI, load_pipeline
from PIL import Image, ImageDraw, ImageOps
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel, AutoProcessor

import metamorph_hf
from metamorph_hf import MetaMorphPipeline
from metamorph_hf.vpit_collator import BadSample, read_image


COCO_CAPTIONS = Path("annotations") / "captions_val2014.json"
COCO_COUNT = 30_000
INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity stores them


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
        except BadSample as error:
            sys.exit(f"The image of {self.id!r} cannot be read: {error}")
        return ImageOps.fit(image, size or (min(image.size),) * 2, Image.Resampling.BICUBIC)


def read_jsonl(path: Path, task: str) -> list[Row]:
    if not path.is_file():
        sys.exit(f"The captions file {path} does not exist: give a JSONL file, emoji, emoji-held-out or coco-30k.")
    rows, needed = [], "image" if task == "reconstruct" else "caption"
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
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
    counts = {row.id: 0 for row in rows}
    for row in rows:
        counts[row.id] += 1
    if twice := [name for name, count in counts.items() if count > 1]:
        sys.exit(f"{path} has {len(twice)} ids more than once, the first is {twice[0]!r}: ids must be unique.")
    if len({row.image is None for row in rows}) > 1:
        sys.exit(f"{path} has images in some lines only: give one in every line, or in none.")
    return rows


def read_emoji(held_out: bool) -> list[Row]:
    """Google's drawings, or 200 of Twitter's: the emoji visualizer was trained on Google's alone."""
    sys.path.append(str(EMOJI.parent))
    from datasets import Dataset
    from datasets import Image as ImageColumn
    from emoji_tasks import EmojiTasks

    dataset = Dataset.from_parquet(str(EMOJI.parent / "emoji.parquet")).cast_column("image", ImageColumn(decode=False))
    rows = dataset.to_list()
    tasks = EmojiTasks(rows)
    places = tasks.google
    if held_out:
        places = [tasks.index["twitter", base, ""] for base in sorted(tasks.held_out_drawings)]
    return [Row(f"{rows[i]['vendor']}-{rows[i]['unified']}", rows[i]["name"], rows[i]["image"]) for i in places]


def read_coco(folder: Path | None) -> list[Row]:
    """30,000 of the 40,504 pictures of COCO 2014 val, and for each one of its captions, both drawn with seed 0."""
    if folder is None or not (folder / COCO_CAPTIONS).is_file():
        sys.exit(
            f"coco-30k needs --coco FOLDER with {COCO_CAPTIONS} (from annotations_trainval2014.zip of cocodataset.org) "
            "and val2014/ (from val2014.zip)."
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


def painting_options(pipe: DiffusionPipeline, args: argparse.Namespace) -> dict[str, Any]:
    """Steps and guidance as the pipeline will use them; leaves if it cannot do the task."""
    metamorph, kind = isinstance(pipe, MetaMorphPipeline), type(pipe).__name__
    parameters = inspect.signature(pipe.__call__).parameters
    if args.task == "reconstruct" and not metamorph:
        sys.exit(f"{args.pipeline} is a {kind}: only a MetaMorphPipeline can reconstruct.")
    if "prompt" not in parameters:
        sys.exit(f"{args.pipeline} is a {kind}, which takes no text: give a text-to-image pipeline.")
    if metamorph and (pipe.model is None or pipe.processor is None):
        sys.exit(f"{args.pipeline} was saved without its model or processor: it takes neither text nor pictures.")
    options = {}
    for name, given in (("num_inference_steps", args.steps), ("guidance_scale", args.guidance_scale)):
        if name in parameters:
            default = pipe.config[f"default_{name}"] if metamorph else parameters[name].default
            options[name] = default if given is None else given
        elif given is not None:
            sys.exit(f"{args.pipeline} is a {kind}, which takes no {name}: leave the option out.")
    return options


def paint(
    pipe: DiffusionPipeline, rows: list[Row], args: argparse.Namespace, options: dict[str, Any]
) -> tuple[list[Image.Image | None], list[str]]:
    """For each row a picture (the first, if the answer has several; None if it has none), and the answer's text."""
    # From seed and id alone: the same picture in any batch, on any process, after a restart.
    digests = [hashlib.sha256(f"{args.seed} {row.id}".encode()).digest() for row in rows]
    generators = [torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")) for digest in digests]
    if args.task == "reconstruct":
        images = pipe.reconstruct([row.reference() for row in rows], generator=generators, **options)
        return images, [""] * len(rows)
    captions = [row.caption for row in rows]
    if not isinstance(pipe, MetaMorphPipeline):
        return pipe(captions, generator=generators, **options).images, [""] * len(rows)
    sampling = {"max_new_tokens": args.max_new_tokens, "generation_kwargs": {"do_sample": False}}
    output = pipe(captions, generator=generators, **sampling, **options)
    images = iter(output.images)
    drawn = [[next(images) for _ in range(count)] for count in output.image_counts]
    return [pictures[0] if pictures else None for pictures in drawn], output.text


def batches(accelerator: Accelerator, items: list, size: int, desc: str):
    """This process' items in batches, with a progress bar."""
    starts = range(0, len(items), size)
    for start in tqdm(starts, desc=desc, disable=not accelerator.is_main_process):
        yield items[start : start + size]


def paint_all(
    accelerator: Accelerator, pipe: DiffusionPipeline, rows: list[Row], args: argparse.Namespace, options: dict
) -> int:
    """Paints what is not in the folder yet; returns how much that was, of all processes."""
    folder = args.output / "pictures"
    todo = [row for row in rows if not any((folder / f"{row.id}{end}").is_file() for end in (".png", ".txt"))]
    accelerator.wait_for_everyone()  # all have looked before one of them adds to it
    with accelerator.split_between_processes(todo) as share:
        for batch in batches(accelerator, share, args.batch_size, "painting"):
            try:
                pictures, answers = paint(pipe, batch, args, options)
            except ValueError as error:
                sys.exit(f"The captions from {batch[0].id!r} to {batch[-1].id!r} were refused: {error}")
            for row, picture, answer in zip(batch, pictures, answers, strict=True):
                unfinished = folder / f"{row.id}.part"
                if picture is None:
                    unfinished.write_text(answer, encoding="utf-8")
                else:
                    picture.save(unfinished, format="PNG")
                unfinished.replace(folder / f"{row.id}{'.txt' if picture is None else '.png'}")
    accelerator.wait_for_everyone()
    return len(todo)


def measure(
    accelerator: Accelerator, items: list, size: int, desc: str, compute: Callable[[list], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """What `compute` gives for batches of `items`, over all processes: tensors (items, ...) on the CPU, in order."""
    with accelerator.split_between_processes(list(enumerate(items)), apply_padding=True) as share:
        found = [compute([item for _, item in batch]) for batch in batches(accelerator, share, size, desc)]
    places = accelerator.gather(torch.tensor([place for place, _ in share], device=accelerator.device)).cpu()
    columns = {}
    for name in found[0]:
        gathered = accelerator.gather(torch.cat([batch[name] for batch in found]).to(accelerator.device)).cpu()
        columns[name] = gathered.new_empty(len(items), *gathered.shape[1:])
        columns[name][places] = gathered  # what was added to make shares equal falls on itself
    return columns


def inception_is_there() -> bool:
    weights = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS
    return weights.is_file() and importlib.util.find_spec("torch_fidelity") is not None


def load_features(network: str | None, judge: MetaMorphPipeline | None, device: torch.device) -> tuple[str, Callable]:
    """The network of the FID, in words, and a function from I pictures to its features (I, d)."""
    if network == "inception" or (network is None and inception_is_there()):
        inception = NoTrainInceptionV3("inception-v3-compat", ["2048"]).to(device)
        return "Inception-v3, 2048 features", lambda images: inception(
            torch.stack([*map(to_pixels, images)]).to(device)
        )
    if network is not None:
        processor = AutoImageProcessor.from_pretrained(network)
        encoder = AutoModel.from_pretrained(network).get_encoder(modality="image").eval().to(device)

        def pooled(images: list[Image.Image]) -> torch.Tensor:
            return encoder(processor(images, return_tensors="pt")["pixel_values"].to(device)).pooler_output

        return f"pooled output of {type(encoder).__name__} in {network}", pooled
    if judge is None:
        sys.exit("The FID needs a network: name one by --fid-network, or a MetaMorphPipeline by --judge.")
    return "mean visual token of the judge", lambda images: judge.get_visual_tokens(images).float().mean(1)


def load_clip(network: str, device: torch.device) -> Callable[[list[Image.Image], list[str]], torch.Tensor]:
    """Hundred times the cosine (I,) of pictures and captions in a CLIP or SigLIP (CLIPScore, arXiv 2104.08718)."""
    # Not torchmetrics' CLIPScore: it knows seven names, and not the outputs of transformers 5.
    model, processor = AutoModel.from_pretrained(network).eval().to(device), AutoProcessor.from_pretrained(network)
    if "text_config" not in model.config.sub_configs:
        sys.exit(f"{network} is a {type(model).__name__}, which reads no text: --clip-network takes a CLIP or SigLIP.")

    def score(images: list[Image.Image], captions: list[str]) -> torch.Tensor:
        inputs = processor(images=images, text=captions, padding="max_length", truncation=True, return_tensors="pt")
        output = model(**inputs.to(device))
        return 100 * F.cosine_similarity(output.image_embeds, output.text_embeds)

    return score


def to_pixels(image: Image.Image) -> torch.Tensor:
    """(3, H, W), uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def rank_among(encoded: torch.Tensor, references: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """
    How many references are nearer to a picture than its own is, by the cosine of flattened visual tokens; 0 is best.
    References that are identical cannot be told apart, and count as one.

    Args:
        encoded: (I, N, V).
        references: (R, N, V).
        right: (I,) int64, the place of each picture's own reference.

    Returns:
        (I,) int64.
    """

    def flat(visual_tokens: torch.Tensor) -> torch.Tensor:
        return F.normalize(visual_tokens.float().flatten(1), dim=1)

    encoded = flat(encoded)
    similarity = torch.cat([encoded @ flat(block).T for block in references.split(1024)], dim=1)
    # Identical pictures have identical tokens up to rounding.
    return (similarity > similarity.gather(1, right[:, None]) + 1e-5).sum(1)


def contact_sheet(
    rows: list[tuple[str, Image.Image | None, Image.Image | None]], columns: int = 3, size: int = 76
) -> Image.Image:
    """Cells of caption, painted picture and real one, each where there is one, in squares of `size` pixels."""
    step = size + 10
    width, height = max(300, 2 * step + 16), size + 24
    sheet = Image.new("RGB", (columns * width, -(-len(rows) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (caption, *pictures) in enumerate(rows):
        x, y = index % columns * width + 8, index // columns * height + 4
        pen.text((x, y), caption if len(caption) < 48 else caption[:45] + "...", fill="black")
        for place, picture in enumerate(pictures):
            if picture is not None:
                sheet.paste(picture.resize((size, size)), (x + place * step, y + 16))
    return sheet


def frechet_distance(real: torch.Tensor, painted: torch.Tensor) -> float:
    """The FID of features (R, d) and (I, d)."""
    features = torch.nn.Identity()
    features.num_features = real.shape[1]
    fid = FrechetInceptionDistance(feature=features, sync_on_compute=False)  # the features are those of all processes
    fid.update(real, real=True)
    fid.update(painted, real=False)
    return fid.compute().item()


def settings_of(rows: list[Row], pipe: DiffusionPipeline, args: argparse.Namespace, options: dict) -> dict[str, Any]:
    """All that decides the pictures. A folder that was begun with other settings is not gone on with."""
    asked = json.dumps(
        [[row.id, row.caption, row.image if isinstance(row.image, Path) else ""] for row in rows], default=str
    )
    files = [path for path in Path(args.pipeline).rglob("*") if path.is_file()]
    return {
        "task": args.task,
        "pipeline": args.pipeline,
        "pipeline_files_changed": max((round(path.stat().st_mtime) for path in files), default=None),
        "pipeline_class": type(pipe).__name__,
        "dtype": str(pipe.dtype),
        "scheduler": {"class": type(pipe.scheduler).__name__, **pipe.scheduler.config},
        **options,
        "seed": args.seed,
        "max_new_tokens": args.max_new_tokens,
        "captions": args.captions,
        "number_of_captions": len(rows),
        "captions_sha256": hashlib.sha256(asked.encode()).hexdigest(),
    }


def check_folder(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "settings.json"
    if path.is_file():
        before, now = json.loads(path.read_text()), json.loads(json.dumps(settings, default=str))
        other = [name for name in now if before.get(name) != now[name]]
        if other:
            changes = ", ".join(f"{name} ({before.get(name)} before, {now[name]} now)" for name in other)
            sys.exit(f"{folder} holds pictures of another run, which differs in {changes}: name another --output.")
    elif (folder / "pictures").is_dir():
        sys.exit(f"{folder} has a folder pictures, but no settings.json: name another --output.")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder for pictures and result")
    parser.add_argument("--pipeline", default=str(EMOJI), help="folder or Hub id (default: the emoji model)")
    parser.add_argument("--task", choices=("text-to-image", "reconstruct"), default="text-to-image")
    parser.add_argument(
        "--captions",
        help="JSONL file, emoji (1,911 names, the default), emoji-held-out (200 drawings in another style, the default "
        "for reconstruct) or coco-30k",
    )
    parser.add_argument("--coco", type=Path, help=f"for coco-30k: folder with {COCO_CAPTIONS} and val2014/")
    parser.add_argument("--limit", type=int, help="at most this many captions, always the same ones")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the pipeline's)")
    parser.add_argument("--guidance-scale", type=float, help="(default: the pipeline's)")
    parser.add_argument("--seed", type=int, default=0, help="of the painting; answers are not sampled")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="length of an answer (default: 512)")
    parser.add_argument("--batch-size", type=int, default=16, help="per device (default: 16)")
    parser.add_argument(
        "--fid-network",
        help="inception, or folder or Hub id of a CLIP, SigLIP or DINOv2 (default: Inception-v3 if torch-fidelity is "
        "installed and has its weights, else the judge's mean visual token: good only to compare runs of one judge)",
    )
    parser.add_argument("--clip-network", help="folder or Hub id of a CLIP or SigLIP (default: no CLIP score)")
    parser.add_argument(
        "--judge", help="MetaMorphPipeline that encodes the pictures for retrieval (default: --pipeline)"
    )
    parser.add_argument("--sheet", type=int, default=36, help="pictures on the contact sheet (default: 36)")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU")
    args = parser.parse_args()
    if args.captions is None:
        args.captions = "emoji-held-out" if args.task == "reconstruct" else "emoji"
    return args


@torch.no_grad()
def main() -> None:
    args = parse_args()
    accelerator = Accelerator(cpu=args.cpu)
    device, started = accelerator.device, time.perf_counter()
    rows = read_rows(args)
    pipe = load_pipeline(args.pipeline, DiffusionPipeline, device)
    pipe.set_progress_bar_config(disable=True)
    options = painting_options(pipe, args)
    judge = pipe if isinstance(pipe, MetaMorphPipeline) else None
    if args.judge is not None:
        judge = load_pipeline(args.judge, MetaMorphPipeline, device)
    with_references = rows[0].image is not None
    network, features = load_features(args.fid_network, judge, device) if with_references else (None, None)
    clip_score = None if args.clip_network is None else load_clip(args.clip_network, device)

    settings = settings_of(rows, pipe, args, options)
    check_folder(args.output, settings)
    accelerator.wait_for_everyone()  # all have looked
    pictures = args.output / "pictures"
    if accelerator.is_main_process:
        pictures.mkdir(parents=True, exist_ok=True)
        (args.output / "settings.json").write_text(json.dumps(settings, indent=2, default=str) + "\n")
    accelerator.wait_for_everyone()
    times = {"loading": time.perf_counter() - started}
    started = time.perf_counter()
    painted_now = paint_all(accelerator, pipe, rows, args, options)
    times["painting"] = time.perf_counter() - started

    started = time.perf_counter()
    painted = [(place, row) for place, row in enumerate(rows) if (pictures / f"{row.id}.png").is_file()]
    unpainted = [
        {"id": row.id, "caption": row.caption, "answer": (pictures / f"{row.id}.txt").read_text(encoding="utf-8")}
        for row in rows
        if not (pictures / f"{row.id}.png").is_file()
    ]
    if not painted:
        sys.exit(f"None of the {len(rows)} answers has a picture; the first answer is {unpainted[0]['answer']!r}.")

    size = read_image(pictures / f"{painted[0][1].id}.png").size
    over_all = partial(measure, accelerator, size=args.batch_size)
    references = {}
    if with_references:

        def encode(batch: list[Row]) -> dict[str, torch.Tensor]:
            images = [row.reference(size) for row in batch]
            columns = {"features": features(images).float()}
            return columns if judge is None else {**columns, "tokens": judge.get_visual_tokens(images).half()}

        references = over_all(items=rows, desc="encoding real pictures", compute=encode)
    tokens = references["tokens"].to(device) if "tokens" in references else None

    def compare(batch: list[tuple[int, Row]]) -> dict[str, torch.Tensor]:
        images, columns = [read_image(pictures / f"{row.id}.png") for _, row in batch], {}
        if with_references:
            columns["features"] = features(images).float()
        if tokens is not None:
            places = torch.tensor([place for place, _ in batch], device=device)
            columns["rank"] = rank_among(judge.get_visual_tokens(images).half(), tokens, places)
        if clip_score is not None:
            columns["clip_score"] = clip_score(images, [row.caption for _, row in batch])
        if args.task == "reconstruct":
            pixels, real = (
                torch.stack([*map(to_pixels, those)]).float()
                for those in (images, [row.reference(size) for _, row in batch])
            )
            columns["psnr"] = peak_signal_noise_ratio(pixels, real, 255.0, reduction="none", dim=(1, 2, 3))
        return columns

    found = over_all(items=painted, desc="comparing", compute=compare)
    times["measuring"] = time.perf_counter() - started
    if not accelerator.is_main_process:
        return
    metrics, notes = {}, []
    if with_references:
        dimensions = references["features"].shape[1]
        metrics["fid"] = frechet_distance(references["features"], found["features"])
        if len(painted) <= dimensions:
            notes.append(
                f"The FID is of {len(painted)} pictures in {dimensions} dimensions: with fewer pictures than dimensions "
                "it is far too high and depends on their number. Compare it with runs of as many pictures only."
            )
    if "rank" in found:
        metrics["retrieval_top1"] = 100 * (found["rank"] == 0).sum().item() / len(rows)
    if "clip_score" in found:
        metrics["clip_score"] = max(0.0, found["clip_score"].sum().item() / len(rows))
    if "psnr" in found:
        metrics["psnr"] = found["psnr"].mean().item()
    if unpainted:
        notes.append(
            f"{len(unpainted)} of the {len(rows)} answers have no picture. They count as not found again and as a CLIP "
            "score of 0; the FID is of the others."
        )
    if not with_references:
        notes.append("The captions have no real pictures: neither FID nor retrieval are measured.")
    elif judge is None:
        notes.append("The pipeline has no vision tower: name a MetaMorphPipeline by --judge to measure retrieval.")
    if clip_score is None:
        notes.append("No CLIP score: name a network by --clip-network.")
    result = {
        "metrics": metrics,
        "notes": notes,
        "fid_network": network,
        "settings": settings,
        "arguments": {name: value if value is None else str(value) for name, value in vars(args).items()},
        "without_picture": unpainted,
        "painted_in_this_run": painted_now,
        "seconds": {name: round(seconds, 1) for name, seconds in times.items()},
        "processes": accelerator.num_processes,
        "device": str(device),
        "versions": {
            module.__name__: module.__version__
            for module in (metamorph_hf, torch, transformers, diffusers, accelerate)
        },
    }
    (args.output / "result.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
    shown = sorted(random.Random(0).sample(range(len(rows)), min(args.sheet, len(rows))))
    cells = []
    for row in (rows[place] for place in shown):
        path = pictures / f"{row.id}.png"
        real = row.reference(size) if with_references else None
        cells.append((row.caption, read_image(path) if path.is_file() else None, real))
    contact_sheet(cells, size=128).save(args.output / "contact_sheet.png")
    for note in notes:
        print(note)
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
