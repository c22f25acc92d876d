"""The last steps of the emoji recipe: an autoencoder, and a small latent diffusion model that decodes visual tokens.

The autoencoder turns 128x128 pixels into 16x16 latents. A U-Net then learns to denoise such latents while it attends
to the visual tokens of the same image, at a size that two CPU cores train in an hour.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm, trange

from metamorph_hf import GridUNet2DConditionModel, PatchAutoencoder, VisualTokenProjector
from metamorph_hf.visualizer_training import ConditionedUNet, diffusion_loss

from .images import DEVICE, IMAGE_SIZE, normalize


BATCH_SIZE = 32
AUTOENCODER_BATCH_SIZE = 16
LATENT_NOISE = 0.05  # so that the decoder bears the U-Net's small errors
CONDITIONING_DROPOUT = 0.1  # share of images with zeros as conditioning, the negative embeddings of guidance
CHECKPOINT_EVERY = 250  # steps

Visualizer = tuple[VisualTokenProjector, GridUNet2DConditionModel, DDIMScheduler]


def train(parts: dict, step_loss: Callable[[int], torch.Tensor], out: Path, steps: int, progress: str) -> None:
    """Take `steps` optimization steps, or continue from `out/state.pt`.

    Args:
        parts (`dict`): `optimizer`, `schedule`, `ema` and whatever else is trained, all of which is saved.
        step_loss (`Callable`): Returns the loss of a step, made from the step's number alone.
    """
    first_step, parameters = 0, [p for group in parts["optimizer"].param_groups for p in group["params"]]
    out.mkdir(parents=True, exist_ok=True)
    if (out / "state.pt").is_file():
        saved = torch.load(out / "state.pt", map_location=DEVICE, weights_only=True)
        first_step = saved.pop("step")
        for name, state in saved.items():
            parts[name].load_state_dict(state)
    for step in trange(first_step, steps, desc=progress, initial=first_step, total=steps, disable=first_step == steps):
        step_loss(step).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        parts["optimizer"].step()
        parts["schedule"].step()
        parts["optimizer"].zero_grad()
        parts["ema"].step(parameters)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            torch.save({"step": step + 1} | {k: v.state_dict() for k, v in parts.items()}, out / "state.tmp")
            (out / "state.tmp").replace(out / "state.pt")
    parts["ema"].copy_to(parameters)


def make_optimizer(module: nn.Module, steps: int, learning_rate: float, ema_decay: float) -> dict:
    parameters = [*module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    return {
        "optimizer": optimizer,
        "schedule": get_scheduler("cosine", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps),
        "ema": EMAModel(parameters, decay=ema_decay, use_ema_warmup=True, power=0.75, foreach=True),
    }


def choose_batch(step: int, size: int, count: int) -> torch.Tensor:
    """Choose the indices of a step's batch out of `count` images: epoch by epoch, each in an order of its own."""
    epoch, batch = divmod(step, max(1, count // size))
    return torch.randperm(count, generator=torch.Generator().manual_seed(epoch)).split(size)[batch]


def reconstruction_loss(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compare images (I, 3, height, width) by pixels and by differences of neighbors (edges), at three scales."""
    loss = 4 * F.mse_loss(images, targets)
    for scale in range(3):
        if scale:
            images, targets = F.avg_pool2d(images, 2), F.avg_pool2d(targets, 2)
        loss = loss + F.l1_loss(images, targets)
        loss = loss + F.l1_loss(images.diff(dim=-1), targets.diff(dim=-1))
        loss = loss + F.l1_loss(images.diff(dim=-2), targets.diff(dim=-2))
    return loss


def train_autoencoder(pixels: torch.Tensor, out: Path, steps: int, quick: bool) -> PatchAutoencoder:
    """Train on uint8 pixels (I, 3, 128, 128), or continue from `out/state.pt`."""
    torch.manual_seed(0)
    sizes = {"latent_channels": 4, "width": 16, "refiner_layers": 1, "refiner_width": 8}
    autoencoder = PatchAutoencoder(**sizes) if quick else PatchAutoencoder(latent_channels=32, refiner_layers=4)
    autoencoder.train().to(DEVICE, memory_format=torch.channels_last)

    def step_loss(step: int) -> torch.Tensor:
        images = normalize(pixels[choose_batch(step, AUTOENCODER_BATCH_SIZE, len(pixels))].to(DEVICE))
        with torch.autocast(DEVICE.type, torch.bfloat16):
            latents = autoencoder.encode(images).latent_dist.mode()
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(step))
            decoded = autoencoder.decode(latents + LATENT_NOISE * noise.to(DEVICE)).sample
        return reconstruction_loss(decoded.float(), images)

    parts = {"autoencoder": autoencoder, **make_optimizer(autoencoder, steps, 2e-3, 0.995)}
    train(parts, step_loss, out, steps, "autoencoder")
    # The diffusion wants latents of unit variance.
    with torch.no_grad():
        sample = normalize(pixels[:: max(1, len(pixels) // 256)].to(DEVICE))
        latents = autoencoder.encode(sample).latent_dist.mode()
    autoencoder.register_to_config(scaling_factor=1 / latents.std().item())
    return autoencoder.eval()


@torch.no_grad()
def encode_latents(autoencoder: PatchAutoencoder, pixels: torch.Tensor) -> torch.Tensor:
    """Encode uint8 pixels (I, 3, 128, 128) into latents of unit variance (I, C, h, w), float16 on the CPU."""
    batches = (normalize(batch.to(DEVICE)) for batch in tqdm(pixels.split(64), desc="encoding latents", leave=False))
    latents = torch.cat([autoencoder.encode(batch).latent_dist.mode().half().cpu() for batch in batches])
    return latents * autoencoder.config.scaling_factor


def build_visualizer(visual_tokens: torch.Tensor, autoencoder: PatchAutoencoder, quick: bool) -> Visualizer:
    """Build a visualizer for visual tokens (I, N, V)."""
    torch.manual_seed(0)
    width = 32 if quick else 192
    projector = VisualTokenProjector(
        visual_token_dim=visual_tokens.shape[2],
        cross_attention_dim=width,
        hidden_dim=2 * width,
        num_image_tokens=visual_tokens.shape[1],
        sequence_length=None,
    )
    unet = GridUNet2DConditionModel(
        sample_size=IMAGE_SIZE // autoencoder.config.patch_size,
        in_channels=autoencoder.config.latent_channels,
        out_channels=autoencoder.config.latent_channels,
        block_out_channels=(16, 16) if quick else (96, 160),
        norm_num_groups=8 if quick else 16,
        attention_head_dim=4,  # despite its name, the number of heads
        cross_attention_dim=width,
        grid_channels=8 if quick else 96,
    )
    noise_scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        rescale_betas_zero_snr=True,  # plain backgrounds need a last step that is all noise
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )
    return projector, unet, noise_scheduler


def add_token_noise(visual_tokens: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Move every token (I, N, V) a little, as an LLM's imperfect prediction does.

    The length of the move is drawn per image, up to `strength`: 0.4 turns a token by up to 22 degrees (cosine 0.93).
    """
    length = strength * torch.rand(len(visual_tokens), 1, 1, generator=generator)
    move = F.normalize(torch.randn(visual_tokens.shape, generator=generator), dim=-1)
    return F.normalize(visual_tokens + length * move, dim=-1)


def train_visualizer(
    visualizer: Visualizer,
    latents: torch.Tensor,
    visual_tokens: torch.Tensor,
    out: Path,
    steps: int,
    rate: float,
    token_noise: float,
) -> None:
    """Train a visualizer in place, or continue from `out/state.pt`.

    Args:
        latents (`torch.Tensor` of shape (I, C, h, w)): Images, as `encode_latents` returns them.
        visual_tokens (`torch.Tensor` of shape (I, N, V)): Their visual tokens.
        rate (`float`): Peak learning rate.
        token_noise (`float`): Largest move of each visual token, see `add_token_noise`.
    """
    projector, unet, noise_scheduler = visualizer
    denoiser = ConditionedUNet(projector, unet.to(memory_format=torch.channels_last)).train().to(DEVICE)
    if DEVICE.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # the gradient of torch's fused attention is slow in bfloat16

    def step_loss(step: int) -> torch.Tensor:
        indices = choose_batch(step, BATCH_SIZE, len(latents))
        generator = torch.Generator().manual_seed(1_000_003 + step)
        kept = torch.rand(len(indices), generator=generator) >= CONDITIONING_DROPOUT
        tokens = add_token_noise(visual_tokens[indices].float(), token_noise, generator)
        predict = partial(denoiser, visual_tokens=tokens.to(DEVICE), kept=kept.to(DEVICE))
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return diffusion_loss(predict, noise_scheduler, latents[indices].float().to(DEVICE), generator)

    parts = {"denoiser": denoiser, **make_optimizer(denoiser, steps, rate, 0.995)}
    train(parts, step_loss, out, steps, "U-Net")
    denoiser.eval()
