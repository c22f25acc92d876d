"""Step 4 of the emoji recipe: a small latent diffusion model that paints visual tokens.

A VAE turns 64x64 pixels into 8x8 latents, then a U-Net learns to denoise such latents while it attends to the visual
tokens of the same picture, at a size that two CPU cores train in under an hour.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm import trange

from metamorph_hf import GridUNet2DConditionModel, PatchVAE, VisualTokenProjector
from metamorph_hf.visualizer_training import diffusion_loss


CHECKPOINT_EVERY = 100  # steps, about two minutes


def build_unet(vae: PatchVAE, cross_attention_dim: int, quick: bool = False) -> GridUNet2DConditionModel:
    """7.5 M parameters, 8x8 and 4x4 features, cross-attention at both sizes."""
    return GridUNet2DConditionModel(
        sample_size=64 // vae.config.patch_size,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=(16, 16) if quick else (96, 160),
        norm_num_groups=8 if quick else 16,
        attention_head_dim=4,  # despite its name, the number of heads
        cross_attention_dim=cross_attention_dim,
        grid_channels=8 if quick else 64,
    )


def batch_of(count: int, batch_size: int, step: int, seed: int) -> tuple[torch.Tensor, torch.Generator]:
    """The pictures of a step and the source of its noise, from the step's number alone: resuming changes nothing."""
    per_epoch = max(1, count // batch_size)
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    noise = torch.Generator().manual_seed((seed + 1) * 1_000_003 + step)
    return order[place * batch_size : (place + 1) * batch_size], noise


def save_state(path: Path, **state) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def fit_vae(images: torch.Tensor, out: Path, latent_channels: int = 32) -> PatchVAE:
    """Fit the VAE in closed form and save it in `out`.

    A convolutional one of this size needs hours of CPU to draw as well (28 dB with 32 channels).

    Args:
        images: uint8 (I, 3, 64, 64). Every vendor's pictures help, painted later or not.
    """
    vae = PatchVAE.fit(images.float() / 127.5 - 1, latent_channels)
    vae.save_pretrained(out)
    return vae


@torch.no_grad()
def encode_images(images: torch.Tensor, vae: PatchVAE, batch_size: int = 64) -> torch.Tensor:
    """uint8 pictures to latents of unit variance, (I, 32, 8, 8)."""
    batches = [vae.encode(normalise(batch)).latent_dist.mode() for batch in images.split(batch_size)]
    return torch.cat(batches) * vae.config.scaling_factor


def disturb(visual_tokens: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Moves every token a little, as an LLM's imperfect prediction does. `strength` is the largest step's length.

    The step's length is drawn per picture: 0.4 turns a token by up to 22 degrees (cosine 0.93).
    """
    length = strength * torch.rand(len(visual_tokens), 1, 1, generator=generator)
    step = F.normalize(torch.randn(visual_tokens.shape, generator=generator), dim=-1)
    return F.normalize(visual_tokens + length * step, dim=-1)


def train_unet(
    images: torch.Tensor,
    visual_tokens: torch.Tensor,
    vae: PatchVAE,
    out: Path,
    steps: int = 1500,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    dropout: float = 0.1,
    token_noise: float = 0.4,
    prediction_type: str = "v_prediction",
    seed: int = 0,
    quick: bool = False,
) -> tuple[GridUNet2DConditionModel, VisualTokenProjector, DDIMScheduler]:
    """Train, or continue from `out/state.pt`, and save in `out/unet`, `out/projector` and `out/scheduler`.

    Args:
        images: uint8 (I, 3, 64, 64).
        visual_tokens: (I, N, V), L2-normalised: what the model's vision tower makes of the same pictures.
        dropout: Share of the pictures whose conditioning is zeros, the negative embeddings of guidance.
        token_noise: See `disturb`.
        prediction_type: What the U-Net predicts, of the kinds that DDIMScheduler knows.
    """
    torch.manual_seed(seed)
    width = 32 if quick else 192
    projector = VisualTokenProjector(
        visual_token_dim=visual_tokens.shape[2],
        cross_attention_dim=width,
        hidden_dim=2 * width,
        num_image_tokens=visual_tokens.shape[1],
        sequence_length=None,
    )
    latents = encode_images(images, vae)
    unet = build_unet(vae, width, quick).to(memory_format=torch.channels_last)
    noise_scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        rescale_betas_zero_snr=True,  # white backgrounds need a last step that is all noise
        timestep_spacing="trailing",
        prediction_type=prediction_type,
    )
    parameters = [*projector.parameters(), *unet.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    ema = EMAModel(parameters, decay=0.995, use_ema_warmup=True, power=0.75)

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    first_step, state = 0, out / "state.pt"
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        projector.load_state_dict(saved["projector"])
        unet.load_state_dict(saved["unet"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        ema.load_state_dict(saved["ema"])
        first_step = saved["step"]

    projector.train()
    unet.train()
    average = None
    progress = trange(first_step, steps, desc="4/4 U-Net", initial=first_step, total=steps, mininterval=2)
    for step in progress:
        indices, generator = batch_of(len(images), batch_size, step, seed)
        clean, tokens = latents[indices], visual_tokens[indices].float()
        kept = torch.rand(len(clean), generator=generator) >= dropout
        condition = projector(disturb(tokens, token_noise, generator), kept)
        loss = diffusion_loss(
            lambda noisy, timesteps, condition=condition: (
                unet(
                    noisy.contiguous(memory_format=torch.channels_last), timesteps, encoder_hidden_states=condition
                ).sample
            ),
            noise_scheduler,
            clean,
            generator,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        ema.step(parameters)
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{average:.4f}", refresh=False)
        if (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < steps:
            save_state(
                state,
                projector=projector.state_dict(),
                unet=unet.state_dict(),
                optimizer=optimizer.state_dict(),
                scheduler=scheduler.state_dict(),
                ema=ema.state_dict(),
                step=step + 1,
            )

    ema.copy_to(parameters)
    projector.eval().save_pretrained(out / "projector")
    unet.eval().save_pretrained(out / "unet")
    noise_scheduler.save_pretrained(out / "scheduler")
    state.unlink(missing_ok=True)
    return unet, projector, noise_scheduler
