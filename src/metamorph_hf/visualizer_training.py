"""Parts of training a visualizer: the conditioned U-Net, the diffusion loss, and saving of the moving average.

Shapes: I images, C latent channels of size h x w, N visual tokens per image, V vision width.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import ModelMixin, SchedulerMixin
from diffusers.training_utils import EMAModel, compute_snr
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


EMA_FILE = "ema.safetensors"


class ConditionedUNet(nn.Module):
    """Projector and U-Net as one module, which distributed training can wrap."""

    def __init__(self, projector: ModelMixin, unet: ModelMixin):
        super().__init__()
        self.projector, self.unet = projector, unet

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, visual_tokens: torch.Tensor, kept: torch.Tensor
    ) -> torch.Tensor:
        """Denoise latents (I, C, h, w) at `timesteps` (I,), given visual tokens (I, N, V) if `kept` (I,) is True."""
        return self.unet(noisy, timesteps, encoder_hidden_states=self.projector(visual_tokens, kept)).sample


def diffusion_loss(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scheduler: SchedulerMixin,
    clean: torch.Tensor,
    generator: torch.Generator,
    noise_offset: float = 0.0,
    snr_gamma: float | None = None,
) -> torch.Tensor:
    """
    Compute the mean squared error of a prediction of the target that the scheduler's `prediction_type` names.

    Args:
        predict (`Callable`): Maps noisy latents (I, C, h, w) and timesteps (I,) to a prediction (I, C, h, w).
        clean (`torch.Tensor` of shape (I, C, h, w)): Latents of unit variance.
        generator (`torch.Generator`): Source of noise and timesteps, on the CPU so that all devices draw the same.
        noise_offset (`float`, defaults to 0.0): Scale of additional noise per channel, for darker and lighter images.
        snr_gamma (`float`, *optional*): Gamma of min-SNR weighting (arXiv 2303.09556), where 5 is usual.
    """
    count, steps = len(clean), scheduler.config.num_train_timesteps
    # Timesteps are spread evenly over the batch, so that its loss depends less on which noise levels are drawn.
    spread = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    timesteps = (spread * steps).long().clamp(max=steps - 1).to(clean.device)  # the last sum may round up
    noise = torch.randn(clean.shape, generator=generator)
    if noise_offset:
        noise += noise_offset * torch.randn(*clean.shape[:2], 1, 1, generator=generator)
    noise, target_type = noise.to(clean), scheduler.config.prediction_type
    prediction = predict(scheduler.add_noise(clean, noise, timesteps), timesteps)
    if target_type == "v_prediction":
        target = scheduler.get_velocity(clean, noise, timesteps)
    else:
        target = {"epsilon": noise, "sample": clean}[target_type]
    loss = F.mse_loss(prediction.float(), target.float(), reduction="none").mean((1, 2, 3))
    if snr_gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        weight = snr.clamp(max=snr_gamma)
        loss = loss * {"epsilon": weight / snr, "v_prediction": weight / (snr + 1), "sample": weight}[target_type]
    return loss.mean()


def save_ema_with(accelerator: Accelerator, ema: EMAModel) -> None:
    """Make `save_state` and `load_state` of the accelerator include a moving average, also of LoRA adapters only."""

    # `accelerator.register_for_checkpointing` would write a pickle, which can run code when it is read.
    def save(models: list, weights: list, folder: str) -> None:
        if accelerator.is_main_process:
            tensors = {str(index): tensor.contiguous() for index, tensor in enumerate(ema.shadow_params)}
            save_file(tensors, Path(folder) / EMA_FILE, {"optimization_step": str(ema.optimization_step)})

    def load(models: list, folder: str) -> None:
        with safe_open(Path(folder) / EMA_FILE, "pt") as file:
            ema.optimization_step = int(file.metadata()["optimization_step"])
            for index, tensor in enumerate(ema.shadow_params):
                tensor.copy_(file.get_tensor(str(index)))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
