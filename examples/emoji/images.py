"""The emoji drawings as pixels, and their visual tokens."""

import hashlib
import sys
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from tqdm import tqdm

from metamorph_hf import MetaMorphForConditionalGeneration

from .scenes import MEANINGS, THINGS, draw_scene
from .tasks import CYCLES, EmojiTasks


PARQUET = Path(__file__).parent / "emoji.parquet"
CACHE = Path.home() / ".cache" / "metamorph_hf"
IMAGE_SIZE = 128
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_rows(quick: bool = False) -> list[dict]:
    """Load the rows of `emoji.parquet`, or for a quick trial about a tenth of them, scenes and sequences included."""
    rows = Dataset.from_parquet(str(PARQUET)).to_list()
    if quick:
        wanted = {MEANINGS.get(thing, thing) for thing in THINGS}
        frames = {code for cycle in CYCLES.values() for code in cycle}
        rows = [
            row
            for row in rows
            if row["base"] in frames or row["base"][3] == "0" or (row["name"] in wanted and row["style"] == "google")
        ]
    return rows


def render_png(svg: str, size: int = IMAGE_SIZE) -> bytes:
    """Render an SVG file into a square PNG file with a transparent background."""
    try:
        from resvg_py import svg_to_bytes
    except ModuleNotFoundError:
        sys.exit('The emoji are stored as SVG and drawn by resvg-py, which is not installed: pip install ".[emoji]".')
    return bytes(svg_to_bytes(svg_string=svg, width=size, height=size))


def render(svg: str, size: int) -> np.ndarray:
    """Render an SVG file into uint8 pixels with premultiplied opacity (size, size, 4)."""
    image = np.array(Image.open(BytesIO(render_png(svg, size))).convert("RGBA"), dtype=np.uint16)
    image[..., :3] = (image[..., :3] * image[..., 3:] + 127) // 255
    return image.astype(np.uint8)


def load_sprites(rows: list[dict], size: int = IMAGE_SIZE) -> torch.Tensor:
    """Render all rows, or read them from the cache: uint8 (rows, 4, size, size), colors multiplied by opacity."""
    digest = hashlib.sha256(f"{size}".encode() + "".join(row["svg"] for row in rows).encode()).hexdigest()[:16]
    file = CACHE / f"emoji-{digest}.npy"
    if not file.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        sprites = np.stack([render(row["svg"], size) for row in tqdm(rows, desc="rendering emoji")])
        temporary = file.with_suffix(".tmp.npy")
        np.save(temporary, sprites.transpose(0, 3, 1, 2))
        temporary.replace(file)
    return torch.from_numpy(np.load(file))


def place_on(sprites: torch.Tensor, color: tuple[int, int, int] = (255, 255, 255)) -> torch.Tensor:
    """Place sprites (I, 4, height, width) on a plain background: uint8 pixels (I, 3, height, width)."""
    background = torch.tensor(color).view(3, 1, 1)
    return (sprites[:, :3] + (background * (255 - sprites[:, 3:].int()) + 127) // 255).clamp(max=255).byte()


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Map uint8 pixels to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def enlarge_centers(images: torch.Tensor) -> torch.Tensor:
    """Cut out the middle half of uint8 images (I, 3, size, size) and enlarge it to their size."""
    size = images.shape[-1]
    middle = slice(size // 4, 3 * size // 4)
    crops = F.interpolate(images[:, :, middle, middle].float(), scale_factor=2, mode="bicubic")
    return crops.round().clamp(0, 255).byte()


@torch.no_grad()
def encode_images(model: MetaMorphForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Encode uint8 pixels (I, 3, height, width) into visual tokens (I, N, V), float32 on the CPU."""
    batches = tqdm(pixels.split(256), desc="encoding images", leave=False)
    encode = model.eval().get_visual_tokens
    return torch.cat([encode(normalize(batch.to(model.device))).float().cpu() for batch in batches])


def load_images(tasks: EmojiTasks) -> torch.Tensor:
    """Draw all images that `EmojiTasks` numbers: rows, scenes and center crops, uint8 (I, 3, 128, 128).

    All sprites are rendered and cached on the disk (716 MB); `draw_images` renders only what it is asked for.
    """
    sprites = load_sprites(tasks.rows)
    things = {thing: sprites[row] for thing, row in tasks.sprite_rows.items()}
    scenes = [draw_scene(scene, things) for scene in tqdm(tasks.scenes, desc="drawing scenes")]
    images = torch.cat([place_on(part) for part in sprites.split(256)])
    return torch.cat([images, *([torch.stack(scenes)] if scenes else []), enlarge_centers(images[tasks.bases])])


@lru_cache(maxsize=2048)
def draw_sprite(svg: str) -> torch.Tensor:
    """Render an SVG file, or return it from the last 2,048: uint8 (4, 128, 128), colors multiplied by opacity."""
    return torch.from_numpy(render(svg, IMAGE_SIZE)).permute(2, 0, 1)


def draw_things(tasks: EmojiTasks, things: Sequence[str] = THINGS) -> dict[str, torch.Tensor]:
    """Draw the sprites (4, 128, 128) of things in scenes, by word."""
    return {thing: draw_sprite(tasks.rows[tasks.sprite_rows[thing]]["svg"]) for thing in things}


def draw_image(tasks: EmojiTasks, number: int) -> torch.Tensor:
    """Draw one of the images that `EmojiTasks` numbers: uint8 (3, 128, 128)."""
    rows, scenes = len(tasks.rows), len(tasks.scenes)
    if number < rows:
        return place_on(draw_sprite(tasks.rows[number]["svg"])[None])[0]
    if number < rows + scenes:
        scene = tasks.scenes[number - rows]
        return draw_scene(scene, draw_things(tasks, scene.things))
    return enlarge_centers(draw_image(tasks, tasks.bases[number - rows - scenes])[None])[0]


def draw_images(tasks: EmojiTasks, numbers: Sequence[int]) -> torch.Tensor:
    """Draw several of the images that `EmojiTasks` numbers: uint8 (I, 3, 128, 128)."""
    return torch.stack([draw_image(tasks, number) for number in numbers])
