"""MetaMorph: a causal language model that reads and predicts continuous visual tokens (arXiv 2412.14164).

Shapes: B batch, S sequence, I images in the batch, N visual tokens per image, D width of the language model, V width
of a visual token, P patches per image.
"""

import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, ModelCard
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MultimodalBaseModelOutputWithPast,
    MultimodalCausalLMOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_metamorph import MetaMorphConfig
from .generation_metamorph import MetaMorphGenerationMixin
from .model_cards import create_model_card


# Logits that training holds at once, in float32: 256 MiB. More are computed in chunks, and again in the backward pass.
MAX_LOGITS = 2**26


@dataclass
class MetaMorphImageFeatures(BaseModelOutputWithPooling):
    """
    Args:
        pooler_output (`torch.Tensor` of shape (I, N, D)): Projected visual tokens, the language model's input.
        visual_tokens (`torch.Tensor` of shape (I, N, V)): Visual tokens, the regression targets.
    """

    visual_tokens: torch.FloatTensor | None = None


@dataclass
class MetaMorphCausalLMOutputWithPast(MultimodalCausalLMOutputWithPast):
    """
    [`MultimodalCausalLMOutputWithPast`] with `image_outputs` ([`MetaMorphImageFeatures`]), the losses and the vision
    head's prediction.

    Args:
        loss (`torch.Tensor` of shape ()): `text_loss + visual_loss_weight * visual_loss`; given `labels`.
        text_loss (`torch.Tensor` of shape ()): Mean cross-entropy over text labels; 0 without any.
        visual_loss (`torch.Tensor` of shape ()): Mean loss over visual labels; 0 without any.
        visual_cosine (`torch.Tensor` of shape ()): Mean cosine of predicted and true visual tokens, whatever the loss.
        num_text_labels, num_visual_labels (`torch.Tensor` of shape (), int64): What the means were taken over.
        logits (`torch.Tensor` of shape (B, S, vocabulary)):
            None when `labels` are given in training mode, where nobody needs them at every position.
        next_visual_token (`torch.Tensor` of shape (B, 1, V)):
            The vision head's prediction at the last position, normalised; without `labels` only.
    """

    text_loss: torch.FloatTensor | None = None
    visual_loss: torch.FloatTensor | None = None
    visual_cosine: torch.FloatTensor | None = None
    num_text_labels: torch.LongTensor | None = None
    num_visual_labels: torch.LongTensor | None = None
    text_accuracy: torch.FloatTensor | None = None
    text_entropy: torch.FloatTensor | None = None
    next_visual_token: torch.FloatTensor | None = None


def select_tower_options(kwargs: dict) -> dict:
    """What of `forward`'s options is for the vision tower, too; packing or causality, say, are not."""
    names = ("output_attentions", "output_hidden_states")
    return {"return_dict": True, **{name: kwargs[name] for name in names if name in kwargs}}


class MetaMorphMLP(nn.Sequential):
    """`num_layers` linear layers with GELU (erf) between them; all hidden widths are the language model's."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int, num_layers: int):
        widths = [in_features, *[hidden_features] * (num_layers - 1), out_features]
        layers = []
        for width, next_width in zip(widths, widths[1:]):
            layers += [nn.Linear(width, next_width), nn.GELU()]
        super().__init__(*layers[:-1])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # Loaded in float16, these few layers stay in float32; weights quantised to integers still have float biases.
        dtype = next(p.dtype for p in self.parameters() if p.is_floating_point())
        return super().forward(hidden_states.to(dtype))


class MetaMorphPreTrainedModel(PreTrainedModel):
    config: MetaMorphConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    output_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # Neither quantised nor cast to float16: the tower's output is what others' visual tokens are compared with, and
    # generated ones run through projector and head in a closed loop. Patterns from the start of a module's name.
    _keep_in_fp32_modules = [r"(model\.)?(vision_tower|projector)"]
    _keys_to_ignore_on_load_unexpected = [r"vision_tower\.head\."]  # SigLIP's pooling head, in older checkpoints
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """
        False, although it is. Of custom code transformers leaves out, where weights are missing, what a module without
        weights of its own initialises, which in SigLIP are attention and MLP. What else it does with custom code is
        about names of its own models and modules tied as a whole, and not for this one.
        """
        return False

    @property
    def dtype(self) -> torch.dtype:
        """The language model's; in float16, the other parts stay in float32."""
        return self.base_model.language_model.dtype

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        # Both ways to push pass here, with a card of transformers' making where the repository had none.
        if not HfApi().file_exists(repo_id, "README.md", token=kwargs.get("token")):
            path = Path(working_dir) / "README.md"
            create_model_card(self.config, repo_id, ModelCard.load(path).data.tags or ()).save(path)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


class MetaMorphModel(MetaMorphPreTrainedModel):
    """Vision tower, projector and language model, without `lm_head` and vision head."""

    def __init__(self, config: MetaMorphConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.projector = MetaMorphMLP(config.visual_token_dim, width, width, config.projector_layers)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def train(self, mode: bool = True) -> "MetaMorphModel":
        """As always, but a frozen vision tower stays in eval mode."""
        super().train(mode)
        self.vision_tower.train(mode and self._vision_tower_is_trained())
        return self

    def _vision_tower_is_trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self.vision_tower.parameters())

    def normalize_visual_tokens(self, visual_tokens: torch.Tensor) -> torch.Tensor:
        """L2-normalise over channels, if the configuration says so. Shape (..., V) to (..., V)."""
        return F.normalize(visual_tokens, dim=-1) if self.config.normalize_visual_tokens else visual_tokens

    def reduce_patches(self, patches: torch.Tensor) -> torch.Tensor:
        """Resize a square patch grid to N tokens, in float32. Shape (I, P, C) to (I, N, V)."""
        config, (images, num_patches, channels) = self.config, patches.shape
        concatenated = config.token_reduction == "concat_interpolation"
        side, target = round(num_patches**0.5), config.grid_side * (2 if concatenated else 1)
        if side**2 != num_patches:
            raise ValueError(f"The vision tower gave {num_patches} patches per image, which is no square grid.")
        grid = patches.transpose(1, 2).reshape(images, channels, side, side)
        if side != target:
            resized = F.interpolate(grid.float(), size=(target, target), mode="bilinear", align_corners=False)
            grid = resized.to(patches.dtype)
        if concatenated:  # channels of a token: top-left, top-right, bottom-left, bottom-right
            grid = grid.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (I, C, side, 2, side, 2)
            grid = grid.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)
        return grid.flatten(2).transpose(1, 2)

    def get_visual_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Encode images to visual tokens: the tower's last layer *before* its final norm, resized on the patch grid and
        L2-normalised (paper, section 3). They can be kept and passed as `visual_tokens` instead of `pixel_values`.

        Args:
            pixel_values (`torch.Tensor` of shape (I, 3, height, width)): From the processor.

        Returns:
            `torch.Tensor` of shape (I, N, V), in the tower's dtype.
        """
        return self._encode(pixel_values)[1]

    def _encode(self, pixel_values: torch.Tensor, **kwargs) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
        wants_all = kwargs.pop("output_hidden_states", None) or self.config.vision_config.output_hidden_states
        patch_size = self.config.vision_config.patch_size
        num_patches = (pixel_values.shape[-2] // patch_size) * (pixel_values.shape[-1] // patch_size)
        # Gradient checkpointing makes the inputs of every layer require gradients, a frozen tower's too.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._vision_tower_is_trained()):
            outputs = self.vision_tower(
                pixel_values.to(self.vision_tower.dtype),
                output_hidden_states=True if wants_all else [-1],
                **{**kwargs, "return_dict": True},
            )
        patches = outputs.hidden_states[-1][:, -num_patches:]  # drops class and register tokens, which stand first
        return outputs, self.normalize_visual_tokens(self.reduce_patches(patches))

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        visual_tokens: torch.Tensor | None = None,
        image_indices: torch.Tensor | None = None,
        noise_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MetaMorphImageFeatures:
        """
        Encode images, or take already encoded ones, and project them to the language model's width.

        Args:
            pixel_values (`torch.Tensor` of shape (I, 3, height, width), *optional*): Images.
            visual_tokens (`torch.Tensor` of shape (I, N, V), *optional*): Images encoded before. Give one of the two.
            image_indices (`torch.Tensor` of shape (I,), int64, *optional*):
                Which of the given images stands at each place, so that one that stands at several is encoded once.
            noise_mask (`torch.Tensor` of shape (I,), bool, *optional*):
                Images whose projected tokens carry noise (see `visual_token_noise` in the configuration).

        Returns:
            [`MetaMorphImageFeatures`] with `pooler_output` (I, N, D) and `visual_tokens` (I, N, V).

        Raises:
            ValueError: if both or none of the inputs are given, or `visual_tokens` has a wrong shape.
        """
        if (pixel_values is None) == (visual_tokens is None):
            raise ValueError("Give either `pixel_values` or `visual_tokens`, one of the two.")
        outputs = BaseModelOutputWithPooling()
        if visual_tokens is None:
            outputs, visual_tokens = self._encode(pixel_values, **kwargs)
        expected = (self.config.num_image_tokens, self.config.visual_token_dim)
        if visual_tokens.ndim != 3 or tuple(visual_tokens.shape[1:]) != expected:
            raise ValueError(
                f"`visual_tokens` has shape {tuple(visual_tokens.shape)}, expected (images, {expected[0]}, "
                f"{expected[1]}): {expected[0]} tokens per image, each {expected[1]} wide."
            )
        if image_indices is not None:
            visual_tokens = visual_tokens[image_indices]
        fed_in = visual_tokens
        if noise_mask is not None:
            share = torch.rand(len(fed_in), 1, 1, device=fed_in.device) * self.config.visual_token_noise
            share = (share.clamp(max=1) * noise_mask[:, None, None]).to(fed_in.dtype)
            noise = F.normalize(torch.randn_like(fed_in), dim=-1) * fed_in.norm(dim=-1, keepdim=True)
            fed_in = self.normalize_visual_tokens(torch.lerp(fed_in, noise, share))
        return MetaMorphImageFeatures(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.projector(fed_in),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            visual_tokens=visual_tokens,
        )

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """Mask (B, S) of the positions that `image_features` fill, in reading order; their counts must agree."""
        if input_ids is None:
            image_token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        self.check_image_count(mask, image_features.shape[0] * image_features.shape[1])
        return mask

    def check_image_ids(self) -> None:
        """Raises ValueError if the language model's vocabulary has no room for the three image tokens."""
        config, vocab_size = self.config, self.config.text_config.vocab_size
        image_ids = (config.image_token_id, config.image_start_token_id, config.image_end_token_id)
        if max(image_ids) >= vocab_size:
            raise ValueError(
                f"The image token ids {image_ids} do not all fit in the language model's vocabulary of {vocab_size}: "
                "call model.resize_token_embeddings(len(tokenizer)) after adding the three tokens."
            )

    def check_image_count(self, mask: torch.Tensor, num_features: int) -> None:
        """Raises if the mask of image token positions has not as many as images fill, in a sentence with both."""
        num_image_tokens = self.config.num_image_tokens
        torch_compilable_check(
            mask.sum() == num_features,
            lambda: (
                f"The input has {int(mask.sum())} image token positions, but the images fill {num_features} "
                f"({num_features / num_image_tokens:g} images of {num_image_tokens} visual tokens). Image features "
                "and image tokens do not match: pass one image per placeholder, e.g. through the processor."
            ),
        )

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        visual_tokens: torch.FloatTensor | None = None,
        image_indices: torch.LongTensor | None = None,
        generated_visual_tokens: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict[str, MetaMorphImageFeatures] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MultimodalBaseModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape (B, S)): Token ids, `image_token_id` where visual tokens stand.
            pixel_values (`torch.FloatTensor` of shape (I, 3, height, width)): Images in reading order.
            visual_tokens (`torch.FloatTensor` of shape (I, N, V)): Encoded images, instead of `pixel_values`.
            image_indices (`torch.LongTensor` of shape (I,)):
                Which of the given images stands at each place, where some stand at several; in order without it.
            generated_visual_tokens (`torch.FloatTensor` of shape (B, G, V)):
                Set by `generate()`: predictions for the last G positions, used where `image_token_id` stands.
            mm_encoder_outputs (`dict`): `{"image": MetaMorphImageFeatures}`, instead of `pixel_values`.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given, or images are given twice.
            RuntimeError or ValueError: if images and image token positions differ in number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if input_ids is None or input_ids.shape[1] > 1:  # not in each step of decoding
            self.check_image_ids()
        features = (mm_encoder_outputs or {}).get("image")
        if features is not None and (pixel_values is not None or visual_tokens is not None):
            raise ValueError("Images are given twice: in `mm_encoder_outputs` and as pixels or visual tokens.")
        if features is None and (pixel_values is not None or visual_tokens is not None):
            options = select_tower_options(kwargs)
            features = self.get_image_features(pixel_values, visual_tokens, image_indices, **options)

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        prompt_length = inputs_embeds.shape[1]
        if generated_visual_tokens is not None:
            prompt_length -= generated_visual_tokens.shape[1]
            generated = self.projector(generated_visual_tokens).to(inputs_embeds.device, inputs_embeds.dtype)
            is_generated = (input_ids[:, prompt_length:] == self.config.image_token_id).unsqueeze(-1)
            generated = torch.where(is_generated, generated, inputs_embeds[:, prompt_length:])
            inputs_embeds = torch.cat([inputs_embeds[:, :prompt_length], generated], dim=1)
        if features is not None:
            image_embeds = features.pooler_output
            if not isinstance(image_embeds, torch.Tensor):  # generate() hands over lists when it splits or expands
                image_embeds = torch.stack(list(image_embeds))
            prompt_ids = None if input_ids is None else input_ids[:, :prompt_length]
            mask = self.get_placeholder_mask(prompt_ids, inputs_embeds[:, :prompt_length], image_embeds)
            mask = F.pad(mask, (0, inputs_embeds.shape[1] - prompt_length)).unsqueeze(-1).to(inputs_embeds.device)
            image_embeds = image_embeds.to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_embeds)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return MultimodalBaseModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.get("attentions"),  # Mamba has none
            image_outputs=features,
        )


class MetaMorphForConditionalGeneration(MetaMorphPreTrainedModel, MetaMorphGenerationMixin):
    """MetaMorph with `lm_head` for text and vision head for visual tokens; `generate()` mixes the two."""

    # The loss is a sum of two means over different counts, so Trainer's single `num_items_in_batch` cannot scale it.
    accepts_loss_kwargs = False
    _keep_in_fp32_modules = [*MetaMorphPreTrainedModel._keep_in_fp32_modules, "vision_head"]
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MetaMorphConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.model = MetaMorphModel(config)
        self.lm_head = nn.Linear(width, config.text_config.vocab_size, bias=False)
        self.vision_head = MetaMorphMLP(width, width, config.visual_token_dim, config.vision_head_layers)
        embeddings = self.get_input_embeddings()  # language models name them differently
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        visual_tokens: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MetaMorphImageFeatures:
        """See [`MetaMorphModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, visual_tokens, **kwargs)

    def get_visual_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See [`MetaMorphModel.get_visual_tokens`]."""
        return self.model.get_visual_tokens(pixel_values)

    def visual_loss_function(self, predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss per visual token, in float32. Shapes (M, V) and (M, V) to (M,)."""
        predictions, targets = self.model.normalize_visual_tokens(predictions.float()), targets.detach().float()
        if self.config.visual_loss_type == "cosine":
            return -F.cosine_similarity(predictions, targets, dim=-1)
        if self.config.visual_loss_type == "l1":
            return F.l1_loss(predictions, targets, reduction="none").mean(-1)
        return F.mse_loss(predictions, targets, reduction="none").mean(-1)

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        visual_tokens: torch.FloatTensor | None = None,
        image_indices: torch.LongTensor | None = None,
        generated_visual_tokens: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict[str, MetaMorphImageFeatures] | None = None,
        num_items_in_batch: torch.Tensor | None = None,
        skip_logits: bool = False,
        skip_visual_token: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MetaMorphCausalLMOutputWithPast:
        """
        See [`MetaMorphModel.forward`] for the inputs.

        Args:
            labels (`torch.LongTensor` of shape (B, S)):
                At a text position the token id to predict or -100. At a visual token, `image_token_id` if it is a
                regression target, -100 if it is only context. Position t - 1 predicts position t.
            logits_to_keep (`int` or `torch.Tensor`): Compute logits for the last positions only; 0 for all.
            num_items_in_batch (`torch.Tensor` of shape (2,), *optional*):
                Text and visual label counts of the whole optimization step (all devices, all accumulation steps):
                each loss's sum is divided by its count there instead of its count in this batch.
            skip_logits (`bool`, *optional*, defaults to `False`):
                With `labels`, return no logits in eval mode either: the losses need them at text labels only. Without,
                return zeros in their place, (B, 1, vocabulary): `generate()` needs none where all next ids are forced.
            skip_visual_token (`bool`, *optional*, defaults to `False`):
                Return no `next_visual_token`: `generate()` needs none where the answer can hold no image.

        Raises:
            ValueError: if `labels` mark a visual token where `input_ids` hold none, or no images are given for it.
        """
        features = (mm_encoder_outputs or {}).get("image")
        next_labels = None
        if labels is not None:
            next_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        if next_labels is not None:
            if input_ids is None:
                raise ValueError("`labels` need `input_ids`: visual targets are found by their image token ids.")
            is_target = self._visual_targets(input_ids, next_labels)
            if features is None and (pixel_values is not None or visual_tokens is not None):
                noise_mask = None
                if self.training and self.config.visual_token_noise > 0:
                    is_image = input_ids == self.config.image_token_id
                    images = next(i for i in (image_indices, pixel_values, visual_tokens) if i is not None)
                    self.model.check_image_count(is_image, len(images) * self.config.num_image_tokens)
                    noise_mask = is_target[is_image].view(-1, self.config.num_image_tokens).any(-1)
                options = select_tower_options(kwargs)
                features = self.model.get_image_features(
                    pixel_values, visual_tokens, image_indices, noise_mask, **options
                )
                pixel_values = visual_tokens = image_indices = None
                mm_encoder_outputs = {"image": features}

        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            visual_tokens=visual_tokens,
            image_indices=image_indices,
            generated_visual_tokens=generated_visual_tokens,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        hidden_states, features = outputs.last_hidden_state, outputs.image_outputs

        logits = next_visual_token = None
        losses = {}
        if next_labels is None and skip_logits:
            logits = hidden_states.new_zeros(()).expand(len(hidden_states), 1, self.config.text_config.vocab_size)
        elif next_labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])
        if next_labels is None and not skip_visual_token:
            next_visual_token = self.model.normalize_visual_tokens(self.vision_head(hidden_states[:, -1:]))
        if next_labels is not None:
            losses = self._losses(hidden_states, next_labels, input_ids, is_target, features, num_items_in_batch)
        return MetaMorphCausalLMOutputWithPast(
            **losses,
            logits=logits,
            next_visual_token=next_visual_token,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=features,
        )

    # generate() asks for it in every step of a class that is saved with its code: found anew, it costs a small layer.
    forward.__signature__ = inspect.signature(forward)

    def _text_loss_sum(self, hidden_states: torch.Tensor, labels: torch.LongTensor) -> torch.Tensor:
        """Summed cross-entropy of (M, D) hidden states and (M,) labels, without (M, vocabulary) logits at once."""

        def loss_sum(hidden_states: torch.Tensor, labels: torch.LongTensor) -> torch.Tensor:
            logits = self.lm_head(hidden_states).float()
            # The placeholder is never predicted as text, so it takes no probability. Added in place, as the gradient
            # then passes without a copy.
            penalty = torch.zeros(logits.shape[-1], device=logits.device)
            logits += penalty.index_fill(
                0, torch.tensor([self.config.image_token_id], device=logits.device), -torch.inf
            )
            labels = labels.to(logits.device)
            with torch.no_grad():
                log_probs = logits.log_softmax(-1)
                entropy = -(log_probs.exp() * log_probs.nan_to_num(neginf=0.0)).sum()
                correct = (logits.argmax(-1) == labels).sum().float()
            return torch.stack([F.cross_entropy(logits, labels, reduction="sum"), correct, entropy])

        rows = max(1, MAX_LOGITS // self.config.text_config.vocab_size)
        if len(labels) <= rows:
            return loss_sum(hidden_states, labels)
        chunks = zip(hidden_states.split(rows), labels.split(rows), strict=True)
        return sum(checkpoint(loss_sum, *chunk, use_reentrant=False) for chunk in chunks)

    def _visual_targets(self, input_ids: torch.LongTensor, next_labels: torch.LongTensor) -> torch.Tensor:
        """Mask (B, S) of the visual tokens to be regressed. Nothing predicts position 0."""
        predicts_target = next_labels == self.config.image_token_id
        next_ids = F.pad(input_ids[:, 1:], (0, 1), value=-100)
        torch_compilable_check(
            (next_ids[predicts_target] == self.config.image_token_id).all(),
            lambda: (
                f"`labels` hold the image token id {self.config.image_token_id} where `input_ids` do not: a "
                "regression target must be a visual token of the input."
            ),
        )
        return F.pad(predicts_target[:, :-1], (1, 0))

    def _losses(
        self,
        hidden_states: torch.Tensor,
        next_labels: torch.LongTensor,
        input_ids: torch.LongTensor,
        is_target: torch.Tensor,
        features: MetaMorphImageFeatures | None,
        num_items_in_batch: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """The two losses, each over its own count (paper, section 3.2). An empty selection gives an exact 0."""
        image_token_id = self.config.image_token_id
        predicts_target = next_labels == image_token_id
        is_text = (next_labels != -100) & ~predicts_target

        text_sum, correct, entropy = self._text_loss_sum(hidden_states[is_text], next_labels[is_text])
        predictions = self.vision_head(hidden_states[predicts_target])
        if features is None:
            if predictions.shape[0]:
                raise ValueError(
                    f"`labels` mark {predictions.shape[0]} visual tokens as targets, but no images were given: pass "
                    "`pixel_values` or `visual_tokens`."
                )
            targets = predictions.detach()
        else:
            is_image = input_ids == image_token_id
            targets = features.visual_tokens.flatten(0, 1)[is_target[is_image]].to(predictions.device)
        visual_sum = self.visual_loss_function(predictions, targets).sum()
        cosine_sum = F.cosine_similarity(predictions.detach().float(), targets.float(), dim=-1).sum()

        num_text_labels, num_visual_labels = is_text.sum(), predicts_target.sum()
        text_count, visual_count = (
            (num_text_labels, num_visual_labels) if num_items_in_batch is None else num_items_in_batch
        )
        text_loss, visual_loss = text_sum / text_count.clamp(min=1), visual_sum / visual_count.clamp(min=1)
        return {
            "loss": text_loss + self.config.visual_loss_weight * visual_loss.to(text_loss.device),
            "text_loss": text_loss,
            "visual_loss": visual_loss,
            "visual_cosine": cosine_sum / num_visual_labels.clamp(min=1),
            "num_text_labels": num_text_labels,
            "text_accuracy": correct.detach() / num_text_labels.clamp(min=1),
            "text_entropy": entropy.detach() / num_text_labels.clamp(min=1),
            "num_visual_labels": num_visual_labels,
        }


__all__ = ["MetaMorphForConditionalGeneration", "MetaMorphModel", "MetaMorphPreTrainedModel"]
