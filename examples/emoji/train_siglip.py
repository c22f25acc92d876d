"""Step 1 of the emoji recipe: a small SigLIP on the names and images of both vendors.

Only its vision tower is kept: its patch features are MetaMorph's visual tokens.
"""

import math
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from emoji_images import normalize
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel, Trainer, TrainingArguments

from metamorph_hf.vpit.trainer import last_complete_checkpoint


MAX_CAPTION_TOKENS = 16
BATCH_SIZE = 128
TRAINING = {  # also for the stages of VPiT
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
    "adam_beta2": 0.98,
    "train_sampling_strategy": "sequential",
    "use_cpu": True,
    "bf16": True,
    "dataloader_pin_memory": False,
    "save_steps": 200,
    "save_total_limit": 1,
    "report_to": "none",
}


def build_siglip(tokenizer: PreTrainedTokenizerFast, quick: bool) -> SiglipModel:
    """Build a SigLIP with 16x16 patches on 64x64 pixels (2 M parameters in the vision tower)."""
    width, depth = (32, 1) if quick else (192, 4)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 32}
    text = {**sizes, "num_hidden_layers": min(depth, 2), "vocab_size": len(tokenizer), "projection_size": width}
    text |= {"max_position_embeddings": MAX_CAPTION_TOKENS, "bos_token_id": None, "eos_token_id": None}
    text["pad_token_id"] = tokenizer.pad_token_id
    vision = {**sizes, "num_hidden_layers": depth, "image_size": 64, "patch_size": 16}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    # The sigmoid loss starts at scale 10 and bias -10 (SigLIP paper, section 3.2); transformers leaves both at 0.
    model.logit_scale.data.fill_(math.log(10.0))
    model.logit_bias.data.fill_(-10.0)
    return model


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Apply small shifts, scalings, blur, brightness changes and noise to (B, 3, 64, 64) pixels in [-1, 1].

    A generated image is never exactly the original, so the tower must not care about such differences.
    """
    batch = pixels.shape[0]

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(batch, generator=generator) * (high - low) + low

    scale, shift_x, shift_y = uniform(0.9, 1.12), uniform(-0.1, 0.1), uniform(-0.1, 0.1)
    zero = torch.zeros(batch)
    theta = torch.stack([torch.stack([scale, zero, shift_x], -1), torch.stack([zero, scale, shift_y], -1)], 1)
    grid = F.affine_grid(theta, pixels.shape, align_corners=False)
    pixels = 1 - F.grid_sample(1 - pixels, grid, align_corners=False)  # white outside the image
    blur = uniform(0, 1).view(-1, 1, 1, 1) * (uniform(0, 1) < 0.4).view(-1, 1, 1, 1)
    pixels = torch.lerp(pixels, F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1), blur)
    pixels = pixels * uniform(0.9, 1.1).view(-1, 1, 1, 1)
    noise = torch.randn(pixels.shape, generator=generator) * uniform(0, 0.12).view(-1, 1, 1, 1)
    return (pixels + noise).clamp(-1, 1)


class SiglipBatches(Dataset):
    """The batches of all steps, each made from its step's number alone, so that resuming changes nothing."""

    def __init__(self, rows: list[dict], pixels: torch.Tensor, tokenizer: PreTrainedTokenizerFast, steps: int):
        self.rows, self.pixels, self.tokenizer, self.steps = rows, pixels, tokenizer, steps
        by_emoji = defaultdict(list)  # the vendors' images of one emoji never meet in a batch as false negatives
        for index, row in enumerate(rows):
            by_emoji[row["base"], row["skin_tone"]].append(index)
        self.groups = list(by_emoji.values())
        # Base emoji and skin-tone variants in equal parts, though one third of the variants are the same gesture.
        self.weights = torch.tensor([0.5 if rows[group[0]]["skin_tone"] else 1.0 for group in self.groups])

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        rng, generator = random.Random(f"0-{step}"), torch.Generator().manual_seed(step)
        groups = torch.multinomial(self.weights, min(BATCH_SIZE, len(self.groups)), generator=generator)
        indices = [rng.choice(self.groups[group]) for group in groups.tolist()]
        captions = []
        for row in (self.rows[index] for index in indices):
            tone = f" with {row['skin_tone']} skin tone" if row["skin_tone"] else ""
            captions.append(rng.choice([row["name"], row["name"], *row["aliases"]]) + tone)
        options = {"padding": "max_length", "max_length": MAX_CAPTION_TOKENS, "truncation": True}
        ids = self.tokenizer(captions, **options, add_special_tokens=False, return_tensors="pt")["input_ids"]
        pixels = augment(normalize(self.pixels[indices]), generator)
        return {"input_ids": ids, "pixel_values": pixels, "return_loss": True}


def train_siglip(
    rows: list[dict], pixels: torch.Tensor, tokenizer: PreTrainedTokenizerFast, out: Path, steps: int, quick: bool
) -> None:
    """Train on uint8 pixels (rows, 3, 64, 64), or continue from a checkpoint in `out`, and save the model in `out`."""
    torch.manual_seed(0)
    model = build_siglip(tokenizer, quick)
    model.set_attn_implementation("eager")  # the gradient of torch's fused attention is slow in bfloat16 on a CPU
    args = TrainingArguments(
        str(out),
        **TRAINING,
        max_steps=steps,
        per_device_train_batch_size=1,  # an item of the dataset is a whole batch
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        remove_unused_columns=False,
        logging_steps=100,
    )
    batches = SiglipBatches(rows, pixels, tokenizer, steps)
    trainer = Trainer(model, args, data_collator=lambda items: items[0], train_dataset=batches)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(out))
    model.eval().save_pretrained(out)
