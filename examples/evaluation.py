"""Measures and figures that the evaluation scripts share."""

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw


def rank_references(encoded: torch.Tensor, references: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Count the references that are nearer to an image than its own, by the cosine of their flattened visual tokens.

    References that are identical cannot be told apart and count as one. `encoded` (I, N, V) and `references` (R, N, V)
    are visual tokens, `targets` (I,) the index of each image's own reference. Returns (I,) int64; 0 is best.
    """

    def flatten(visual_tokens: torch.Tensor) -> torch.Tensor:
        return F.normalize(visual_tokens.float().flatten(1), dim=1)

    encoded = flatten(encoded)
    similarity = torch.cat([encoded @ flatten(block).T for block in references.split(1024)], dim=1)
    # Identical images have identical tokens up to rounding.
    return (similarity > similarity.gather(1, targets[:, None]) + 1e-5).sum(1)


def draw_contact_sheet(cells: list[tuple[str, Image.Image | None, Image.Image | None]], size: int) -> Image.Image:
    """Draw cells of a caption, the generated image and the real one, three in a row. A missing image stays white."""
    step = size + 10
    width, height = max(300, 2 * step + 16), size + 24
    sheet = Image.new("RGB", (3 * width, -(-len(cells) // 3) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (caption, *images) in enumerate(cells):
        x, y = index % 3 * width + 8, index // 3 * height + 4
        pen.text((x, y), caption if len(caption) < 48 else caption[:45] + "...", fill="black")
        for number, image in enumerate(images):
            if image is not None:
                sheet.paste(image.resize((size, size)), (x + number * step, y + 16))
    return sheet
