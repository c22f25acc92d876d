"""What a U-Net made for text embeddings needs to be conditioned on visual tokens instead.

Shapes: B images, N visual tokens per image, V vision width, L sequence length and C width of the cross-attention.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


PROJECTOR_TYPES = ("mlp",)


class VisualTokenProjector(ModelMixin, ConfigMixin):
    """Maps the visual tokens of an image to the states a U-Net attends to.

    Every layer is a linear map and a layer norm, with a ReLU between layers: the adapter that MetaMorph's authors put
    in front of Stable Diffusion 1.5.

    Args:
        visual_token_dim (`int`, defaults to 1152): Width V of a visual token.
        cross_attention_dim (`int`, defaults to 768): Width C of the states, `unet.config.cross_attention_dim`.
        projector_type (`str`, defaults to `"mlp"`): Only `"mlp"` exists.
        num_layers (`int`, defaults to 2): Number of linear layers.
        hidden_dim (`int`, defaults to 2048): Width between the layers.
        num_image_tokens (`int`, defaults to 64): Visual tokens per image, N.
        sequence_length (`int`, *optional*, defaults to 77):
            The states are padded on the right with zeros to this length, that of the text embeddings a pretrained
            U-Net has seen. `None` leaves them N long.

    Raises:
        ValueError: If `projector_type` is unknown, or N tokens do not fit in `sequence_length`.
    """

    @register_to_config
    def __init__(
        self,
        visual_token_dim: int = 1152,
        cross_attention_dim: int = 768,
        projector_type: str = "mlp",
        num_layers: int = 2,
        hidden_dim: int = 2048,
        num_image_tokens: int = 64,
        sequence_length: int | None = 77,
    ):
        super().__init__()
        if projector_type not in PROJECTOR_TYPES:
            raise ValueError(
                f"`projector_type` is {projector_type!r}, but only {', '.join(map(repr, PROJECTOR_TYPES))} is known."
            )
        if num_layers < 1:
            raise ValueError(f"`num_layers` must be at least 1, but is {num_layers}.")
        if sequence_length is not None and num_image_tokens > sequence_length:
            raise ValueError(
                f"`num_image_tokens` is {num_image_tokens}, which does not fit in a `sequence_length` of "
                f"{sequence_length}. Set `sequence_length=None` for no padding."
            )
        widths = [visual_token_dim, *[hidden_dim] * (num_layers - 1), cross_attention_dim]
        self.linears = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.LayerNorm(o) for o in widths[1:])

    def forward(self, visual_tokens: torch.Tensor) -> torch.Tensor:
        """
        Args:
            visual_tokens (`torch.Tensor` of shape `(B, N, V)`): As `model.generate` returns them (L2-normalised).

        Returns:
            `torch.Tensor` of shape `(B, L, C)`, where L is `sequence_length`, or N if that is `None`.
        """
        expected = (self.config.num_image_tokens, self.config.visual_token_dim)
        if visual_tokens.ndim != 3 or visual_tokens.shape[1:] != expected:
            raise ValueError(
                f"Expected visual tokens of shape (images, {expected[0]}, {expected[1]}), "
                f"but got {tuple(visual_tokens.shape)}."
            )
        states = visual_tokens
        for index, (linear, norm) in enumerate(zip(self.linears, self.norms)):
            states = norm(linear(states if index == 0 else F.relu(states)))
        if self.config.sequence_length is not None:
            states = F.pad(states, (0, 0, 0, self.config.sequence_length - states.shape[1]))
        return states
