"""A linear variational autoencoder on patches, for pictures too small to be worth a convolutional one's training."""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


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


__all__ = ["PatchVAE"]
