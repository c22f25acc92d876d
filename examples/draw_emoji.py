"""Draw emoji as images, for scripts that read images: a parquet file with the columns `image` and `name`.

python examples/draw_emoji.py runs/emoji_images.parquet --limit 500
"""

import argparse
import random
from pathlib import Path

from common import exit_with_sentence
from datasets import Dataset, Features, Image, Value
from emoji.images import IMAGE_SIZE, load_rows, render_png
from emoji.tasks import STYLES

from metamorph_hf.image_reading import read_image


def draw(style: str, size: int, limit: int | None) -> Dataset:
    """Draw the emoji of a style on white, without those of a skin tone, or `limit` of them in random order."""
    rows = [row for row in load_rows() if row["style"] == style and not row["skin_tone"]]
    if limit is not None:
        rows = random.Random(0).sample(rows, min(limit, len(rows)))
    columns = {
        "image": [read_image(render_png(row["svg"], size)) for row in rows],
        "name": [row["name"] for row in rows],
    }
    return Dataset.from_dict(columns, Features(image=Image(), name=Value("string")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="parquet file to write")
    parser.add_argument("--style", choices=STYLES, default="google", help="whose drawings (default: google)")
    parser.add_argument("--size", type=int, default=IMAGE_SIZE, help=f"side in pixels (default: {IMAGE_SIZE})")
    parser.add_argument("--limit", type=int, help="number of emoji (default: all)")
    args = parser.parse_args()
    with exit_with_sentence():
        args.output.parent.mkdir(parents=True, exist_ok=True)
        dataset = draw(args.style, args.size, args.limit)
        dataset.to_parquet(args.output)
    print(f"saved {args.output} ({len(dataset)} images of {args.size}x{args.size})")


if __name__ == "__main__":
    main()
