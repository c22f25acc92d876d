"""Step 1 of the emoji recipe: a small SigLIP on words and images of all styles, and on scenes.

Only its vision tower is kept: its patch features are MetaMorph's visual tokens. A linear layer that predicts each
patch's pixels from its visual token is trained beside the contrastive loss, so that the tokens keep what a visualizer
needs. It is thrown away afterwards.
"""

import math
import os
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel, Trainer, TrainingArguments

from metamorph_hf.vpit.trainer import last_complete_checkpoint

from .images import DEVICE, IMAGE_SIZE, normalize
from .tasks import EmojiTasks, describe_scene, expand


MAX_CAPTION_TOKENS = 20
BATCH_SIZE = 96
PATCH_SIZE = 16
PIXEL_LOSS_WEIGHT = 20.0
TRAINING = {  # also for the language model and the stages of VPiT
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
    "adam_beta2": 0.98,
    "train_sampling_strategy": "sequential",
    "use_cpu": DEVICE.type == "cpu",
    "bf16": True,
    "dataloader_pin_memory": False,
    "dataloader_num_workers": 0 if DEVICE.type == "cpu" else min(12, os.cpu_count() - 1),
    "save_steps": 500,
    "save_total_limit": 1,
    "report_to": "none",
}
# The gradient of torch's fused attention is slow in bfloat16 on a CPU.
ATTENTION = "eager" if DEVICE.type == "cpu" else "sdpa"


class PixelSiglip(SiglipModel):
    """[`SiglipModel`] that also predicts the pixels of each patch from its visual token."""

    def __init__(self, config: SiglipConfig):
        super().__init__(config)
        width = config.vision_config.hidden_size
        self.pixel_head = nn.Linear(width, 3 * PATCH_SIZE**2)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, clean_pixels: torch.Tensor, **kwargs):
        outputs = super().forward(pixel_values=pixel_values, return_loss=True, output_hidden_states=True, **kwargs)
        features = outputs.vision_model_output.hidden_states[-1]
        tokens = F.normalize(features.float(), dim=-1) * features.shape[-1] ** 0.5
        patches = F.unfold(clean_pixels, PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2)
        outputs.loss = outputs.loss + PIXEL_LOSS_WEIGHT * F.mse_loss(self.pixel_head(tokens).float(), patches)
        return outputs


def build_siglip(tokenizer: PreTrainedTokenizerFast, quick: bool) -> PixelSiglip:
    """Build a SigLIP with 16x16 patches on 128x128 pixels (2 M parameters in the vision tower)."""
    width, depth = (32, 1) if quick else (192, 4)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 32}
    text = {**sizes, "num_hidden_layers": min(depth, 2), "vocab_size": len(tokenizer), "projection_size": width}
    text |= {"max_position_embeddings": MAX_CAPTION_TOKENS, "bos_token_id": None, "eos_token_id": None}
    text["pad_token_id"] = tokenizer.pad_token_id
    vision = {**sizes, "num_hidden_layers": depth, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    model = PixelSiglip(SiglipConfig(text_config=text, vision_config=vision))
    # The sigmoid loss starts at scale 10 and bias -10 (SigLIP paper, section 3.2); transformers leaves both at 0.
    model.logit_scale.data.fill_(math.log(10.0))
    model.logit_bias.data.fill_(-10.0)
    return model


def augment(pixels: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply small shifts, scalings, blur, brightness changes and noise to (B, 3, height, width) pixels in [-1, 1].

    A generated image is never exactly the original, so the tower must not care about such differences. The pixels and
    the generator must be on one device.

    Returns:
        The augmented pixels, and the pixels that are only shifted and scaled.
    """
    batch = pixels.shape[0]

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(batch, generator=generator, device=pixels.device) * (high - low) + low

    scale, shift_x, shift_y = uniform(0.92, 1.1), uniform(-0.07, 0.07), uniform(-0.07, 0.07)
    zero = torch.zeros(batch, device=pixels.device)
    theta = torch.stack([torch.stack([scale, zero, shift_x], -1), torch.stack([zero, scale, shift_y], -1)], 1)
    grid = F.affine_grid(theta, pixels.shape, align_corners=False)
    # A scene's background goes on outside of the image.
    pixels = moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    blur = uniform(0, 1).view(-1, 1, 1, 1) * (uniform(0, 1) < 0.4).view(-1, 1, 1, 1)
    pixels = torch.lerp(pixels, F.avg_pool2d(F.pad(pixels, (2, 2, 2, 2), mode="replicate"), 5, 1), blur)
    pixels = pixels * uniform(0.92, 1.08).view(-1, 1, 1, 1)
    noise = torch.randn(pixels.shape, generator=generator, device=pixels.device) * uniform(0, 0.1).view(-1, 1, 1, 1)
    return (pixels + noise).clamp(-1, 1), moved


class SiglipBatches(Dataset):
    """The batches of all steps, each made from its step's number alone, so that resuming changes nothing."""

    def __init__(self, tasks: EmojiTasks, pixels: torch.Tensor, tokenizer: PreTrainedTokenizerFast, steps: int):
        self.tasks, self.pixels, self.tokenizer, self.steps = tasks, pixels, tokenizer, steps
        by_emoji = defaultdict(list)  # the styles' images of one emoji never meet in a batch as false negatives
        for index, row in enumerate(tasks.rows):
            by_emoji[row["base"], row["skin_tone"]].append(index)
        self.groups = list(by_emoji.values())
        self.weights = torch.tensor([0.25 if tasks.rows[group[0]]["skin_tone"] else 1.0 for group in self.groups])

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        rng, generator = random.Random(f"0-{step}"), torch.Generator().manual_seed(step)
        rows, num_scenes = self.tasks.rows, min(BATCH_SIZE // 4, len(self.tasks.scenes))
        groups = torch.multinomial(self.weights, BATCH_SIZE - BATCH_SIZE // 4, generator=generator)
        indices = [rng.choice(self.groups[group]) for group in groups.tolist()]
        captions = []
        for row in (rows[index] for index in indices):
            caption = self.tasks.words.choose_phrase(row["base"], rng)
            if row["skin_tone"]:
                caption = f"{caption} with {row['skin_tone']} skin tone"
            if rng.random() < 0.3:
                caption = expand("styled", rng, style=row["style"].capitalize()).replace("{}", caption)
            captions.append(caption)
        scenes = rng.sample(range(len(self.tasks.scenes)), num_scenes)
        captions += [describe_scene(self.tasks.scenes[scene], rng) for scene in scenes]
        indices += [len(rows) + scene for scene in scenes]
        options = {"padding": "max_length", "max_length": MAX_CAPTION_TOKENS, "truncation": True}
        ids = self.tokenizer(captions, **options, add_special_tokens=False, return_tensors="pt")["input_ids"]
        pixels, clean = augment(normalize(self.pixels[indices]), generator)
        return {"input_ids": ids, "pixel_values": pixels, "clean_pixels": clean}


def train_siglip(
    tasks: EmojiTasks, pixels: torch.Tensor, tokenizer: PreTrainedTokenizerFast, out: Path, steps: int, quick: bool
) -> None:
    """Train on uint8 pixels (rows and scenes, 3, 128, 128), or continue from a checkpoint in `out`, and save there."""
    torch.manual_seed(0)
    model = build_siglip(tokenizer, quick)
    model.set_attn_implementation(ATTENTION)
    args = TrainingArguments(
        str(out),
        **TRAINING,
        max_steps=steps,
        per_device_train_batch_size=1,  # an item of the dataset is a whole batch
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        remove_unused_columns=False,
        logging_steps=50,
    )
    batches = SiglipBatches(tasks, pixels, tokenizer, steps)
    trainer = Trainer(model, args, data_collator=lambda items: items[0], train_dataset=batches)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(out))
    model.eval().save_pretrained(out)
