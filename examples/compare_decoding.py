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
from functools import partial
from pathlib import Path

import torch
from emoji.images import encode_images, load_images
from emoji.siglip import TRAINING
from emoji.tasks import EmojiTasks, corpus, training_stream
from tqdm import tqdm
from train_emoji import CHECKPOINT, NUM_IMAGE_TOKENS, build_model, build_tokenizer
from transformers import SiglipImageProcessorPil, SiglipVisionModel, set_seed

from metamorph_hf import MetaMorphForConditionalGeneration, MetaMorphProcessor, VPiTConfig, VPiTTrainer


DECODINGS = {
    "autoregressive": {"visual_token_noise": 0.0},
    "autoregressive, noise 2.5": {"visual_token_noise": 2.5},
    "parallel": {"visual_token_noise": 0.0, "visual_decoding": "parallel"},
}
SEEDS = (0, 1, 2)
STEPS = 800
EVERY = 5  # the runs learn every fifth emoji
SIZES = {"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 4, "num_attention_heads": 3}
SIZES |= {"num_key_value_heads": 3, "initializer_range": 192**-0.5}
BATCH_SIZE = 32
KINDS = ("seen_phrasings", "unseen_phrasings")


def train(model, processor, tasks: EmojiTasks, visual_tokens: torch.Tensor, out: Path, seed: int, steps: int) -> None:
    """Train on text-to-image conversations alone, `steps` batches of them."""
    model.set_attn_implementation("eager")  # the gradient of torch's fused attention is slow in bfloat16 on a CPU
    options = {**TRAINING, "save_strategy": "no"}
    args = VPiTConfig(
        str(out),
        **options,
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


@torch.no_grad()
def measure(model, processor, tasks: EmojiTasks, visual_tokens: torch.Tensor, limit: int | None) -> dict[str, float]:
    """Return the share of requests, in percent, whose answer is nearest to the right one of Google's images."""
    model.eval()
    candidates = torch.nn.functional.normalize(visual_tokens[tasks.google].float().flatten(1), dim=1)
    results = {}
    for kind in KINDS:
        records, right = tasks.evaluation(kind)[:limit], 0
        for start in tqdm(range(0, len(records), 64), desc=kind, leave=False):
            batch = records[start : start + 64]
            inputs = processor.apply_chat_template(
                [record["messages"] for record in batch],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
            options = {"max_new_tokens": NUM_IMAGE_TOKENS + 3, "do_sample": False, "force_image": True}
            output = model.generate(**inputs, **options, return_dict_in_generate=True)
            generated = torch.stack([images[0] for images in output.visual_tokens]).float().flatten(1)
            nearest = candidates[(generated @ candidates.T).argmax(1)]
            answers = torch.stack([visual_tokens[record["answer"]] for record in batch]).float().flatten(1)
            # Images that are identical to the byte count as one.
            right += (torch.nn.functional.cosine_similarity(nearest, answers) > 0.9999).sum().item()
        results[kind] = 100 * right / len(records)
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

    rows, pixels = load_images()
    pixels, tasks = pixels[: len(rows)], EmojiTasks(rows)
    tasks.google = tasks.google[::EVERY]
    tasks.names = tasks.names[::EVERY]
    tasks.emphasis = tasks.emphasis[::EVERY]
    bases = {rows[image]["base"] for image in tasks.google}
    tasks.google_variants = [image for image in tasks.google_variants if rows[image]["base"] in bases]
    image_processor = SiglipImageProcessorPil(size={"height": 64, "width": 64}, do_convert_rgb=True)
    processor = MetaMorphProcessor(image_processor, build_tokenizer(corpus(tasks)), num_image_tokens=NUM_IMAGE_TOKENS)
    trained = MetaMorphForConditionalGeneration.from_pretrained(CHECKPOINT / "model", dtype=torch.float32)
    tower: SiglipVisionModel = trained.model.vision_tower
    visual_tokens = encode_images(trained, pixels)
    make_model = partial(build_model, processor, tower, args.quick, sizes={} if args.quick else SIZES)

    for seed in SEEDS[: 1 if args.quick else None]:
        for decoding, options in DECODINGS.items():
            if any(result["seed"] == seed and result["decoding"] == decoding for result in results):
                continue
            set_seed(seed)
            model = make_model(seed=seed, **options)
            train(model, processor, tasks, visual_tokens, args.out, seed, 3 if args.quick else STEPS)
            measured = measure(model, processor, tasks, visual_tokens, 8 if args.quick else None)
            results.append({"decoding": decoding, "seed": seed, **measured})
            with file.open("a") as lines:
                lines.write(json.dumps(results[-1]) + "\n")
            print(results[-1], flush=True)
    print(summarize(results))


if __name__ == "__main__":
    main()
