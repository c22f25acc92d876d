"""Answers, measures and figures that the scripts share."""

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from metamorph_hf import MetaMorphForConditionalGeneration, MetaMorphProcessor


ANSWER_BATCH_SIZE = 64
MAX_WORDS = 32  # tokens of an answer's text


@torch.no_grad()
def generate_answers(
    model: MetaMorphForConditionalGeneration,
    processor: MetaMorphProcessor,
    conversations: list[list[dict]],
    progress: str,
    **options,
) -> tuple[list[str], torch.Tensor]:
    """Answer conversations greedily, by an image and at most `MAX_WORDS` tokens of text.

    `options` are those of `generate()`.

    Returns:
        The texts, and the visual tokens (conversations, N, V) of each answer's first image, float32 on the CPU; zeros
        if it has none.
    """
    config, texts = model.config, []
    generated = torch.zeros(len(conversations), config.num_image_tokens, config.visual_token_dim)
    length = {"max_new_tokens": config.num_image_tokens + 2 + MAX_WORDS}
    for start in tqdm(range(0, len(conversations), ANSWER_BATCH_SIZE), desc=progress, leave=False):
        inputs = processor.prepare_prompts(conversations[start : start + ANSWER_BATCH_SIZE]).to(model.device)
        output = model.eval().generate(**inputs, **length, **options, do_sample=False, return_dict_in_generate=True)
        texts += processor.decode_generated(output.sequences[:, inputs["input_ids"].shape[1] :])
        for index, images in enumerate(output.visual_tokens, start):
            generated[index] = images[0].float().cpu() if len(images) else 0
    return texts, generated


def rank_references(encoded: torch.Tensor, references: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Count the references that are nearer to an image than its own, by the cosine of their flattened visual tokens.

    References that are identical cannot be told apart and count as one. `encoded` (I, N, V) and `references` (R, N, V)
    are visual tokens, `targets` (I,) the index of each image's own reference. Returns (I,) int64; 0 is best, and zeros
    in the place of a missing image have rank R.
    """

    def flatten(visual_tokens: torch.Tensor) -> torch.Tensor:
        return F.normalize(visual_tokens.float().flatten(1), dim=1)

    encoded = flatten(encoded)
    similarity = torch.cat([encoded @ flatten(block).T for block in references.split(1024)], dim=1)
    # Identical images have identical tokens up to rounding.
    ranks = (similarity > similarity.gather(1, targets[:, None]) + 1e-5).sum(1)
    return ranks.where(encoded.any(1), len(references))


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
