"""The emoji images in memory, and their visual tokens."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from tqdm import tqdm

from metamorph_hf import MetaMorphForConditionalGeneration


PARQUET = Path(__file__).parent / "emoji.parquet"


def load_images() -> tuple[list[dict], torch.Tensor]:
    """Load the rows without their images, and all images as uint8 pixels (2 * len(rows), 3, 64, 64).

    The center crops (the middle 32x32, enlarged) follow the whole images, as `emoji_tasks` numbers them.
    """
    dataset = Dataset.from_parquet(str(PARQUET))
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in dataset["image"]]).permute(0, 3, 1, 2)
    crops = F.interpolate(pixels[:, :, 16:48, 16:48].float(), size=(64, 64), mode="bicubic", align_corners=False)
    return dataset.remove_columns("image").to_list(), torch.cat([pixels, crops.round().clamp(0, 255).byte()])


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Map uint8 pixels to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


@torch.no_grad()
def encode_images(model: MetaMorphForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Encode uint8 pixels (I, 3, 64, 64) into visual tokens (I, N, V), float32 on the CPU."""
    batches = tqdm(pixels.split(256), desc="encoding images", leave=False)
    return torch.cat([model.eval().get_visual_tokens(normalize(batch)).float() for batch in batches])
