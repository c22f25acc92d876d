"""Functions of the emoji tasks for lmms-eval."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from resvg_py import svg_to_bytes

from metamorph_hf import MetaMorphForConditionalGeneration, MetaMorphProcessor
from metamorph_hf.image_reading import read_image


EMOJI = Path(__file__).resolve().parents[1]


def show_nothing(doc: dict) -> list:
    return []


def compare_names(doc: dict, results: list[str]) -> dict:
    return {"accuracy": float(results[0] == doc["answer"])}


def collect_image(doc: dict, results: list[str]) -> dict:
    """Return the path of the answer's first image, None if it has none, and the row of the real one."""
    return {"retrieval_top1": {"row": doc["row"], "image": next(iter(json.loads(results[0])["images"]), None)}}


@torch.no_grad()
def retrieve(items: list[dict]) -> float:
    """Return the share of answers whose image is nearest to its own real one, by the tower of the emoji checkpoint.

    The other candidates are the real images of the other questions. An answer without an image is not found.
    """
    model = MetaMorphForConditionalGeneration.from_pretrained(EMOJI / "checkpoint" / "model").eval()
    processor = MetaMorphProcessor.from_pretrained(EMOJI / "checkpoint" / "processor")

    def encode(images: list[Image.Image]) -> torch.Tensor:
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return F.normalize(torch.cat([model.get_visual_tokens(part) for part in pixels.split(64)]).flatten(1), dim=1)

    rows = Dataset.from_parquet(str(EMOJI / "emoji.parquet"))
    drawings = [svg_to_bytes(svg_string=rows[item["row"]]["svg"], width=128, height=128) for item in items]
    real = encode([read_image(bytes(drawing)) for drawing in drawings])
    found = 0
    for index, item in enumerate(items):
        if item["image"] is not None:
            similarity = real @ encode([Image.open(item["image"]).convert("RGB")])[0]
            # Some emoji have the same image up to the byte; they count as one.
            found += bool((similarity <= similarity[index] + 1e-5).all())
    return found / len(items)
