"""The projector that conditions a U-Net made for text embeddings on visual tokens.

Shapes: B images, N visual tokens per image, V vision width, T cross-attention states of width C, L padded length.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


TYPES = ("mlp", "xattn", "xattnffn", "transformer")


class MLPProjection(nn.Module):
    """Linear layers, each with a layer norm, and ReLU in between. Maps (B, N, V) to (B, N, C)."""

    def __init__(self, widths: list[int]):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.LayerNorm(o) for o in widths[1:])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        for index, (linear, norm) in enumerate(zip(self.linears, self.norms)):
            states = norm(linear(F.relu(states) if index else states))
        return states


class CrossAttentionLayer(nn.Module):
    """Cross-attention from queries to visual tokens, with post-norm and an optional feed-forward network."""

    def __init__(self, width: int, num_heads: int, feed_forward: bool):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.norm1 = nn.LayerNorm(width)
        self.feed_forward = self.norm2 = None
        if feed_forward:
            self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
            self.norm2 = nn.LayerNorm(width)

    def forward(self, queries: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        queries = self.norm1(queries + self.attention(queries, visual, visual, need_weights=False)[0])
        return queries if self.norm2 is None else self.norm2(queries + self.feed_forward(queries))


class CrossAttentionProjection(nn.Module):
    """Learned queries that attend to the visual tokens in every layer. Maps (B, N, V) to (B, T, C)."""

    def __init__(self, visual_dim: int, width: int, num_queries: int, num_layers: int, num_heads: int, ffn: bool):
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(1, num_queries, width))
        self.input = nn.Linear(visual_dim, width)
        self.input_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(CrossAttentionLayer(width, num_heads, ffn) for _ in range(num_layers))

    def forward(self, visual_tokens: torch.Tensor) -> torch.Tensor:
        visual = self.input_norm(self.input(visual_tokens))
        queries = self.queries.expand(len(visual), -1, -1)
        for layer in self.layers:
            queries = layer(queries, visual)
        return queries


class TransformerProjection(nn.Module):
    """Pre-norm encoder of the visual tokens, and decoder of learned queries. Maps (B, N, V) to (B, T, C)."""

    def __init__(self, visual_dim: int, hidden: int, width: int, num_queries: int, num_layers: int, num_heads: int):
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(1, num_queries, hidden))
        self.input = nn.Linear(visual_dim, hidden)
        self.transformer = nn.Transformer(
            hidden, num_heads, num_layers, num_layers, 4 * hidden, dropout=0.0, batch_first=True, norm_first=True
        )
        self.output = nn.Linear(hidden, width)

    def forward(self, visual_tokens: torch.Tensor) -> torch.Tensor:
        queries = self.queries.expand(len(visual_tokens), -1, -1)
        return self.output(self.transformer(self.input(visual_tokens), queries))


class VisualTokenProjector(ModelMixin, ConfigMixin):
    """
    Maps the visual tokens of an image to the states that a U-Net attends to, as the released visualizer's adapters.

    Args:
        visual_token_dim (`int`, defaults to 1152): Width V of a visual token.
        cross_attention_dim (`int`, defaults to 768): Width C of the states, `unet.config.cross_attention_dim`.
        projector_type (`str`, defaults to `"mlp"`): `"mlp"`, which the authors used, maps each visual token by
            itself; in `"xattn"` and `"xattnffn"` (with feed-forward networks) learned queries attend to them;
            `"transformer"` is an encoder-decoder.
        hidden_dim (`int`, defaults to 2048): Width between the layers of `"mlp"`, or width of `"transformer"`.
        num_image_tokens (`int`, *optional*, defaults to 64): Visual tokens per image, N; `None` allows any number.
        sequence_length (`int`, *optional*, defaults to 77): Length L to which zeros pad the states on the right, as
            long as text embeddings are. `None` disables padding.
        num_queries (`int`, *optional*): Number T of learned queries, required by all types except `"mlp"`.
        learned_unconditional (`bool`, defaults to `False`): Whether the states without an image, which guidance leads
            away from, are learned instead of zeros.

    Raises:
        ValueError: If `projector_type` is unknown, or the numbers of queries, states and `sequence_length` do not fit.
    """

    @register_to_config
    def __init__(
        self,
        visual_token_dim: int = 1152,
        cross_attention_dim: int = 768,
        projector_type: str = "mlp",
        num_layers: int = 2,
        hidden_dim: int = 2048,
        num_image_tokens: int | None = 64,
        sequence_length: int | None = 77,
        num_queries: int | None = None,
        num_heads: int = 4,
        learned_unconditional: bool = False,
    ):
        super().__init__()
        if projector_type not in TYPES:
            raise ValueError(f"`projector_type` is {projector_type!r}, but must be one of {', '.join(TYPES)}.")
        if num_layers < 1:
            raise ValueError(f"`num_layers` must be at least 1, but is {num_layers}.")
        if (num_queries is None) != (projector_type == "mlp"):
            rule = "has one state per visual token" if projector_type == "mlp" else "needs a number of queries"
            raise ValueError(f"`num_queries` is {num_queries}, but a projector of type {projector_type!r} {rule}.")
        shape = (num_queries, num_layers, num_heads)
        if projector_type == "mlp":
            self.projection = MLPProjection([visual_token_dim, *[hidden_dim] * (num_layers - 1), cross_attention_dim])
        elif projector_type == "transformer":
            self.projection = TransformerProjection(visual_token_dim, hidden_dim, cross_attention_dim, *shape)
        else:
            ffn = projector_type == "xattnffn"
            self.projection = CrossAttentionProjection(visual_token_dim, cross_attention_dim, *shape, ffn)
        self._check_length(num_queries or num_image_tokens or 0)
        length = sequence_length or num_queries or num_image_tokens
        if learned_unconditional and length is None:
            raise ValueError("`learned_unconditional` needs `sequence_length` or `num_image_tokens` to be set.")
        self.unconditional = nn.Parameter(torch.zeros(length, cross_attention_dim)) if learned_unconditional else None

    def _check_length(self, num_states: int) -> None:
        if num_states > (self.config.sequence_length or num_states):
            length = self.config.sequence_length
            raise ValueError(f"{num_states} states per image do not fit into `sequence_length`={length}: use None.")

    def forward(self, visual_tokens: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """
        Map visual tokens (B, N, V) to states (B, L, C), where L is T without padding. Images that are not `kept` (bool
        of shape (B,)) get the unconditional states. Another shape, or too many tokens, raise a `ValueError`.
        """
        count, width = self.config.num_image_tokens, self.config.visual_token_dim
        if visual_tokens.ndim != 3 or visual_tokens.shape[1:] != (count or visual_tokens.shape[1], width):
            expected = f"(images, {count or 'tokens'}, {width})"
            raise ValueError(f"Expected `visual_tokens` of shape {expected}, but got {tuple(visual_tokens.shape)}.")
        states = self.projection(visual_tokens)
        self._check_length(states.shape[1])
        if self.config.sequence_length is not None:
            states = F.pad(states, (0, 0, 0, self.config.sequence_length - states.shape[1]))
        if kept is None:
            return states
        unconditional = states.new_zeros(()) if self.unconditional is None else self.unconditional
        return torch.where(kept.view(-1, 1, 1), states, unconditional)
