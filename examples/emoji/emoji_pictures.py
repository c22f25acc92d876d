"""The emoji pictures in memory: rows of `emoji.parquet`, and pixels of every picture id of `emoji_tasks`."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
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
