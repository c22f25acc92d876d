"""Look at training data before you train on it.

    python examples/inspect_data.py examples/configs/mixture.yaml --model examples/emoji/checkpoint --html sheet.html

CONFIG is a YAML file with a `mixture`, as train_vpit.py takes it. Prints what the mixture holds, its lengths, and some
samples token by token: [text targets], {visual targets}, and what is only context. With --html it writes a page of
these samples with their pictures, and with --throughput how many samples a second the collator makes.
"""

import argparse
import base64
import html
import io
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import PIL.Image
import torch
import yaml
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from metamorph_hf import MetaMorphForConditionalGeneration, MetaMorphProcessor
from metamorph_hf.data.mixture import load_mixture, mixture_table
from metamorph_hf.image_reading import BadSample, read_image
from metamorph_hf.vpit.collator import DataCollatorForVPiT


STYLES = {"context": "color:#777", "text": "background:#cfc", "visual": "background:#fc9"}


def spans(batch: dict, processor: MetaMorphProcessor) -> list[tuple[str, str]]:
    """(kind, text) of a batch of one: runs of tokens that are context, text targets or visual targets."""
    kinds = []
    for token, label in zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist()):
        kind = "context" if label == -100 else "visual" if label == processor.image_token_id else "text"
        if kinds and kinds[-1][0] == kind:
            kinds[-1][1].append(token)
        else:
            kinds.append((kind, [token]))
    image = processor.image_token_id
    shown = []
    for kind, tokens in kinds:
        runs, place = [], 0
        while place < len(tokens):
            end = place
            while end < len(tokens) and (tokens[end] == image) == (tokens[place] == image):
                end += 1
            run = tokens[place:end]
            runs.append(f"<image> x {len(run)}" if run[0] == image else processor.tokenizer.decode(run))
            place = end
        shown.append((kind, "".join(runs)))
    return shown


def histogram(lengths: list[int], bins: int = 10) -> str:
    width = max(1, -(-(max(lengths) + 1) // bins))
    counts = Counter(length // width for length in lengths)
    most = max(counts.values())
    lines = [
        f"{place * width:>6}-{(place + 1) * width - 1:<6}{counts[place]:>6} {'#' * round(40 * counts[place] / most)}"
        for place in range(max(counts) + 1)
    ]
    return "\n".join([f"tokens a sample: median {statistics.median(lengths):g}, longest {max(lengths)}", *lines])


def thumbnail(image: PIL.Image.Image) -> str:
    buffer = io.BytesIO()
    image = image.copy()
    image.thumbnail((160, 160))
    image.save(buffer, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def sheet(samples: list[tuple[dict, list[tuple[str, str]]]], table: str) -> str:
    """A page of samples; pictures in reading order under each."""
    blocks = []
    for record, shown in samples:
        text = "".join(f'<span style="{STYLES[kind]}">{html.escape(part)}</span>' for kind, part in shown)
        pictures = "".join(thumbnail(read_image(image)) for image in record["images"] or [])
        name = html.escape(f"{record['task']}: {record['id']} of {record['source']}")
        blocks.append(f"<h3>{name}</h3><p>{text}</p><p>{pictures}</p>")
    legend = " ".join(f'<span style="{style}">{kind}</span>' for kind, style in STYLES.items())
    head = f"<meta charset='utf-8'><title>Training data</title><pre>{html.escape(table)}</pre><p>{legend}</p>"
    return f"<!doctype html>{head}{''.join(blocks)}"


def throughput(dataset, processor: MetaMorphProcessor, model_dir: str, samples: int) -> None:
    """Samples a second of the collator, of decoding and resizing alone, and of the model's training step."""
    subset = Subset(dataset, range(min(samples, len(dataset))))
    collate = DataCollatorForVPiT(processor)
    records = list(subset)
    start = time.perf_counter()
    for record in records:
        if record["images"]:
            processor.image_processor([read_image(image) for image in record["images"]], return_tensors="pt")
    decoding = time.perf_counter() - start
    start = time.perf_counter()
    for record in records:
        collate([record])
    collating = time.perf_counter() - start
    if decoding:
        print(f"overhead beyond decoding and resizing: {collating / decoding - 1:.1%} (at most 20%)")
    for workers in (0, 1, 2):
        loader = DataLoader(subset, batch_size=8, num_workers=workers, collate_fn=collate)
        start = time.perf_counter()
        for _ in loader:
            pass
        print(f"collator, {workers} workers: {len(subset) / (time.perf_counter() - start):.1f} samples a second")
    model = MetaMorphForConditionalGeneration.from_pretrained(model_dir, dtype="float32").train()
    model.model.vision_tower.requires_grad_(False)
    batch = collate(records[:8])
    for _ in range(2):  # the first warms up
        start = time.perf_counter()
        model(**batch, use_cache=False).loss.backward()
        seconds = time.perf_counter() - start
    print(f"training step: {len(batch['labels']) / seconds:.1f} samples a second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file with a mixture")
    parser.add_argument("--model", required=True, help="model or pipeline folder whose processor is used")
    parser.add_argument("--samples", type=int, default=5, help="to print (default: 5)")
    parser.add_argument("--read", type=int, default=200, help="samples to count and measure (default: 200)")
    parser.add_argument("--html", type=Path, help="write a page of the samples to this file")
    parser.add_argument("--throughput", action="store_true", help="time the collator and the model's step")
    args = parser.parse_args()

    config = yaml.safe_load(args.config.read_text())
    if "mixture" not in config:
        sys.exit(f"{args.config} has no mixture: a list of sources, see examples/configs/mixture.yaml.")
    pipeline = (Path(args.model) / "model_index.json").is_file()
    processor = MetaMorphProcessor.from_pretrained(f"{args.model}/processor" if pipeline else args.model)
    dataset = load_mixture(config["mixture"], config.get("seed", 42), config.get("mixture_size"))
    table = mixture_table(dataset, args.read)
    print(table, "\n")

    collate, lengths, shown = DataCollatorForVPiT(processor), [], []
    for place, record in enumerate(tqdm(dataset, total=args.read, desc="samples", leave=False)):
        if place == args.read:
            break
        try:
            batch = collate([record])
        except BadSample as error:
            print(f"BAD: {error}\n")
            continue
        lengths.append(batch["input_ids"].shape[1])
        if len(shown) < args.samples:
            shown.append((record, spans(batch, processor)))
    if not lengths:
        sys.exit("None of the samples can be trained on.")
    print(histogram(lengths), "\n")
    marks = {"context": "{}", "text": "[{}]", "visual": "{{{}}}"}
    for record, parts in shown:
        print(f"{record['task']}: {record['id']} of {record['source']}")
        print("".join(marks[kind].format(text) for kind, text in parts), "\n")
    if args.html is not None:
        args.html.write_text(sheet(shown, table))
        print(f"saved {args.html}")
    if args.throughput:
        torch.manual_seed(0)
        throughput(dataset, processor, f"{args.model}/model" if pipeline else args.model, args.read)


if __name__ == "__main__":
    main()
