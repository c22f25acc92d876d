"""A small U-Net that is conditioned on visual tokens in two ways."""

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, UNet2DConditionModel  # noqa: F401 (from_pretrained looks ModelMixin up here)
from diffusers.configuration_utils import register_to_config
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


__all__ = ["GridUNet2DConditionModel"]
