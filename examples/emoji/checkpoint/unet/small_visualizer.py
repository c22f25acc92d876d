"""A visualizer for small images: a U-Net that is given the grid of visual tokens, and a small autoencoder."""

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, IdentityDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn


class GridUNet2DConditionModel(UNet2DConditionModel):
    r"""
    [`UNet2DConditionModel`] that attends to the visual tokens, and also reads their grid beside the sample: a small
    U-Net does not learn by cross-attention where in the image a token belongs.

    Args:
        grid_channels (`int`, defaults to 64): Input channels that the grid adds to `conv_in`.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 8,
        in_channels: int = 32,
        out_channels: int = 32,
        down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types: tuple[str, ...] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels: tuple[int, ...] = (96, 160),
        layers_per_block: int = 1,
        norm_num_groups: int = 16,
        attention_head_dim: int = 4,
        cross_attention_dim: int = 192,
        grid_channels: int = 64,
    ):
        own = {name for name in self.config if name.startswith("_")} | {"grid_channels"}
        super().__init__(**{name: value for name, value in self.config.items() if name not in own})
        self.grid_proj = nn.Linear(cross_attention_dim, 4 * grid_channels)
        self.conv_in = nn.Conv2d(in_channels + grid_channels, block_out_channels[0], kernel_size=3, padding=1)

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs):
        # The saved configuration has all arguments of the parent class, and diffusers would warn about each of them.
        inherited = cls._get_init_keys(UNet2DConditionModel) - cls._get_init_keys(cls)
        own = {name: value for name, value in config_dict.items() if name not in inherited}
        return super().extract_init_dict(own, **kwargs)

    def forward(self, sample: torch.Tensor, timestep, encoder_hidden_states: torch.Tensor, **kwargs):
        """Denoise a sample (I, in_channels, h, w), given projected visual tokens (I, N, cross_attention_dim)."""
        count = encoder_hidden_states.shape[1]
        side = round(count**0.5)
        if side**2 != count:
            raise ValueError(f"{count} states do not form a square grid: set the projector's sequence_length to None.")
        grid = self.grid_proj(encoder_hidden_states).transpose(1, 2).unflatten(2, (side, side))
        grid = F.interpolate(F.pixel_shuffle(grid, 2), size=sample.shape[2:])  # each token fills 2x2 cells of its own
        return super().forward(torch.cat([sample, grid], dim=1), timestep, encoder_hidden_states, **kwargs)


class ConvBlock(nn.Module):
    """Norm, 3x3 convolution, SiLU and 1x1 convolution, added to the input; starts as the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.out = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + self.out(F.silu(self.conv(self.norm(states))))


class PatchAutoencoder(ModelMixin, ConfigMixin):
    r"""
    Small deterministic autoencoder that works on patches, so that a CPU can train it. It takes the place of
    `AutoencoderKL`. Its patches overlap by half, which leaves no visible borders between them.

    Args:
        in_channels (`int`, defaults to 3): Number of image channels.
        latent_channels (`int`, defaults to 16): Number of latent channels.
        patch_size (`int`, defaults to 8): Pixels per latent in each direction, an even number.
        width (`int`, defaults to 128): Number of hidden channels.
        layers_per_block (`int`, defaults to 2): Number of residual blocks of encoder and decoder.
        scaling_factor (`float`, defaults to 1.0): Factor that gives the latents unit variance.
        refiner_layers (`int`, defaults to 0): Number of residual blocks on cells of 2x2 pixels, which correct what the
            decoder makes of each patch. 0 leaves the refiner out.
        refiner_width (`int`, defaults to 48): Number of hidden channels of the refiner.

    Raises:
        ValueError: If `patch_size` is odd, or is not a multiple of 4 while there is a refiner.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 16,
        patch_size: int = 8,
        width: int = 128,
        layers_per_block: int = 2,
        scaling_factor: float = 1.0,
        refiner_layers: int = 0,
        refiner_width: int = 48,
    ):
        super().__init__()
        if patch_size % 2:
            raise ValueError(f"patch_size is {patch_size}, but patches that overlap by half need an even one.")
        if refiner_layers and patch_size % 4:
            raise ValueError(f"patch_size is {patch_size}, but the refiner needs a multiple of 4.")
        window = {"kernel_size": 2 * patch_size, "stride": patch_size, "padding": patch_size // 2}
        self.encoder = nn.Sequential(
            nn.Conv2d(in_channels, width, **window, padding_mode="replicate"),
            *(ConvBlock(width) for _ in range(layers_per_block)),
            nn.Conv2d(width, latent_channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, width, 3, padding=1),
            *(ConvBlock(width) for _ in range(layers_per_block)),
            nn.GroupNorm(1, width),
            nn.SiLU(),
            nn.ConvTranspose2d(width, in_channels, **window),
        )
        self.refiner = self._build_refiner() if refiner_layers else None

    def _build_refiner(self) -> nn.Sequential:
        config, stride = self.config, self.config.patch_size // 2
        to_pixels = nn.Conv2d(config.refiner_width, 4 * config.in_channels, 3, padding=1)
        nn.init.zeros_(to_pixels.weight)  # it starts as no correction
        nn.init.zeros_(to_pixels.bias)
        return nn.Sequential(
            nn.ConvTranspose2d(config.width, config.refiner_width, 2 * stride, stride=stride, padding=stride // 2),
            *(ConvBlock(config.refiner_width) for _ in range(config.refiner_layers)),
            nn.GroupNorm(1, config.refiner_width),
            nn.SiLU(),
            to_pixels,
            nn.PixelShuffle(2),
        )

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """Encode images (I, in_channels, height, width) in [-1, 1] into latents, all of whose mass is at the mode."""
        posterior = IdentityDistribution(self.encoder(x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(self, z: torch.Tensor, return_dict: bool = True, generator=None) -> DecoderOutput | tuple:
        """Decode latents (I, latent_channels, height, width) into images."""
        states = self.decoder[:-1](z)
        images = self.decoder[-1](states)
        if self.refiner is not None:
            images = images + self.refiner(states)
        return DecoderOutput(sample=images) if return_dict else (images,)
