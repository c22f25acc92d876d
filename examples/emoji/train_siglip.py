"""Step 1 of the emoji recipe: a small SigLIP on the names and pictures of both vendors.

Only its vision tower is kept: its patch features are MetaMorph's visual tokens.
"""

import math
import random
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import trange
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel, get_cosine_schedule_with_warmup


MAX_CAPTION_TOKENS = 16


def build_siglip(tokenizer: PreTrainedTokenizerFast, quick: bool = False) -> SiglipModel:
    """A SigLIP with 16x16 patches on 64x64 pixels (2 M parameters in the vision tower)."""
    width, depth = (32, 1) if quick else (192, 4)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 32}
    text = {**sizes, "num_hidden_layers": min(depth, 2), "vocab_size": len(tokenizer), "projection_size": width}
    text |= {"max_position_embeddings": MAX_CAPTION_TOKENS, "bos_token_id": None, "eos_token_id": None}
    text["pad_token_id"] = tokenizer.pad_token_id
    vision = {**sizes, "num_hidden_layers": depth, "image_size": 64, "patch_size": 16}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    # Sigmoid loss starts at scale 10 and bias -10 (SigLIP paper, section 3.2); transformers leaves both at 0.
    model.logit_scale.data.fill_(math.log(10.0))
    model.logit_bias.data.fill_(-10.0)
    return model


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Small shifts, scalings, blur, brightness changes and noise on (B, 3, 64, 64) pixels in [-1, 1].

    A painted picture is never exactly the original: the tower must not care about such differences.
    """
    batch = pixels.shape[0]

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(batch, generator=generator) * (high - low) + low

    scale, shift_x, shift_y = uniform(0.9, 1.12), uniform(-0.1, 0.1), uniform(-0.1, 0.1)
    zero = torch.zeros(batch)
    theta = torch.stack([torch.stack([scale, zero, shift_x], -1), torch.stack([zero, scale, shift_y], -1)], 1)
    grid = F.affine_grid(theta, pixels.shape, align_corners=False)
    pixels = 1 - F.grid_sample(1 - pixels, grid, align_corners=False)  # white outside the picture
    blur = uniform(0, 1).view(-1, 1, 1, 1) * (uniform(0, 1) < 0.4).view(-1, 1, 1, 1)
    pixels = torch.lerp(pixels, F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1), blur)
    pixels = pixels * uniform(0.9, 1.1).view(-1, 1, 1, 1)
    noise = torch.randn(pixels.shape, generator=generator) * uniform(0, 0.12).view(-1, 1, 1, 1)
    return (pixels + noise).clamp(-1, 1)


def captions_of(row: dict) -> list[str]:
    tone = f" with {row['skin_tone']} skin tone" if row["skin_tone"] else ""
    return [name + tone for name in (row["name"], row["name"], *row["aliases"])]


def train_siglip(
    rows: list[dict],
    pixels: torch.Tensor,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    steps: int,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    seed: int = 0,
    quick: bool = False,
    bf16: bool = False,
) -> SiglipModel:
    """Train, or continue from `out/state.pt`, and save the model in `out`.

    Args:
        rows: The pictures' metadata, without pixels.
        pixels: uint8 (len(rows), 3, 64, 64).
    """
    torch.manual_seed(seed)
    model = build_siglip(tokenizer, quick)
    if bf16:
        model.set_attn_implementation("eager")  # the gradient of torch's fused attention is slow in bfloat16 on a CPU
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)

    by_picture = defaultdict(list)  # the two vendors' drawings of one thing never meet in a batch as false negatives
    for index, row in enumerate(rows):
        by_picture[row["base"], row["skin_tone"]].append(index)
    pictures = list(by_picture.values())
    # Base emoji and skin-tone variants in equal parts, though one third of the variants are the same gesture.
    weights = torch.tensor([1.0 if rows[group[0]]["skin_tone"] == "" else 0.5 for group in pictures])
    ids = {
        caption: tokenizer(
            caption, padding="max_length", max_length=MAX_CAPTION_TOKENS, truncation=True, add_special_tokens=False
        ).input_ids
        for row in rows
        for caption in captions_of(row)
    }

    first_step, state = 0, out / "state.pt"
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        first_step = saved["step"]
    out.mkdir(parents=True, exist_ok=True)

    model.train()
    progress = trange(first_step, steps, desc="1/4 SigLIP", initial=first_step, total=steps, mininterval=2)
    for step in progress:
        rng, generator = random.Random(f"{seed}-{step}"), torch.Generator().manual_seed(seed * 1_000_003 + step)
        groups = torch.multinomial(weights, min(batch_size, len(pictures)), generator=generator).tolist()
        batch = [rng.choice(pictures[group]) for group in groups]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(
                input_ids=torch.tensor([ids[rng.choice(captions_of(rows[index]))] for index in batch]),
                pixel_values=augment(pixels[batch].float() / 127.5 - 1, generator),
                return_loss=True,
            )
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            hits = (output.logits_per_image.argmax(1) == torch.arange(len(batch))).float().mean()
            progress.set_postfix(loss=f"{output.loss.item():.3f}", right_caption=f"{hits.item():.0%}", refresh=False)
        if (step + 1) % 200 == 0 and step + 1 < steps:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            saved["scheduler"] = scheduler.state_dict()
            torch.save(saved, state.with_suffix(".tmp"))
            state.with_suffix(".tmp").replace(state)
    model.eval().save_pretrained(out)
    state.unlink(missing_ok=True)
    return model
