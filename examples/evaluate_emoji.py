"""Measure the emoji model: print one JSON object and write a contact sheet.

    python examples/evaluate_emoji.py                       # five to ten minutes on 2 CPU cores
    python examples/evaluate_emoji.py --limit 100           # fewer questions of each kind

Retrieval ranks an answer among all of Google's base images (for edits, among Google's skin-tone variants) by the
cosine of their flattened visual tokens. Images that are identical to the byte, as the flags of Norway and Svalbard,
cannot be told apart and count as one.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from common import EMOJI_CHECKPOINT, load_pipeline
from emoji.emoji_images import encode_images, load_images
from emoji.emoji_tasks import EmojiTasks
from evaluation import draw_contact_sheet, rank_references
from tqdm import tqdm
from transformers.image_transforms import to_pil_image

from metamorph_hf import MetaMorphPipeline


BATCH_SIZE = 128


def add_images(record: dict, pixels: torch.Tensor) -> list[dict]:
    """Return the record's messages with its images in place of their ids."""
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
        output = pipe.model.generate(**inputs, max_new_tokens=24, do_sample=False, return_dict_in_generate=True)
        texts += pipe.processor.decode_generated(output.sequences[:, inputs["input_ids"].shape[1] :])
        for index, images in enumerate(output.visual_tokens, start):
            generated[index] = images[0] if len(images) else 0
    return texts, generated


def decode(pipe: MetaMorphPipeline, visual_tokens: torch.Tensor) -> torch.Tensor:
    """Decode visual tokens (I, N, V) into uint8 pixels (I, 3, 64, 64)."""
    generator = torch.Generator().manual_seed(0)
    batches = tqdm(visual_tokens.split(BATCH_SIZE), desc="decoding images")
    images = [pipe.decode_visual_tokens(batch, generator=generator, output_type="pt") for batch in batches]
    return (255 * torch.cat(images)).round().byte()


def evaluate(pipe: MetaMorphPipeline, limit: int | None) -> tuple[dict[str, float], list[tuple]]:
    """Return the numbers by name, and rows of prompt, generated and real image for the contact sheet."""
    rows, pixels = load_images()
    pixels, tasks = pixels[: len(rows)], EmojiTasks(rows)
    visual_tokens, bases = encode_images(pipe.model, pixels), tasks.google
    variants = [i for i, row in enumerate(rows) if row["vendor"] == "google" and row["skin_tone"]]
    results = {}

    def answer(kind: str) -> tuple[list[dict], list[str], torch.Tensor]:
        records = tasks.evaluation(kind)
        if limit is not None:
            records = random.Random(0).sample(records, min(limit, len(records)))
        return records, *generate_answers(pipe, records, pixels, progress=kind)

    def retrieve(name: str, generated: torch.Tensor, answers: list[int], candidates: list[int], *tops: int) -> None:
        targets = torch.tensor([candidates.index(answer) for answer in answers])
        ranks = rank_references(generated, visual_tokens[candidates], targets)
        ranks = ranks.where(generated.flatten(1).any(1), len(candidates))  # an answer without an image is wrong
        results.update({f"{name}_top{top}": 100 * (ranks < top).float().mean().item() for top in tops})

    requests, _, generated = answer("seen_phrasings")
    targets = [record["answer"] for record in requests]
    retrieve("seen_phrasings", generated, targets, bases, 1, 5)
    decoded = decode(pipe, generated)
    retrieve("decoded_and_encoded_again", encode_images(pipe.model, decoded), targets, bases, 1)
    real = bases[::10]  # the visualizer alone
    encoded = encode_images(pipe.model, decode(pipe, visual_tokens[real]))
    retrieve("decoded_from_real_tokens", encoded, real, bases, 1)
    for kind in ("name_google", "name_twitter_held_out", "category_twitter_held_out"):
        records, texts, _ = answer(kind)
        results[kind] = 100 * sum(t == record["answer"] for t, record in zip(texts, records)) / len(records)
    retrievals = ("unseen_phrasings", bases, 1, 5), ("edit_held_out", variants, 1), ("sequence_held_out", bases, 1)
    for kind, candidates, *tops in retrievals:
        records, _, images = answer(kind)
        retrieve(kind, images, [record["answer"] for record in records], candidates, *tops)

    cells = []
    for i in random.Random(2).sample(range(len(requests)), min(36, len(requests))):
        prompt = requests[i]["messages"][0]["content"][-1]["text"]
        cells.append((prompt, *(to_pil_image(image.numpy()) for image in (decoded[i], pixels[targets[i]]))))
    return results, cells


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
