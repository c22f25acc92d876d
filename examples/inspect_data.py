"""Look at training data before you train on it.

    python examples/inspect_data.py examples/configs/mixture.yaml --model examples/emoji/checkpoint --html page.html

CONFIG is a YAML file with a `mixture`, as for train_vpit.py, and with `seed`, `mixture_size`, `max_length` and
`on_too_long` if you like. Prints a table of the mixture, the lengths of its samples, and some samples token by token:
[text targets], {visual targets}, and context without brackets.
"""

import argparse
import base64
import html
import io
import sys
import time
from collections import deque
from collections.abc import Iterable
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import yaml
from common import resolve_model
from torch.utils.data import DataLoader
from tqdm import tqdm

from metamorph_hf import MetaMorphConfig, MetaMorphForConditionalGeneration, MetaMorphProcessor, VPiTConfig
from metamorph_hf.data.formats import BadSample
from metamorph_hf.data.mixture import load_mixture, mixture_table
from metamorph_hf.image_reading import read_image
from metamorph_hf.vpit.collator import DataCollatorForVPiT


STYLES = {"context": "color:#777", "text": "background:#cfc", "visual": "background:#fc9"}
BRACKETS = {"context": "{}", "text": "[{}]", "visual": "{{{}}}"}


def split_by_kind(batch: dict, processor: MetaMorphProcessor) -> list[tuple[str, str]]:
    """Split a batch of one into (kind, text) runs of context, text targets and visual targets."""
    image_id, spans = processor.image_token_id, []
    pairs = zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist())
    kinds = {-100: "context", image_id: "visual"}
    for kind, run in groupby(pairs, lambda pair: kinds.get(pair[1], "text")):
        text = ""
        for is_image, group in groupby((token for token, _ in run), lambda token: token == image_id):
            tokens = list(group)
            text += f"<image> x {len(tokens)}" if is_image else processor.tokenizer.decode(tokens)
        spans.append((kind, text))
    return spans


def format_histogram(lengths: list[int]) -> str:
    counts, edges = np.histogram(lengths, bins=min(10, max(lengths)), range=(0, max(lengths)))
    bars = [f"{edge:>8.0f}{count:>8} {'#' * round(40 * count / counts.max())}" for edge, count in zip(edges, counts)]
    return "\n".join([f"tokens per sample: median {np.median(lengths):g}, longest {max(lengths)}", *bars])


def build_page(records: list[dict], spans: list[list[tuple[str, str]]], table: str) -> str:
    """Build an HTML page of the samples, each with its images in reading order."""
    legend = " ".join(f'<span style="{style}">{kind}</span>' for kind, style in STYLES.items())
    page = f"<!doctype html><meta charset='utf-8'><title>Training data</title><pre>{html.escape(table)}</pre>{legend}"
    for record, parts in zip(records, spans):
        page += f"<h3>{html.escape('{task}: {id} of {source}'.format(**record))}</h3><p>"
        page += "".join(f'<span style="{STYLES[kind]}">{html.escape(text)}</span>' for kind, text in parts) + "</p>"
        for image in record["images"]:
            buffer, thumbnail = io.BytesIO(), read_image(image)
            thumbnail.thumbnail((160, 160))
            thumbnail.save(buffer, "PNG")
            page += f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    return page


def measure_seconds(iterable: Iterable) -> float:
    start = time.perf_counter()
    deque(iterable, maxlen=0)
    return time.perf_counter() - start


def print_throughput(records: list[dict], collate: DataCollatorForVPiT, model: MetaMorphForConditionalGeneration):
    """Print the speed of the collator, its overhead over decoding and resizing, and the speed of a training step."""
    resize = collate.processor.image_processor
    rows = [record["images"] for record in records if record["images"]]
    decoding = measure_seconds(resize([read_image(image) for image in row], return_tensors="pt") for row in rows)
    if rows:
        collating = measure_seconds(collate([record]) for record in records)
        print(f"overhead of the collator over decoding and resizing: {collating / decoding - 1:.1%}")
    for workers in (0, 1, 2):
        seconds = measure_seconds(DataLoader(records, batch_size=8, num_workers=workers, collate_fn=collate))
        print(f"collator with {workers} workers: {len(records) / seconds:.1f} samples per second")
    model.train().model.vision_tower.requires_grad_(False)
    batch = collate(records[:8])
    for _ in range(2):  # the first one warms up
        seconds = measure_seconds(model(**batch, use_cache=False).loss.backward() for _ in range(1))
    print(f"training step: {len(batch['labels']) / seconds:.1f} samples per second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file with a mixture")
    parser.add_argument("--model", required=True, help="model or pipeline folder whose processor is used")
    parser.add_argument("--samples", type=int, default=5, help="number of samples to print (default: 5)")
    parser.add_argument("--read", type=int, default=200, help="number of samples to read and measure (default: 200)")
    parser.add_argument("--html", type=Path, help="also write the printed samples, with their images, to this page")
    parser.add_argument("--throughput", action="store_true", help="time the collator and a training step")
    args = parser.parse_args()

    config = yaml.safe_load(args.config.read_text())
    if "mixture" not in config:
        sys.exit(f"{args.config} has no mixture: a list of sources, see examples/configs/mixture.yaml.")
    model, processor = resolve_model(args.model)
    processor = MetaMorphProcessor.from_pretrained(processor)
    dataset = load_mixture(config["mixture"], config.get("seed", 42), config.get("mixture_size"))
    table = mixture_table(dataset, args.read)
    print(table, "\n")

    text_config = MetaMorphConfig.from_pretrained(model).text_config
    context = getattr(text_config, "max_position_embeddings", None)  # some language models have no limit
    limits = [limit for limit in (config.get("max_length", VPiTConfig.max_length), context) if limit is not None]
    on_too_long = config.get("on_too_long", "refuse")
    collate = DataCollatorForVPiT(processor, min(limits, default=None), on_too_long=on_too_long)
    records, lengths, spans = [], [], []
    for record in tqdm(islice(dataset, args.read), total=args.read, desc="samples", leave=False):
        try:
            batch = collate([record])
        except BadSample as error:
            print(f"BAD: {error}\n")
            continue
        records.append(record)
        lengths.append(batch["input_ids"].shape[1])
        if len(spans) < args.samples:
            spans.append(split_by_kind(batch, processor))
    if not records:
        sys.exit("None of the samples can be trained on.")
    print(format_histogram(lengths), "\n")
    for record, parts in zip(records, spans):
        print("{task}: {id} of {source}".format(**record))
        print("".join(BRACKETS[kind].format(text) for kind, text in parts), "\n")
    if args.html is not None:
        args.html.write_text(build_page(records, spans, table), encoding="utf-8")
        print(f"saved {args.html}")
    if args.throughput:
        model = MetaMorphForConditionalGeneration.from_pretrained(model, dtype="float32")
        print_throughput(records, collate, model)


if __name__ == "__main__":
    main()
