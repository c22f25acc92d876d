"""Step 4 of the emoji recipe: a small latent diffusion model that decodes visual tokens into images.

A VAE turns 64x64 pixels into 8x8 latents. A U-Net then learns to denoise such latents while it attends to the visual
tokens of the same image, at a size that two CPU cores train in under an hour.
"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from emoji_images import normalize
from tqdm import trange

from metamorph_hf import GridUNet2DConditionModel, PatchVAE, VisualTokenProjector
from metamorph_hf.visualizer_training import ConditionedUNet, diffusion_loss


BATCH_SIZE = 64
CONDITIONING_DROPOUT = 0.1  # share of images with zeros as conditioning, the negative embeddings of guidance
TOKEN_NOISE = 0.4
CHECKPOINT_EVERY = 100  # steps, about two minutes


def build_visualizer(
    visual_tokens: torch.Tensor, vae: PatchVAE, quick: bool
) -> tuple[VisualTokenProjector, GridUNet2DConditionModel, DDIMScheduler]:
    """Build a projector for visual tokens (I, N, V), a U-Net of 7.5 M parameters, and the noise scheduler."""
    width = 32 if quick else 192
    projector = VisualTokenProjector(
        visual_token_dim=visual_tokens.shape[2],
        cross_attention_dim=width,
        hidden_dim=2 * width,
        num_image_tokens=visual_tokens.shape[1],
        sequence_length=None,
    )
    unet = GridUNet2DConditionModel(
        sample_size=64 // vae.config.patch_size,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=(16, 16) if quick else (96, 160),
        norm_num_groups=8 if quick else 16,
        attention_head_dim=4,  # despite its name, the number of heads
        cross_attention_dim=width,
        grid_channels=8 if quick else 64,
    )
    noise_scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        rescale_betas_zero_snr=True,  # white backgrounds need a last step that is all noise
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
    pixels: torch.Tensor, visual_tokens: torch.Tensor, vae: PatchVAE, out: Path, steps: int, quick: bool
) -> tuple[VisualTokenProjector, GridUNet2DConditionModel, DDIMScheduler]:
    """Train on uint8 pixels (I, 3, 64, 64) and their visual tokens (I, N, V), or continue from `out/state.pt`.

    Returns:
        Projector, U-Net and noise scheduler.
    """
    torch.manual_seed(0)
    projector, unet, noise_scheduler = build_visualizer(visual_tokens, vae, quick)
    denoiser = ConditionedUNet(projector, unet.to(memory_format=torch.channels_last)).train()
    with torch.no_grad():
        latents = torch.cat([vae.encode(normalize(batch)).latent_dist.mode() for batch in pixels.split(64)])
        latents = latents * vae.config.scaling_factor
    parameters = [*denoiser.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    ema = EMAModel(parameters, decay=0.995, use_ema_warmup=True, power=0.75)

    parts = {"denoiser": denoiser, "optimizer": optimizer, "schedule": schedule, "ema": ema}
    first_step = 0
    out.mkdir(parents=True, exist_ok=True)
    if (out / "state.pt").is_file():
        saved = torch.load(out / "state.pt", weights_only=True)
        first_step = saved.pop("step")
        for name, state in saved.items():
            parts[name].load_state_dict(state)

    for step in trange(first_step, steps, desc="U-Net", initial=first_step, total=steps, disable=first_step == steps):
        # From the step's number alone, so that resuming changes nothing.
        epoch, batch = divmod(step, max(1, len(pixels) // BATCH_SIZE))
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(epoch))
        indices, generator = order.split(BATCH_SIZE)[batch], torch.Generator().manual_seed(1_000_003 + step)
        kept = torch.rand(len(indices), generator=generator) >= CONDITIONING_DROPOUT
        tokens = add_token_noise(visual_tokens[indices].float(), TOKEN_NOISE, generator)
        predict = partial(denoiser, visual_tokens=tokens, kept=kept)
        loss = diffusion_loss(predict, noise_scheduler, latents[indices], generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(parameters)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            torch.save({"step": step + 1} | {k: v.state_dict() for k, v in parts.items()}, out / "state.tmp")
            (out / "state.tmp").replace(out / "state.pt")

    ema.copy_to(parameters)
    return projector.eval(), unet.eval(), noise_scheduler
