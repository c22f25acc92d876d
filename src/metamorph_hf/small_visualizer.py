"""A small visualizer for small images: a U-Net that lays the visual tokens on their grid, and a closed-form VAE."""

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import nn


class GridUNet2DConditionModel(UNet2DConditionModel):
    r"""
    [`UNet2DConditionModel`] that attends to the visual tokens and also lays them on their grid, under the sample.

    Cross-attention alone does not know where in the picture a token belongs, which a large U-Net learns in time and a
    small one does not. The grid, enlarged to the sample's size, enters as further channels of `conv_in`.

    Args:
        grid_channels (`int`, *optional*, defaults to 64): Channels that the grid adds.

    All other arguments are those of [`UNet2DConditionModel`], of which only the ones named here are supported.
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
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            attention_head_dim=attention_head_dim,
            cross_attention_dim=cross_attention_dim,
        )
        self.grid_proj = nn.Linear(cross_attention_dim, 4 * grid_channels)
        self.conv_in = nn.Conv2d(in_channels + grid_channels, block_out_channels[0], kernel_size=3, padding=1)

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs):
        # The saved configuration holds all of the parent's arguments, which diffusers would warn of one by one.
        inherited = cls._get_init_keys(UNet2DConditionModel) - cls._get_init_keys(cls)
        own = {name: value for name, value in config_dict.items() if name not in inherited}
        return super().extract_init_dict(own, **kwargs)

    def forward(self, sample: torch.Tensor, timestep, encoder_hidden_states: torch.Tensor, **kwargs):
        """
        Args:
            sample (`torch.Tensor` of shape (I, in_channels, height, width)): Noisy latents.
            encoder_hidden_states (`torch.Tensor` of shape (I, N, cross_attention_dim)): N must be a square number.

        Raises:
            ValueError: if N is no square number, as after padding.
        """
        count = encoder_hidden_states.shape[1]
        side = round(count**0.5)
        if side**2 != count:
            raise ValueError(
                f"`encoder_hidden_states` have {count} positions, which is no square grid. Build the "
                "VisualTokenProjector with sequence_length=None, so that it pads nothing."
            )
        grid = self.grid_proj(encoder_hidden_states).transpose(1, 2).unflatten(2, (side, side))
        grid = F.interpolate(F.pixel_shuffle(grid, 2), size=sample.shape[2:])  # a token has a say in its four quarters
        return super().forward(torch.cat([sample, grid], dim=1), timestep, encoder_hidden_states, **kwargs)


class PatchVAE(ModelMixin, ConfigMixin):
    r"""
    Each patch of pixels becomes one latent vector, by a linear map. It stands in for `AutoencoderKL` in a pipeline.

    Its optimum is known in closed form: probabilistic principal components (Tipping and Bishop, 1999), which is where
    the ELBO of a linear VAE is largest (Lucas et al., 2019, arXiv 1911.02469). [`PatchVAE.fit`] computes it.

    Args:
        in_channels (`int`, *optional*, defaults to 3): Channels of a picture.
        latent_channels (`int`, *optional*, defaults to 32): Principal components kept.
        patch_size (`int`, *optional*, defaults to 8): Side of a patch in pixels.
        scaling_factor (`float`, *optional*, defaults to 1.0): Latents times this have unit variance.
    """

    @register_to_config
    def __init__(
        self, in_channels: int = 3, latent_channels: int = 32, patch_size: int = 8, scaling_factor: float = 1.0
    ):
        super().__init__()
        self.encoder = nn.Conv2d(in_channels, latent_channels, patch_size, stride=patch_size, bias=False)
        self.decoder = nn.ConvTranspose2d(latent_channels, in_channels, patch_size, stride=patch_size)
        self.latent_mean = nn.Parameter(torch.zeros(latent_channels, 1, 1))
        self.log_variance = nn.Parameter(torch.zeros(latent_channels, 1, 1))

    @classmethod
    def fit(cls, images: torch.Tensor, latent_channels: int = 32, patch_size: int = 8) -> "PatchVAE":
        """
        Fit to pictures.

        Args:
            images (`torch.Tensor` of shape (I, C, height, width)): In [-1, 1].

        Raises:
            ValueError: if the pictures' sides are no multiple of `patch_size`, or a patch has too few numbers.
        """
        channels, height, width = images.shape[1:]
        size = channels * patch_size**2
        if height % patch_size or width % patch_size or latent_channels >= size:
            raise ValueError(
                f"Pictures of {height}x{width} with patches of {patch_size}x{patch_size} and {latent_channels} latent "
                f"channels: the sides must be multiples of the patch, and the channels fewer than {size}."
            )
        patches = F.unfold(images, patch_size, stride=patch_size).transpose(1, 2).reshape(-1, size).double()
        mean = patches.mean(0)
        variances, directions = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        variances, directions = variances.flip(0).clamp(min=1e-8), directions.flip(1)[:, :latent_channels]
        noise = variances[latent_channels:].mean()  # of the pixels, given the latent
        # Between equal weight for all components and weight by their variance: details must neither drown in the
        # diffusion's noise nor count as much as the colours.
        scale = variances[:latent_channels] ** -0.25
        encoding = (directions * scale).T
        decoding = directions / scale
        variance = (encoding @ (patches - mean).T).square().mean().item()
        vae = cls(channels, latent_channels, patch_size, scaling_factor=variance**-0.5)
        shape = (latent_channels, channels, patch_size, patch_size)
        # What the kept directions miss of the mean patch; nearly one value per channel, so a bias can hold it.
        missed = (mean - decoding @ (encoding @ mean)).reshape(channels, -1).mean(1)
        weights = {
            "encoder.weight": encoding.reshape(shape),
            "decoder.weight": decoding.T.reshape(shape),
            "decoder.bias": missed,
            "latent_mean": (encoding @ mean)[:, None, None],
            "log_variance": (scale**2 * noise).log()[:, None, None],
        }
        vae.load_state_dict({name: weight.float().contiguous() for name, weight in weights.items()})
        return vae.eval()

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """Pictures (I, C, height, width) in [-1, 1] to a distribution of latents."""
        mean = self.encoder(x) - self.latent_mean
        posterior = DiagonalGaussianDistribution(torch.cat([mean, self.log_variance.expand_as(mean)], dim=1))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator=None) -> DecoderOutput | tuple:
        """Latents (I, latent_channels, height, width) to pictures."""
        pictures = self.decoder(z + self.latent_mean)
        return DecoderOutput(sample=pictures) if return_dict else (pictures,)


__all__ = ["GridUNet2DConditionModel", "PatchVAE"]
