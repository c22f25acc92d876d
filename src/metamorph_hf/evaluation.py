"""Measures and figures that evaluation scripts share."""

import PIL.Image
import torch
import torch.nn.functional as F
from PIL import ImageDraw


def rank_references(encoded: torch.Tensor, references: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Count the references that are nearer to an image than its own, by the cosine of their flattened visual tokens.

    References that are identical cannot be told apart and count as one.

    Args:
        encoded (`torch.Tensor` of shape (I, N, V)): Visual tokens of the images.
        references (`torch.Tensor` of shape (R, N, V)): Visual tokens of the references.
        targets (`torch.Tensor` of shape (I,), int64): The index of each image's own reference.

    Returns:
        `torch.Tensor` of shape (I,), int64: 0 is best.
    """

    def flatten(visual_tokens: torch.Tensor) -> torch.Tensor:
        return F.normalize(visual_tokens.float().flatten(1), dim=1)

    encoded = flatten(encoded)
    similarity = torch.cat([encoded @ flatten(block).T for block in references.split(1024)], dim=1)
    # Identical images have identical tokens up to rounding.
    return (similarity > similarity.gather(1, targets[:, None]) + 1e-5).sum(1)


def draw_contact_sheet(
    rows: list[tuple[str, PIL.Image.Image | None, PIL.Image.Image | None]], columns: int = 3, size: int = 76
) -> PIL.Image.Image:
    """
    Draw a cell per row with its caption, the generated image and the real one; a missing image leaves a white square.

    Args:
        rows (`list[tuple]`): Caption, generated image and real image.
        columns (`int`, *optional*, defaults to 3): Cells side by side.
        size (`int`, *optional*, defaults to 76): Side of an image in pixels.
    """
    step = size + 10
    width, height = max(300, 2 * step + 16), size + 24
    sheet = PIL.Image.new("RGB", (columns * width, -(-len(rows) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (caption, *images) in enumerate(rows):
        x, y = index % columns * width + 8, index // columns * height + 4
        pen.text((x, y), caption if len(caption) < 48 else caption[:45] + "...", fill="black")
        for number, image in enumerate(images):
            if image is not None:
                sheet.paste(image.resize((size, size)), (x + number * step, y + 16))
    return sheet


__all__ = ["draw_contact_sheet", "rank_references"]
