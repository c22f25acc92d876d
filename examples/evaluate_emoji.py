"""Measure the emoji model: print one JSON object and write a contact sheet.

    python examples/evaluate_emoji.py                       # ten minutes on 2 CPU cores
    python examples/evaluate_emoji.py --limit 100           # fewer questions of each kind

Retrieval ranks an answer among the base images of all emoji (for edits, among Google's skin-tone variants) by the
cosine of their flattened visual tokens. Images that are identical to the byte, as the flags of Norway and Svalbard,
cannot be told apart and count as one. Scenes are judged by `SceneJudge`, which is not the model; `judge_*` are the
shares that it finds right in real scenes.
"""

import argparse
import json
import random
from pathlib import Path

import torch
import yaml
from common import EMOJI_CHECKPOINT, load_pipeline
from emoji.images import load_images, load_rows, load_sprites
from emoji.scenes import SceneJudge, draw_scene
from emoji.tasks import DEFAULT_PHRASING, EmojiTasks
from evaluation import draw_contact_sheet, rank_references
from tqdm import tqdm
from transformers.image_transforms import to_pil_image

from metamorph_hf import MetaMorphPipeline


BATCH_SIZE = 64
BORDER = 8  # pixels between the borders of the autoencoder's patches
REAL_IMAGES = 200  # images that are decoded from their real visual tokens
EVERYDAY_PROMPTS = Path(__file__).parent / "emoji" / "everyday_prompts.yaml"
SHOWN_SCENES = 6


def add_images(record: dict, pixels: torch.Tensor) -> list[dict]:
    """Return the record's messages with its images in place of their numbers."""
    (turn,), images = record["messages"], iter(record["images"])
    content = [
        {"type": "image", "image": to_pil_image(pixels[next(images)].numpy())} if part["type"] == "image" else part
        for part in turn["content"]
    ]
    return [{**turn, "content": content}]


@torch.no_grad()
def generate_answers(
    pipe: MetaMorphPipeline, records: list[dict], pixels: torch.Tensor, progress: str
) -> tuple[list[str], torch.Tensor]:
    """Answer each record greedily.

    Returns:
        The texts, and the visual tokens (records, N, V) of each answer's first image; zeros if it has none.
    """
    config, texts = pipe.model.config, []
    generated = torch.zeros(len(records), config.num_image_tokens, config.visual_token_dim)
    for start in tqdm(range(0, len(records), BATCH_SIZE), desc=progress):
        inputs = pipe.processor.apply_chat_template(
            [add_images(record, pixels) for record in records[start : start + BATCH_SIZE]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        max_new_tokens = config.num_image_tokens + 8
        output = pipe.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True
        )
        texts += pipe.processor.decode_generated(output.sequences[:, inputs["input_ids"].shape[1] :])
        for index, images in enumerate(output.visual_tokens, start):
            generated[index] = images[0] if len(images) else 0
    return texts, generated


@torch.no_grad()
def encode(pipe: MetaMorphPipeline, pixels: torch.Tensor) -> torch.Tensor:
    """Encode uint8 pixels (I, 3, height, width), resized to what the model reads, into visual tokens (I, N, V)."""
    encoded = []
    for batch in tqdm(pixels.split(BATCH_SIZE), desc="encoding images", leave=False):
        inputs = pipe.processor.image_processor(images=[*batch], return_tensors="pt")
        encoded.append(pipe.model.get_visual_tokens(inputs["pixel_values"]).float())
    return torch.cat(encoded)


def decode(pipe: MetaMorphPipeline, visual_tokens: torch.Tensor) -> torch.Tensor:
    """Decode visual tokens (I, N, V) into uint8 pixels (I, 3, height, width)."""
    generator = torch.Generator().manual_seed(0)
    batches = tqdm(visual_tokens.split(BATCH_SIZE), desc="decoding images")
    images = [pipe.decode_visual_tokens(batch, generator=generator, output_type="pt") for batch in batches]
    return (255 * torch.cat(images)).round().byte()


def measure_psnr(images: torch.Tensor, references: torch.Tensor) -> float:
    """Return the mean peak signal-to-noise ratio, in dB, of uint8 images (I, 3, height, width)."""
    error = (images.float() - references.float()).square().flatten(1).mean(1).clamp(min=1e-3)
    return (10 * (255**2 / error).log10()).mean().item()


def measure_borders(images: torch.Tensor) -> float:
    """Return how large steps across the borders of patches are, relative to those elsewhere."""
    steps = [images.float().diff(dim=dim).abs().transpose(dim, 1).flatten(2).mean((0, 2)) for dim in (2, 3)]
    at_border = torch.arange(1, images.shape[-1]) % BORDER == 0
    return (sum(s[at_border].mean() for s in steps) / sum(s[~at_border].mean() for s in steps)).item()


def measure_sharpness(images: torch.Tensor) -> float:
    """Return the mean absolute Laplacian of uint8 images (I, 3, height, width)."""
    laplacian = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).expand(3, 1, 3, 3)
    return torch.nn.functional.conv2d(images.float(), laplacian, groups=3).abs().mean().item()


def evaluate(pipe: MetaMorphPipeline, limit: int | None) -> tuple[dict[str, float], list[tuple]]:
    """Return the numbers by name, and rows of prompt, generated and real image for the contact sheet."""
    tasks = EmojiTasks(load_rows())
    rows, pixels = tasks.rows, load_images(tasks)
    bases, variants = (
        tasks.bases,
        [i for i, row in enumerate(tasks.rows) if row["style"] == "google" and row["skin_tone"]],
    )
    visual_tokens = torch.zeros(len(rows), pipe.model.config.num_image_tokens, pipe.model.config.visual_token_dim)
    visual_tokens[bases + variants] = encode(pipe, pixels[bases + variants])
    rng, results, cells = random.Random(0), {}, []

    def answer(kind: str) -> tuple[list[dict], list[str], torch.Tensor]:
        records = tasks.evaluation(kind)
        if limit is not None:
            records = rng.sample(records, min(limit, len(records)))
        return records, *generate_answers(pipe, records, pixels, progress=kind)

    def rank(generated: torch.Tensor, answers: list[list[int]], candidates: list[int]) -> torch.Tensor:
        """Return the rank of the best of each record's right answers; the last one for an answer without an image."""
        place = {image: index for index, image in enumerate(candidates)}
        owners = [number for number, right in enumerate(answers) for _ in right]
        targets = torch.tensor([place[image] for right in answers for image in right])
        ranks = rank_references(generated[owners], visual_tokens[candidates], targets)
        ranks = ranks.where(generated[owners].flatten(1).any(1), len(candidates))
        best = torch.full((len(answers),), len(candidates))
        return best.scatter_reduce(0, torch.tensor(owners), ranks, "amin")

    def share(name: str, ranks: torch.Tensor, top: int) -> None:
        results[f"{name}_top{top}"] = 100 * (ranks < top).float().mean().item()

    everyday = yaml.safe_load(EVERYDAY_PROMPTS.read_text(encoding="utf-8"))
    by_name = {rows[image]["name"]: image for image in bases}
    requests = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": DEFAULT_PHRASING.replace("{}", prompt)}]}
            ],
            "images": [],
            "answer": [by_name[name] for name in names.split("|")],
        }
        for prompt, names in everyday.items()
    ][:limit]
    _, generated = generate_answers(pipe, requests, pixels, progress="everyday prompts")
    share("everyday", rank(generated, [request["answer"] for request in requests], bases), 1)
    decoded = decode(pipe, generated)
    for i in rng.sample(range(len(requests)), min(24, len(requests))):
        cells.append(([*everyday][i], decoded[i], pixels[requests[i]["answer"][0]]))

    records, _, generated = answer("held_out_keywords")
    share("held_out_keywords", rank(generated, [record["answer"] for record in records], bases), 5)
    for kind in ("seen_phrasings", "unseen_phrasings"):
        records, _, generated = answer(kind)
        answers = [[record["answer"]] for record in records]
        for top in (1, 5):
            share(kind, rank(generated, answers, bases), top)
    decoded = decode(pipe, generated)
    share("decoded_and_encoded_again", rank(encode(pipe, decoded), answers, bases), 1)
    results["sharpness_of_generated"] = measure_sharpness(decoded) / measure_sharpness(
        pixels[[right[0] for right in answers]]
    )

    held_out = [tasks.index["twitter", base, ""] for base in sorted(tasks.held_out_images)]
    for name, images in (("trained", rng.sample(bases, REAL_IMAGES)), ("held_out", held_out)):
        images = images[:limit]
        again = decode(pipe, encode(pipe, pixels[images]))
        real = (
            torch.nn.functional.interpolate(pixels[images].float(), size=again.shape[-2:], mode="area").round().byte()
        )
        results[f"psnr_{name}"] = measure_psnr(again, real)
        results[f"borders_{name}"] = measure_borders(again)
        results[f"borders_{name}_real"] = measure_borders(real)
        results[f"sharpness_{name}"] = measure_sharpness(again) / measure_sharpness(real)

    for kind in ("name_google", "name_twitter_held_out", "category_twitter_held_out"):
        records, texts, _ = answer(kind)
        results[kind] = 100 * sum(t == record["answer"] for t, record in zip(texts, records)) / len(records)
    for kind, candidates in (("edit_held_out", variants), ("sequence_held_out", bases)):
        records, _, generated = answer(kind)
        share(kind, rank(generated, [[record["answer"]] for record in records], candidates), 1)
        image = records[0]["answer"]
        cells.append((records[0]["messages"][0]["content"][-1]["text"], decode(pipe, generated[:1])[0], pixels[image]))

    sprites = load_sprites(rows)
    things = {thing: sprites[row] for thing, row in tasks.sprite_rows.items()}
    judge = SceneJudge(things)
    real = random.Random(7).sample(range(len(tasks.scenes)), min(200, limit or 200))
    verdicts = [judge.judge(pixels[len(rows) + i], tasks.scenes[i]) for i in tqdm(real, desc="judging real scenes")]
    results |= {f"judge_{name}": value for name, value in average(verdicts).items()}
    verdicts = []
    for kind in ("scene_color", "scene_count", "scene_pair"):
        records, _, generated = answer(kind)
        decoded = decode(pipe, generated)
        verdicts += [judge.judge(image, record["answer"]) for image, record in zip(decoded, records)]
        for record, image in list(zip(records, decoded))[:SHOWN_SCENES]:
            text = record["messages"][0]["content"][-1]["text"].removeprefix("Generate an image of ")
            cells.append((text, image, draw_scene(record["answer"], things)))
    results |= {f"scene_{name}": value for name, value in average(verdicts).items()}
    return results, [(text, to_pil_image(image.numpy()), to_pil_image(real.numpy())) for text, image, real in cells]


def average(verdicts: list[dict[str, bool]]) -> dict[str, float]:
    """Return the share in percent of each verdict, over the images that were judged by it."""
    names = dict.fromkeys(name for verdict in verdicts for name in verdict)
    return {
        name: 100 * sum(v[name] for v in verdicts if name in v) / sum(name in v for v in verdicts) for name in names
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=EMOJI_CHECKPOINT, help="a MetaMorphPipeline folder")
    parser.add_argument("--sheet", type=Path, default=EMOJI_CHECKPOINT.with_name("contact_sheet.png"))
    parser.add_argument("--limit", type=int, help="maximum number of questions of each kind (default: all)")
    args = parser.parse_args()
    pipe = load_pipeline(args.checkpoint, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    results, cells = evaluate(pipe, args.limit)
    draw_contact_sheet(cells, size=76).save(args.sheet)
    print(json.dumps({name: round(value, 1) for name, value in results.items()}, indent=2))


if __name__ == "__main__":
    main()
