"""GenEval for emoji scenes: how much of a prompt is in the image, by a judge that is not the model.

    python examples/evaluate_scenes.py                                     # up to 600 prompts with the emoji model
    python examples/evaluate_scenes.py --pipeline FOLDER --limit 40        # any text-to-image pipeline of diffusers

The categories are GenEval's (Ghosh et al., 2023, arXiv 2310.11513): one object, two objects, counting, colors,
position and attribute binding. The objects are known emoji, which `SceneJudge` finds by correlation. The emoji model
was trained on each single object and color, but on none of the combinations in the other four categories. Prints one
JSON object, with 95 % intervals (Wilson).
"""

import argparse
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from common import EMOJI_CHECKPOINT, load_pipeline
from diffusers import DiffusionPipeline
from emoji.images import IMAGE_SIZE, draw_things, load_rows
from emoji.scenes import NUMBERS, OBJECTS, PAINTED, RELATIONS, Scene, SceneJudge, draw_scene, sample_scene
from emoji.tasks import EmojiTasks
from emoji.words import indefinite_article, make_plural
from tqdm import tqdm

from metamorph_hf import MetaMorphPipeline


BATCH_SIZE = 16
PROMPTS = 100  # of each category, at most
# The single things of a category, or the kind of its held-out scenes.
CATEGORIES = {
    "single_object": OBJECTS,
    "two_objects": "pair",
    "counting": "count",
    "colors": PAINTED,
    "position": "pair",
    "attribute_binding": "binding",
}


def make_prompts(category: str, count: int) -> list[tuple[str, Scene]]:
    """
    Make up to `count` different prompts of a category, each with the scene that it describes; always the same ones.
    Some categories have fewer held-out combinations.
    """
    rng, source, prompts = random.Random(category), CATEGORIES[category], {}
    for _ in range(100 * count):
        if len(prompts) == count:
            break
        if isinstance(source, list):
            scene = Scene((rng.choice(source),))
        else:
            found = sample_scene(rng, held_out=True, kind=source)
            scene = Scene(found.things, relation=found.relation if category == "position" else "left")
        if category == "counting":
            text = f"{NUMBERS[len(scene.things)]} {make_plural(scene.things[0])}"
        else:
            joint = RELATIONS[scene.relation] if category == "position" else "and"
            text = f" {joint} ".join(f"{indefinite_article(thing)} {thing}" for thing in scene.things)
        prompts.setdefault(text, scene)
    return [*prompts.items()]


def is_right(judge: SceneJudge, image: torch.Tensor, scene: Scene, category: str) -> bool:
    """Return whether an image shows what the category asks for."""
    verdict = judge.judge(image, scene)
    needed = {"counting": ("objects", "count"), "position": ("objects", "relation")}.get(category, ("objects",))
    return all(verdict[name] for name in needed)


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, 1927), in percent."""
    z, share = 1.96, right / count
    center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return 100 * (center - half), 100 * (center + half)


def generate(pipe: DiffusionPipeline, prompts: list[str], seed: int) -> torch.Tensor:
    """Generate an image for each prompt, resized to 128x128: uint8 pixels (prompts, 3, 128, 128)."""
    images, options = [], {}
    if isinstance(pipe, MetaMorphPipeline):  # with a single image per answer, in the order of the prompts
        options = {"generation_kwargs": {"force_image": True, "max_images": 1}}
    for start in tqdm(range(0, len(prompts), BATCH_SIZE), desc="generating images"):
        batch = prompts[start : start + BATCH_SIZE]
        generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(batch))]
        generated = pipe(batch, generator=generators, output_type="pt", **options).images
        generated = F.interpolate(generated.float().cpu(), size=(IMAGE_SIZE, IMAGE_SIZE), mode="area")
        images.append((255 * generated).round().clamp(0, 255).byte())
    return torch.cat(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default=EMOJI_CHECKPOINT, help="folder or Hub id (default: the emoji model)")
    parser.add_argument(
        "--limit", type=int, help="number of prompts, rounded up to as many of each category (default: 100 of each)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    if args.limit is not None and args.limit < len(CATEGORIES):
        parser.error(f"--limit must be at least {len(CATEGORIES)}, one prompt of each category.")
    count = PROMPTS if args.limit is None else -(-args.limit // len(CATEGORIES))
    pipe = load_pipeline(args.pipeline, any_class=True)
    pipe.set_progress_bar_config(disable=True)

    sprites = draw_things(EmojiTasks(load_rows(), scenes=0))
    judge, result = SceneJudge(sprites), {}
    for category in CATEGORIES:
        prompts = make_prompts(category, count)
        images = generate(pipe, [text for text, _ in prompts], args.seed)
        right = sum(is_right(judge, image, scene, category) for image, (_, scene) in zip(images, prompts))
        real = sum(is_right(judge, draw_scene(scene, sprites), scene, category) for _, scene in prompts)
        low, high = wilson_interval(right, len(prompts))
        result[category] = {"score": 100 * right / len(prompts), "interval": [low, high], "prompts": len(prompts)}
        result[category]["judge_on_real_scenes"] = 100 * real / len(prompts)
    result["overall"] = sum(result[category]["score"] for category in CATEGORIES) / len(CATEGORIES)
    text = json.dumps(result, indent=2)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
