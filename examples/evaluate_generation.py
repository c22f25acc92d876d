"""Measure a pipeline's images: FID, CLIP score, PSNR, and whether an image is found again among the real ones.

    python examples/evaluate_generation.py --output runs/emoji                            # the emoji model
    python examples/evaluate_generation.py --output runs/visualizer --task reconstruct    # its visualizer alone
    python examples/evaluate_generation.py --output runs/coco --pipeline my-pipeline --captions coco-30k --coco coco \\
        --clip-network openai/clip-vit-large-patch14
    python examples/evaluate_generation.py --output runs/sd --pipeline stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --captions mine.jsonl --judge my-pipeline                                         # another one, to compare
    python examples/evaluate_generation.py --output runs/geneval --pipeline my-pipeline --layout geneval \\
        --captions geneval/prompts/evaluation_metadata.jsonl                              # images for GenEval's scorer

A line of a captions file is {"caption": "a cat", "image": "cat.png", "id": "cat"}. `image`, the real image, lies in
the file's folder; text-to-image can do without (and then measures neither FID nor retrieval), reconstruct without
`caption`. `id` names the generated image; it defaults to the number of the line.

The output folder gets images/ID.png (ID.txt for an answer without an image), contact_sheet.png and result.json.
A run that is started again continues: an image's noise depends on seed and id alone, not on batch or process. On
several devices: accelerate launch examples/evaluate_generation.py ...
"""

import argparse
import hashlib
import inspect
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
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
from accelerate.utils import gather_object
from common import EMOJI_CHECKPOINT, exit_with_sentence, load_pipeline
from diffusers import DiffusionPipeline
from evaluation import draw_contact_sheet, rank_references
from evaluation_captions import COCO_CAPTIONS, Row, read_rows
from evaluation_layouts import SAMPLES, Prompt, list_samples, read_prompts, write_layout
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel, AutoProcessor

import metamorph_hf
from metamorph_hf import MetaMorphPipeline
from metamorph_hf.image_reading import read_image
from metamorph_hf.pipeline_metamorph import DecodingOptions


LIBRARIES = (metamorph_hf, torch, transformers, diffusers, accelerate, torchmetrics)
SHEET = 36  # images on the contact sheet
Encoder = Callable[[list[Image.Image]], torch.Tensor]


def choose_options(pipe: DiffusionPipeline, args: argparse.Namespace) -> dict[str, Any]:
    """Return steps and guidance as the pipeline will use them; exit if it cannot do the task."""
    is_metamorph, kind = isinstance(pipe, MetaMorphPipeline), type(pipe).__name__
    parameters = dict(inspect.signature(pipe.__call__).parameters)
    if is_metamorph:
        parameters |= inspect.signature(DecodingOptions).parameters
    if args.task == "reconstruct" and not is_metamorph:
        sys.exit(f"{args.pipeline} is a {kind}: only a MetaMorphPipeline can reconstruct.")
    if "prompt" not in parameters:
        sys.exit(f"{args.pipeline} is a {kind}, which takes no text: give a text-to-image pipeline.")
    if is_metamorph and (pipe.model is None or pipe.processor is None):
        sys.exit(f"{args.pipeline} was saved without its model or processor: it takes neither text nor images.")
    options = {}
    for name, given in (("num_inference_steps", args.steps), ("guidance_scale", args.guidance_scale)):
        if name in parameters:
            default = pipe.config[f"default_{name}"] if is_metamorph else parameters[name].default
            options[name] = default if given is None else given
        elif given is not None:
            sys.exit(f"{args.pipeline} is a {kind}, which takes no {name}: leave the option out.")
    return options


def generate(pipe: DiffusionPipeline, rows: list[Row], args: argparse.Namespace, options: dict) -> tuple[list, list]:
    """Return the first image of each row's answer (None if it has none) and its text."""
    # From seed and id alone: the same image in any batch, on any process, after a restart.
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
    answers = [[next(images) for _ in range(count)] for count in output.image_counts]
    return [answer[0] if answer else None for answer in answers], output.text


def split_batches(accelerator: Accelerator, items: list, size: int, desc: str) -> Iterator[list]:
    """Yield this process' items in batches, with a progress bar."""
    with accelerator.split_between_processes(items) as share:
        for start in tqdm(range(0, len(share), size), desc=desc, disable=not accelerator.is_main_process):
            yield share[start : start + size]


def generate_missing(
    accelerator: Accelerator,
    pipe: DiffusionPipeline,
    rows: list[Row],
    args: argparse.Namespace,
    options: dict,
    folder: Path,
) -> int:
    """Generate the images that are not in the folder yet; return their number over all processes."""
    missing = [row for row in rows if not any((folder / f"{row.id}{end}").is_file() for end in (".png", ".txt"))]
    accelerator.wait_for_everyone()  # all have looked before one of them adds to it
    for batch in split_batches(accelerator, missing, args.batch_size, "generating images"):
        try:
            images, answers = generate(pipe, batch, args, options)
        except ValueError as error:
            sys.exit(f"The captions from {batch[0].id!r} to {batch[-1].id!r} were refused: {error}")
        for row, image, answer in zip(batch, images, answers, strict=True):
            unfinished = folder / f"{row.id}.part"
            if image is None:
                unfinished.write_text(answer, encoding="utf-8")
            else:
                image.save(unfinished, format="PNG")
            unfinished.replace(folder / f"{row.id}{'.txt' if image is None else '.png'}")
    accelerator.wait_for_everyone()
    return len(missing)


def measure(accelerator: Accelerator, items: list, args: argparse.Namespace, compute: Callable) -> dict:
    """Call `compute` on batches of `items`, over all processes; return tensors (items, ...) on the CPU, in order."""
    batches = [compute(batch) for batch in split_batches(accelerator, items, args.batch_size, "comparing images")]
    batches = gather_object([{name: column.cpu() for name, column in batch.items()} for batch in batches])
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def load_features(network: str | None, judge: MetaMorphPipeline | None, device: torch.device) -> tuple[str, Encoder]:
    """Return the name of the FID's network, and a function from I images to its features (I, d)."""
    if network == "inception":
        inception = NoTrainInceptionV3("inception-v3-compat", ["2048"]).to(device)
        return "Inception-v3, 2048 features", lambda images: inception(to_pixels(images).to(device))
    if network is not None:
        processor = AutoImageProcessor.from_pretrained(network)
        model = AutoModel.from_pretrained(network, dtype=torch.float32)
        encoder = model.get_encoder(modality="image").eval().to(device)

        def pool(images: list[Image.Image]) -> torch.Tensor:
            return encoder(processor(images, return_tensors="pt")["pixel_values"].to(device)).pooler_output

        return f"pooled output of {type(encoder).__name__} in {network}", pool
    if judge is None:
        sys.exit("The FID needs a network: name one by --fid-network, or a MetaMorphPipeline by --judge.")
    return "mean visual token of the judge", lambda images: judge.get_visual_tokens(images).float().mean(1)


def load_clip(network: str, device: torch.device) -> Callable[[list[Image.Image], list[str]], torch.Tensor]:
    """Return a function from images and captions to their CLIPScore (I,) (arXiv 2104.08718): 100 times the cosine.

    torchmetrics' CLIPScore does not fit: it knows seven names, and not the outputs of transformers 5.
    """
    model = AutoModel.from_pretrained(network, dtype=torch.float32).eval().to(device)
    if "text_config" not in model.config.sub_configs:
        sys.exit(f"{network} is a {type(model).__name__}, which reads no text: --clip-network takes a CLIP or SigLIP.")
    processor = AutoProcessor.from_pretrained(network)

    def score(images: list[Image.Image], captions: list[str]) -> torch.Tensor:
        inputs = processor(images=images, text=captions, padding="max_length", truncation=True, return_tensors="pt")
        output = model(**inputs.to(device))
        return 100 * F.cosine_similarity(output.image_embeds, output.text_embeds)

    return score


def to_pixels(images: list[Image.Image]) -> torch.Tensor:
    """Convert images of one size to uint8 (I, 3, H, W)."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def frechet_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """Compute the FID of features (R, d) and (I, d)."""
    features = torch.nn.Identity()
    features.num_features = real.shape[1]
    fid = FrechetInceptionDistance(feature=features, sync_on_compute=False)  # the features are those of all processes
    fid.update(real, real=True)
    fid.update(generated, real=False)
    return fid.compute().item()


@torch.no_grad()
def compare(
    accelerator: Accelerator,
    rows: list[Row],
    generated: list[int],
    args: argparse.Namespace,
    judge: MetaMorphPipeline | None,
    features: Encoder | None,
    clip_score: Callable | None,
) -> dict[str, torch.Tensor]:
    """Compare the images of the rows with the indices `generated` with the real images and with the captions.

    Returns:
        All that can be measured of `features` (generated, d) and `real_features` (rows, d) for the FID, and of `rank`,
        `clip_score` and `psnr`, (generated,) each.
    """
    folder, device = args.output / "images", accelerator.device
    size = read_image(folder / f"{rows[generated[0]].id}.png").size

    def encode(images: list[Image.Image]) -> dict[str, torch.Tensor]:
        columns = {"features": features(images).float()}
        return columns if judge is None else {**columns, "tokens": judge.get_visual_tokens(images).half()}

    def compare_batch(batch: list[Row]) -> dict[str, torch.Tensor]:
        images = [read_image(folder / f"{row.id}.png") for row in batch]
        columns = {} if features is None else encode(images)
        if clip_score is not None:
            columns["clip_score"] = clip_score(images, [row.caption for row in batch])
        if args.task == "reconstruct":
            originals = to_pixels([row.reference(size) for row in batch]).float()
            options = {"data_range": 255.0, "reduction": "none", "dim": (1, 2, 3)}
            columns["psnr"] = peak_signal_noise_ratio(to_pixels(images).float(), originals, **options)
        return columns

    found = measure(accelerator, [rows[index] for index in generated], args, compare_batch)
    if features is None:
        return found
    real = measure(accelerator, rows, args, lambda batch: encode([row.reference(size) for row in batch]))
    if judge is not None:
        references = real["tokens"].to(device)  # 4.4 GB for COCO-30K at the paper's size
        blocks = zip(found.pop("tokens").split(256), torch.tensor(generated).split(256), strict=True)
        ranks = [rank_references(block.to(device), references, targets.to(device)) for block, targets in blocks]
        found["rank"] = torch.cat(ranks).cpu()
    return {**found, "real_features": real["features"]}


def summarize(found: dict[str, torch.Tensor], rows: list[Row], missing: list) -> tuple[dict[str, float], list[str]]:
    """Return the numbers, and the sentences that go with them."""
    metrics, notes, count = {}, [], len(rows) - len(missing)
    if missing:
        notes.append(
            f"{len(missing)} of the {len(rows)} answers have no image: they count as not found again and as a CLIP "
            "score of 0, and the FID is that of the others."
        )
    if "features" not in found:
        notes.append("The captions have no real images: neither FID nor retrieval are measured.")
    elif count == 1:
        notes.append("A single image has no FID.")
    else:
        metrics["fid"] = frechet_distance(found["real_features"], found["features"])
        if count <= (dimensions := found["features"].shape[1]):
            notes.append(
                f"The FID of {count} images in {dimensions} dimensions is too high, and depends on their number: "
                "compare it with that of as many images only, or give more images than dimensions."
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


def describe_settings(rows: list[Row], pipe: DiffusionPipeline, args: argparse.Namespace, options: dict) -> dict:
    """Collect all settings that decide the images."""
    requests = json.dumps([(row.id, row.caption, row.image) for row in rows], default=str)
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
        "layout": args.layout,
        "number_of_captions": len(rows),
        "captions_sha256": hashlib.sha256(requests.encode()).hexdigest(),
    }


def prepare_folder(accelerator: Accelerator, folder: Path, settings: dict[str, Any]) -> None:
    """Create the output folder, or exit if it was begun with other settings."""
    path, settings = folder / "settings.json", json.loads(json.dumps(settings, default=str))
    exists = (folder / "images").is_dir()
    if exists and not path.is_file():
        sys.exit(f"{folder} has a folder images, but no settings.json: name another --output.")
    before = json.loads(path.read_text()) if exists else settings
    if other := [name for name in {**before, **settings} if before.get(name) != settings.get(name)]:
        changes = ", ".join(f"{name} ({before.get(name)} before, {settings.get(name)} now)" for name in other)
        sys.exit(f"{folder} holds images of another run, which differs in {changes}: name another --output.")
    accelerator.wait_for_everyone()  # all have looked
    if accelerator.is_main_process and not exists:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=2) + "\n")
        (folder / "images").mkdir()
    accelerator.wait_for_everyone()


def finish_layout(prompts: list[Prompt], args: argparse.Namespace, samples: Path, result: dict) -> None:
    """Write the benchmark's folder and `result.json`, and say what to run then."""
    if not any(samples.glob("*.png")):
        sys.exit(f"None of the answers to the {len(prompts)} prompts has an image.")
    facts = write_layout(args.layout, prompts, samples, args.output / "images")
    result = {**facts, **result, "versions": {module.__name__: module.__version__ for module in LIBRARIES}}
    (args.output / "result.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
    print(*facts["notes"], f"Now run, in the benchmark's repository:\n{chr(10).join(facts['commands'])}", sep="\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder for images and result")
    parser.add_argument("--pipeline", default=str(EMOJI_CHECKPOINT), help="folder or Hub id (default: emoji model)")
    parser.add_argument(
        "--task",
        choices=("text-to-image", "reconstruct"),
        default="text-to-image",
        help="what makes the images: captions, or the real images (default: text-to-image)",
    )
    parser.add_argument(
        "--captions",
        help="JSONL file, emoji (1,925 names, the default), emoji-held-out (200 images in Twitter's style that "
        "the visualizer has not seen, the default for reconstruct) or coco-30k; with --layout, the benchmark's own "
        "files (WISE: three, with commas between them) or folder (DPG-Bench)",
    )
    parser.add_argument(
        "--layout", choices=SAMPLES, help="write images for this benchmark's own scorer; measure nothing"
    )
    parser.add_argument("--coco", type=Path, help=f"for coco-30k: folder with {COCO_CAPTIONS} and val2014/")
    parser.add_argument("--limit", type=int, help="maximum number of captions, always the same ones")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the pipeline's)")
    parser.add_argument("--guidance-scale", type=float, help="(default: the pipeline's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise; answers are not sampled")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="maximum length of an answer (default: 512)")
    parser.add_argument("--batch-size", type=int, default=16, help="images per device (default: 16)")
    parser.add_argument(
        "--fid-network",
        help="inception (needs torch-fidelity), or folder or Hub id of a CLIP, SigLIP or DINOv2 (default: the judge's "
        "mean visual token, good only to compare runs of one judge)",
    )
    parser.add_argument("--clip-network", help="folder or Hub id of a CLIP or SigLIP (default: no CLIP score)")
    parser.add_argument("--judge", help="MetaMorphPipeline that encodes images for retrieval (default: --pipeline)")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU")
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error(f"--batch-size is {args.batch_size}, but must be at least 1")
    if args.layout is not None and (args.captions is None or args.task != "text-to-image"):
        parser.error("--layout needs the benchmark's prompts by --captions, and --task text-to-image")
    if args.captions is None:
        args.captions = "emoji-held-out" if args.task == "reconstruct" else "emoji"
    return args


def evaluate(args: argparse.Namespace) -> None:
    accelerator = Accelerator(cpu=args.cpu)
    device = accelerator.device
    if args.layout is not None:
        prompts = read_prompts(args.layout, args.captions, args.limit)
        rows = list_samples(args.layout, prompts)
    else:
        rows = read_rows(args.captions, args.task, args.coco, args.limit)
    pipe = load_pipeline(args.pipeline, device, any_class=True)
    pipe.set_progress_bar_config(disable=True)
    options = choose_options(pipe, args)
    judge = pipe if isinstance(pipe, MetaMorphPipeline) else None
    if args.judge is not None:
        judge = load_pipeline(args.judge, device)
        if judge.model is None or judge.processor is None:
            sys.exit(f"{args.judge} was saved without its model or processor: --judge needs its vision tower.")
    has_images = rows[0].image is not None
    network, features = load_features(args.fid_network, judge, device) if has_images else (None, None)
    clip_score = None if args.clip_network is None else load_clip(args.clip_network, device)
    settings = describe_settings(rows, pipe, args, options)
    prepare_folder(accelerator, args.output, settings)
    images = args.output / "images"
    samples = images if args.layout is None else args.output / "samples"
    samples.mkdir(exist_ok=True)
    generated_now = generate_missing(accelerator, pipe, rows, args, options, samples)
    if args.layout is not None:
        accelerator.end_training()
        if accelerator.is_main_process:
            finish_layout(prompts, args, samples, {"settings": settings, "generated_in_this_run": generated_now})
        return
    generated = [index for index, row in enumerate(rows) if (images / f"{row.id}.png").is_file()]
    missing = [
        {"id": row.id, "caption": row.caption, "answer": (images / f"{row.id}.txt").read_text(encoding="utf-8")}
        for row in rows
        if (images / f"{row.id}.txt").is_file()
    ]
    if not generated:
        sys.exit(f"None of the {len(rows)} answers has an image; the first is {missing[0]['answer']!r}.")
    found = compare(accelerator, rows, generated, args, judge, features, clip_score)
    accelerator.end_training()  # a process that ends with its threads of communication running may abort
    if not accelerator.is_main_process:
        return

    metrics, notes = summarize(found, rows, missing)
    result = {
        "metrics": metrics,
        "notes": notes,
        "fid_network": network,
        "settings": settings,
        "arguments": vars(args),
        "without_image": missing,
        "generated_in_this_run": generated_now,
        "processes": accelerator.num_processes,
        "device": str(device),
        "versions": {module.__name__: module.__version__ for module in LIBRARIES},
    }
    (args.output / "result.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
    cells = []
    for index in sorted(random.Random(0).sample(range(len(rows)), min(SHEET, len(rows)))):
        image = read_image(images / f"{rows[index].id}.png") if index in generated else None
        cells.append((rows[index].caption, image, None if features is None else rows[index].reference()))
    draw_contact_sheet(cells, size=128).save(args.output / "contact_sheet.png")
    print(*notes, json.dumps({**metrics, "fid_network": network}, indent=2), sep="\n")


def main() -> None:
    args = parse_args()
    transformers.utils.logging.disable_progress_bar()
    with exit_with_sentence():
        evaluate(args)


if __name__ == "__main__":
    main()
