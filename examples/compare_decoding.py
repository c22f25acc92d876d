"""Compare autoregressive and parallel decoding of visual tokens on the emoji data, three seeds each.

    python examples/compare_decoding.py    # nine runs of about ten minutes -> runs/decoding/results.jsonl
    python examples/compare_decoding.py --quick --out runs/quick_decoding

Each run trains a small language model from random weights to generate emoji, around the vision tower of the committed
checkpoint. Everything but the decoding is the same: data, steps, learning rate. Then the model answers a request for
every emoji it was trained on, and the nearest real image by visual tokens counts as its answer. A finished run is
not run again.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from common import EMOJI_CHECKPOINT, load_pipeline
from emoji.images import load_rows
from emoji.language import build_language_model
from emoji.siglip import ATTENTION, TRAINING
from emoji.tasks import EmojiTasks, corpus, training_stream
from evaluate_emoji import encode_images
from evaluation import generate_answers, rank_references
from train_emoji import build_model, build_tokenizer
from transformers import set_seed

from metamorph_hf import MetaMorphForConditionalGeneration, MetaMorphProcessor, VPiTConfig, VPiTTrainer


DECODINGS = {
    "autoregressive": {"visual_decoding": "autoregressive"},
    "autoregressive, noise 2.5": {"visual_decoding": "autoregressive", "visual_token_noise": 2.5},
    "parallel": {"visual_decoding": "parallel"},
}
SEEDS = (0, 1, 2)
STEPS = 800
EVERY = 5  # the runs learn every fifth emoji
WIDTH, DEPTH = 192, 4  # of the language model
BATCH_SIZE = 32
KINDS = ("seen_phrasings", "unseen_phrasings")


def choose_emoji(tasks: EmojiTasks, every: int) -> None:
    """Restrict the text-to-image tasks to every n-th emoji and their skin tones."""
    tasks.bases, tasks.names = tasks.bases[::every], tasks.names[::every]
    tasks.emphasis = tasks.emphasis[::every]
    bases = {tasks.rows[image]["base"] for image in tasks.bases}
    tasks.variants = [image for image in tasks.variants if tasks.rows[image]["base"] in bases]


def train(
    model: MetaMorphForConditionalGeneration,
    processor: MetaMorphProcessor,
    tasks: EmojiTasks,
    visual_tokens: dict[int, torch.Tensor],
    out: Path,
    seed: int,
    steps: int,
) -> None:
    """Train on text-to-image conversations alone, `steps` batches of them."""
    model.set_attn_implementation(ATTENTION)
    args = VPiTConfig(
        str(out),
        **{**TRAINING, "save_strategy": "no"},
        stage="full",
        seed=seed,
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 25),
        max_length=256,
        activation_checkpointing=False,
        logging_steps=max(1, steps // 15),
    )

    def look_up(view: int, image: int, task: str) -> torch.Tensor:
        return visual_tokens[image]

    stream = training_stream(tasks, {"text_to_image": 1}, steps * BATCH_SIZE, BATCH_SIZE, "visual_tokens", look_up)
    VPiTTrainer(model, args, processing_class=processor, train_dataset=stream).train()


def measure(
    model: MetaMorphForConditionalGeneration,
    processor: MetaMorphProcessor,
    tasks: EmojiTasks,
    visual_tokens: dict[int, torch.Tensor],
    limit: int | None,
) -> dict[str, float]:
    """Return the share of requests, in percent, whose answer is nearest to the right one of the real images."""
    references = torch.stack([visual_tokens[image] for image in tasks.bases])
    results = {}
    for kind in KINDS:
        records = tasks.evaluation(kind)[:limit]
        requests = [record["messages"] for record in records]
        _, generated = generate_answers(model, processor, requests, kind, force_image=True)
        answers = torch.tensor([tasks.bases.index(record["answer"]) for record in records])
        results[kind] = 100 * (rank_references(generated, references, answers) == 0).float().mean().item()
    return results


def summarize(results: list[dict]) -> str:
    """Make a Markdown table of mean and range over the seeds."""
    lines = ["| decoding | seen wordings | unseen wordings |", "|---|---|---|"]
    for decoding in DECODINGS:
        cells = []
        for kind in KINDS:
            values = [result[kind] for result in results if result["decoding"] == decoding]
            if values:
                cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        lines.append(" | ".join([f"| {decoding}", *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/decoding"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed, to see that it runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    tasks = EmojiTasks(load_rows())
    tokenizer = build_tokenizer(corpus(tasks))
    choose_emoji(tasks, every=100 if args.quick else EVERY)
    trained = load_pipeline(EMOJI_CHECKPOINT, device="cpu")
    processor = MetaMorphProcessor(
        trained.processor.image_processor, tokenizer, num_image_tokens=trained.model.config.num_image_tokens
    )
    images = [*tasks.bases, *tasks.variants]
    visual_tokens = dict(zip(images, encode_images(trained, tasks, images), strict=True))

    for seed in SEEDS[: 1 if args.quick else None]:
        for decoding, options in DECODINGS.items():
            if any(result["seed"] == seed and result["decoding"] == decoding for result in results):
                continue
            set_seed(seed)
            language_model = build_language_model(tokenizer, args.quick, WIDTH, DEPTH)
            model = build_model(processor, trained.model.model.vision_tower, language_model, seed=seed, **options)
            train(model, processor, tasks, visual_tokens, args.out, seed, 3 if args.quick else STEPS)
            measured = measure(model, processor, tasks, visual_tokens, 8 if args.quick else None)
            results.append({"decoding": decoding, "seed": seed, **measured})
            with file.open("a") as lines:
                lines.write(json.dumps(results[-1]) + "\n")
            print(results[-1], flush=True)
    print(summarize(results))


if __name__ == "__main__":
    main()
