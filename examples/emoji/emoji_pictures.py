"""The emoji pictures in memory: rows of `emoji.parquet`, pixels of all picture ids of `emoji_tasks`, conversations."""

import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from emoji_tasks import EmojiTasks
from tqdm import tqdm

from metamorph_hf import MetaMorphForConditionalGeneration


PARQUET = Path(__file__).parent / "emoji.parquet"


def load_pictures(parquet: Path = PARQUET) -> tuple[list[dict], torch.Tensor]:
    """
    Returns:
        The rows without pixels, and uint8 pixels (2 * len(rows), 3, 64, 64): each picture, then each centre crop (the
        middle 32x32 enlarged), as `emoji_tasks` numbers them.
    """
    dataset = Dataset.from_parquet(str(parquet))
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in dataset["image"]]).permute(0, 3, 1, 2)
    crops = F.interpolate(pixels[:, :, 16:48, 16:48].float(), size=(64, 64), mode="bicubic", align_corners=False)
    return dataset.remove_columns("image").to_list(), torch.cat([pixels, crops.round().clamp(0, 255).byte()])


@torch.no_grad()
def encode_pictures(
    model: MetaMorphForConditionalGeneration, pixels: torch.Tensor, batch_size: int = 256
) -> torch.Tensor:
    """Visual tokens (pictures, N, V) of uint8 pixels (pictures, 3, 64, 64); float32 on the CPU."""
    model.eval()
    batches = tqdm(pixels.split(batch_size), desc="encoding pictures", leave=False)
    return torch.cat([model.get_visual_tokens(batch.float() / 127.5 - 1).float() for batch in batches])


def training_stream(
    tasks: EmojiTasks,
    mixture: dict[str, float],
    size: int,
    group: int,
    column: str,
    look_up: Callable[[int, int, str], Any],
    num_views: int = 1,
) -> Dataset:
    """
    `size` conversations, made when they are read. Each depends on its place alone, so resuming changes nothing.
    Conversations of like length stand together in groups of `group`, so that little of a batch is padding.

    Args:
        column (`str`): What pictures are called: `"images"` or `"visual_tokens"`.
        look_up (`Callable`): Gives the picture for (view, picture id, task).
        num_views (`int`): A question shows one of this many views of a picture; an answer shows view 0.
    """
    pool = 16 * group

    @lru_cache(maxsize=4)
    def records_of_pool(number: int) -> list[dict]:
        rng = random.Random(f"pool {number}")
        names = rng.choices(list(mixture), weights=mixture.values(), k=pool)
        records = [tasks.sample(name, rng) for name in names]
        for record in records:
            asked = sum(part["type"] == "image" for part in record["messages"][0]["content"])
            record["views"] = [rng.randrange(num_views) if n < asked else 0 for n in range(len(record["images"]))]
        records.sort(
            key=lambda record: 4 * 18 * len(record["images"]) + len(str(record["messages"]))
        )  # 4 letters a token
        groups = [records[start : start + group] for start in range(0, pool, group)]
        rng.shuffle(groups)
        return [record for records in groups for record in records]

    def read(columns: dict) -> dict:
        records = [records_of_pool(place // pool)[place % pool] for place in columns["place"]]
        return {
            "messages": [record["messages"] for record in records],
            column: [
                [
                    look_up(view, image, record["task"])
                    for view, image in zip(record["views"], record["images"], strict=True)
                ]
                for record in records
            ],
        }

    return Dataset.from_dict({"place": range(size)}).with_transform(read)
