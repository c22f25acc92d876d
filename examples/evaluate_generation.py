"""Measure a pipeline's pictures: FID, CLIP score, PSNR, and whether a picture is found again among the real ones.

    python examples/evaluate_generation.py --output runs/emoji                            # the emoji model
    python examples/evaluate_generation.py --output runs/visualizer --task reconstruct    # its visualizer alone
    python examples/evaluate_generation.py --output runs/coco --pipeline my-pipeline --captions coco-30k --coco coco \\
        --clip-network openai/clip-vit-large-patch14
    python examples/evaluate_generation.py --output runs/sd --pipeline stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --captions mine.jsonl --judge my-pipeline                                         # another one, to compare

A line of a captions file is {"caption": "a cat", "image": "cat.png", "id": "cat"}. `image`, the real picture, lies in
the file's folder; text-to-image can do without (and then measures neither FID nor retrieval), reconstruct without
`caption`. `id` names the painted picture; the line's number if it is left out.

The output folder gets pictures/ID.png (ID.txt for an answer without a picture), contact_sheet.png and result.json.
Started again, it goes on: a picture's noise depends on seed and id alone, not on batch or process. On several devices:
accelerate launch examples/evaluate_generation.py ...
"""

import argparse
import hashlib
import importlib.util
import inspect
import json
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import torchmetrics
import transformers
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from evaluation_captions import COCO_CAPTIONS, Row, read_rows
from generate import EMOJI, load_pipeline
from PIL import Image, ImageDraw
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel, AutoProcessor

import metamorph_hf
from metamorph_hf import MetaMorphPipeline
from metamorph_hf.image_reading import read_image


LIBRARIES = (metamorph_hf, torch, transformers, diffusers, accelerate, torchmetrics)
INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity stores them


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


def load_network(auto_class: type, network: str, **kwargs) -> Any:
    try:
        return auto_class.from_pretrained(network, **kwargs)
    except (OSError, ValueError) as error:
        sys.exit(f"{network} cannot be loaded by {auto_class.__name__}: {error}")


def inception_is_there() -> bool:
    weights = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS
    return weights.is_file() and importlib.util.find_spec("torch_fidelity") is not None


def load_features(network: str | None, judge: MetaMorphPipeline | None, device: torch.device) -> tuple[str, Callable]:
    """The network of the FID, in words, and a function from I pictures to its features (I, d)."""
    if network == "inception" or (network is None and inception_is_there()):
        if importlib.util.find_spec("torch_fidelity") is None:
            sys.exit("--fid-network inception needs torch-fidelity: pip install torch-fidelity torchvision.")
        inception = NoTrainInceptionV3("inception-v3-compat", ["2048"]).to(device)
        return "Inception-v3, 2048 features", lambda images: inception(to_pixels(images).to(device))
    if network is not None:
        processor = load_network(AutoImageProcessor, network)
        model = load_network(AutoModel, network, dtype=torch.float32)
        encoder = model.get_encoder(modality="image").eval().to(device)

        def pooled(images: list[Image.Image]) -> torch.Tensor:
            return encoder(processor(images, return_tensors="pt")["pixel_values"].to(device)).pooler_output

        return f"pooled output of {type(encoder).__name__} in {network}", pooled
    if judge is None:
        sys.exit("The FID needs a network: name one by --fid-network, or a MetaMorphPipeline by --judge.")
    return "mean visual token of the judge", lambda images: judge.get_visual_tokens(images).float().mean(1)


def load_clip(network: str, device: torch.device) -> Callable[[list[Image.Image], list[str]], torch.Tensor]:
    """Hundred times the cosine (I,) of pictures and captions in a CLIP or SigLIP (CLIPScore, arXiv 2104.08718)."""
    # Not torchmetrics' CLIPScore: it knows seven names, and not the outputs of transformers 5.
    model = load_network(AutoModel, network, dtype=torch.float32).eval().to(device)
    if "text_config" not in model.config.sub_configs:
        sys.exit(f"{network} is a {type(model).__name__}, which reads no text: --clip-network takes a CLIP or SigLIP.")
    processor = load_network(AutoProcessor, network)

    def score(images: list[Image.Image], captions: list[str]) -> torch.Tensor:
        inputs = processor(images=images, text=captions, padding="max_length", truncation=True, return_tensors="pt")
        output = model(**inputs.to(device))
        return 100 * F.cosine_similarity(output.image_embeds, output.text_embeds)

    return score


def to_pixels(images: list[Image.Image]) -> torch.Tensor:
    """(I, 3, H, W), uint8."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


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


@torch.no_grad()
def compare(
    accelerator: Accelerator,
    rows: list[Row],
    painted: list[int],
    args: argparse.Namespace,
    judge: MetaMorphPipeline | None,
    features: Callable | None,
    clip_score: Callable | None,
) -> dict[str, torch.Tensor]:
    """
    Painted pictures with real ones and captions.

    Args:
        painted: The places of the rows that have a picture.

    Returns:
        Whatever can be measured of `features` (painted, d) and `real_features` (rows, d) for the FID; `rank`,
        `clip_score` and `psnr`, (painted,) each.
    """
    over_all = partial(measure, accelerator, size=args.batch_size)

    def read(place: int) -> Image.Image:
        return read_image(args.output / "pictures" / f"{rows[place].id}.png")

    size, real, tokens = read(painted[0]).size, {}, None

    def encode(batch: list[Row]) -> dict[str, torch.Tensor]:
        images = [row.reference(size) for row in batch]
        columns = {"features": features(images).float()}
        return columns if judge is None else {**columns, "tokens": judge.get_visual_tokens(images).half()}

    def judge_batch(batch: list[int]) -> dict[str, torch.Tensor]:
        images, columns = [read(place) for place in batch], {}
        if features is not None:
            columns["features"] = features(images).float()
        if tokens is not None:
            encoded = judge.get_visual_tokens(images).half()
            columns["rank"] = rank_among(encoded, tokens, torch.tensor(batch, device=tokens.device))
        if clip_score is not None:
            columns["clip_score"] = clip_score(images, [rows[place].caption for place in batch])
        if args.task == "reconstruct":
            originals = to_pixels([rows[place].reference(size) for place in batch]).float()
            options = {"data_range": 255.0, "reduction": "none", "dim": (1, 2, 3)}
            columns["psnr"] = peak_signal_noise_ratio(to_pixels(images).float(), originals, **options)
        return columns

    if features is not None:
        real = over_all(items=rows, desc="encoding real pictures", compute=encode)
        if "tokens" in real:
            # On every process: 4.4 GB for COCO-30K at the paper's size.
            tokens = real["tokens"].to(accelerator.device)
    found = over_all(items=painted, desc="comparing", compute=judge_batch)
    return {**found, "real_features": real["features"]} if real else found


def summarise(
    found: dict[str, torch.Tensor], rows: list[Row], unpainted: list[dict]
) -> tuple[dict[str, float], list[str]]:
    """The numbers, and the sentences that go with them."""
    metrics, notes, painted = {}, [], len(rows) - len(unpainted)
    if unpainted:
        notes.append(
            f"{len(unpainted)} of the {len(rows)} answers have no picture: they count as not found again and as a "
            "CLIP score of 0, and the FID is of the others."
        )
    if "features" not in found:
        notes.append("The captions have no real pictures: neither FID nor retrieval are measured.")
    elif painted == 1:
        notes.append("One picture has no FID.")
    else:
        metrics["fid"] = frechet_distance(found["real_features"], found["features"])
        if painted <= (dimensions := found["features"].shape[1]):
            notes.append(
                f"The FID of {painted} pictures in {dimensions} dimensions is too high, and depends on their number: "
                "compare it with that of as many pictures only, or give more pictures than dimensions."
            )
    if "rank" in found:
        metrics["retrieval_top1"] = 100 * (found["rank"] == 0).sum().item() / len(rows)
    elif "features" in found:
        notes.append("The pipeline has no vision tower: name a MetaMorphPipeline by --judge to measure retrieval.")
    if "clip_score" in found:
        metrics["clip_score"] = max(0.0, found["clip_score"].sum().item() / len(rows))
    else:
        notes.append("No CLIP score: name a network by --clip-network.")
    if "psnr" in found:
        metrics["psnr"] = found["psnr"].mean().item()
    return metrics, notes


def settings_of(rows: list[Row], pipe: DiffusionPipeline, args: argparse.Namespace, options: dict) -> dict[str, Any]:
    """All that decides the pictures. A folder that was begun with other settings is not gone on with."""
    asked = json.dumps([(row.id, row.caption, row.image) for row in rows], default=str)
    weights = [path.stat().st_mtime for path in Path(args.pipeline).rglob("*.safetensors")]
    return {
        "task": args.task,
        "pipeline": args.pipeline,
        "weights_changed": time.ctime(max(weights)) if weights else None,
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
    if not (folder / "pictures").is_dir():
        return
    path = folder / "settings.json"
    if not path.is_file():
        sys.exit(f"{folder} has a folder pictures, but no settings.json: name another --output.")
    before, now = json.loads(path.read_text()), json.loads(json.dumps(settings, default=str))
    if other := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
        changes = ", ".join(f"{name} ({before.get(name)} before, {now.get(name)} now)" for name in other)
        sys.exit(f"{folder} holds pictures of another run, which differs in {changes}: name another --output.")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder for pictures and result")
    parser.add_argument("--pipeline", default=str(EMOJI), help="folder or Hub id (default: the emoji model)")
    parser.add_argument("--task", choices=("text-to-image", "reconstruct"), default="text-to-image")
    parser.add_argument(
        "--captions",
        help="JSONL file, emoji (1,911 names, the default), emoji-held-out (200 drawings in a style that the "
        "visualizer has not seen, the default for reconstruct) or coco-30k",
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
    if args.batch_size < 1:
        parser.error(f"--batch-size is {args.batch_size}, but must be at least 1")
    if args.captions is None:
        args.captions = "emoji-held-out" if args.task == "reconstruct" else "emoji"
    return args


def main() -> None:
    args = parse_args()
    transformers.utils.logging.disable_progress_bar()
    accelerator = Accelerator(cpu=args.cpu)
    device, times, started = accelerator.device, {}, time.perf_counter()
    rows = read_rows(args)
    pipe = load_pipeline(args.pipeline, DiffusionPipeline, device)
    pipe.set_progress_bar_config(disable=True)
    options = painting_options(pipe, args)
    judge = pipe if isinstance(pipe, MetaMorphPipeline) else None
    if args.judge is not None:
        judge = load_pipeline(args.judge, MetaMorphPipeline, device)
        if judge.model is None or judge.processor is None:
            sys.exit(f"{args.judge} was saved without its model or processor: --judge needs its vision tower.")
    network = features = clip_score = None
    if rows[0].image is not None:
        network, features = load_features(args.fid_network, judge, device)
    if args.clip_network is not None:
        clip_score = load_clip(args.clip_network, device)
    settings = settings_of(rows, pipe, args, options)
    check_folder(args.output, settings)
    accelerator.wait_for_everyone()  # all have looked
    pictures = args.output / "pictures"
    if accelerator.is_main_process and not pictures.is_dir():
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "settings.json").write_text(json.dumps(settings, indent=2, default=str) + "\n")
        pictures.mkdir()
    accelerator.wait_for_everyone()
    times["loading"], started = time.perf_counter() - started, time.perf_counter()

    painted_now = paint_all(accelerator, pipe, rows, args, options)
    times["painting"], started = time.perf_counter() - started, time.perf_counter()
    painted = [place for place, row in enumerate(rows) if (pictures / f"{row.id}.png").is_file()]
    unpainted = [
        {"id": row.id, "caption": row.caption, "answer": (pictures / f"{row.id}.txt").read_text(encoding="utf-8")}
        for row in (rows[place] for place in sorted({*range(len(rows))} - {*painted}))
    ]
    if not painted:
        sys.exit(f"None of the {len(rows)} answers has a picture; the first is {unpainted[0]['answer']!r}.")

    found = compare(accelerator, rows, painted, args, judge, features, clip_score)
    times["measuring"] = time.perf_counter() - started
    accelerator.end_training()  # a process that ends with its threads of communication running may abort
    if not accelerator.is_main_process:
        return
    metrics, notes = summarise(found, rows, unpainted)
    result = {
        "metrics": metrics,
        "notes": notes,
        "fid_network": network,
        "clip_network": args.clip_network,
        "settings": settings,
        "arguments": vars(args),
        "without_picture": unpainted,
        "painted_in_this_run": painted_now,
        "seconds": {name: round(seconds, 1) for name, seconds in times.items()},
        "processes": accelerator.num_processes,
        "device": str(device),
        "versions": {module.__name__: module.__version__ for module in LIBRARIES},
    }
    (args.output / "result.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
    cells = []
    for place in sorted(random.Random(0).sample(range(len(rows)), min(args.sheet, len(rows)))):
        picture = read_image(pictures / f"{rows[place].id}.png") if place in painted else None
        cells.append((rows[place].caption, picture, None if features is None else rows[place].reference()))
    contact_sheet(cells, size=128).save(args.output / "contact_sheet.png")
    print(*notes, json.dumps({**metrics, "fid_network": network}, indent=2), sep="\n")


if __name__ == "__main__":
    main()
