"""MetaMorph: a causal language model that reads and predicts continuous visual tokens (arXiv 2412.14164).

Shapes: B batch, S sequence, I images in the batch, N visual tokens per image, D width of the language model, V width
of a visual token, P patches per image, M selected positions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from huggingface_hub import HfApi
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MultimodalCausalLMOutputWithPast,
    MultimodalMoeBaseModelOutputWithPast,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, torch_compilable_check
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_metamorph import MetaMorphConfig
from .generation_checks import check_image_indices
from .generation_metamorph import MetaMorphGenerationConfig, MetaMorphGenerationMixin
from .model_cards import create_model_card


# Largest number of float32 logits that training holds at once, 256 MiB. More are computed in chunks, and again in the
# backward pass.
MAX_LOGITS = 2**26

# Language models that do not return the cache which `generate()` hands them.
WITHOUT_COMMON_CACHE = ("electra", "git", "minimax", "openai-gpt", "recurrent_gemma", "reformer", "rwkv", "xlm")
WITHOUT_COMMON_CACHE += ("xlnet", "xlstm")


@dataclass
class MetaMorphImageFeatures(BaseModelOutputWithPooling):
    """Images as visual tokens (I, N, V), the regression targets, and projected, as `pooler_output` (I, N, D)."""

    visual_tokens: torch.FloatTensor | None = None


@dataclass
class MetaMorphCausalLMOutputWithPast(MultimodalCausalLMOutputWithPast):
    """
    [`MultimodalCausalLMOutputWithPast`] with losses and measures (scalars; 0 over no labels) if there are `labels`,
    otherwise with the next visual token.

    Args:
        loss: `text_loss + visual_loss_weight * visual_loss`, means over text labels and visual labels, plus
            `router_aux_loss_coef * aux_loss`, if a mixture of experts returns its router's logits.
        text_accuracy: Share of text labels that have the largest logit.
        text_entropy: Mean entropy, in nats, of the distributions that predict text labels.
        visual_cosine: Mean cosine of predicted and true visual tokens, whatever the loss.
        text_losses, visual_losses: Loss of each text and each visual label, in reading order, without gradients.
        logits (`torch.Tensor` of shape (B, S, vocabulary)): None with `labels` in training mode.
        next_visual_token (`torch.Tensor` of shape (B, 1 or G, V)): The vision head's prediction at the last position
            (at the last G positions, given G `query_indices`), normalized.
    """

    text_loss: torch.FloatTensor | None = None
    visual_loss: torch.FloatTensor | None = None
    text_accuracy: torch.FloatTensor | None = None
    text_entropy: torch.FloatTensor | None = None
    visual_cosine: torch.FloatTensor | None = None
    num_text_labels: torch.LongTensor | None = None
    num_visual_labels: torch.LongTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    text_losses: torch.FloatTensor | None = None
    visual_losses: torch.FloatTensor | None = None
    next_visual_token: torch.FloatTensor | None = None


class MetaMorphMLP(nn.Sequential):
    """`num_layers` linear layers with GELU (erf) between them; all hidden widths are the language model's."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int, num_layers: int):
        widths = [in_features, *[hidden_features] * (num_layers - 1), out_features]
        layers = []
        for width, next_width in zip(widths, widths[1:]):
            layers += [nn.Linear(width, next_width), nn.GELU()]
        super().__init__(*layers[:-1])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # In a float16 model these layers stay in float32. Weights quantized to integers still have float biases.
        dtype = next(p.dtype for p in self.parameters() if p.is_floating_point())
        return super().forward(hidden_states.to(dtype))


class MetaMorphPreTrainedModel(PreTrainedModel):
    config: MetaMorphConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    output_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # Neither quantized nor cast to float16: the tower's output must equal everybody else's visual tokens, and
    # generated ones run through projector and head in a closed loop. The patterns match from the name's start.
    _keep_in_fp32_modules = [r"(model\.)?(vision_tower|projector)"]
    _keys_to_ignore_on_load_unexpected = [r"vision_tower\.head\."]  # SigLIP's pooling head, in older checkpoints
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @property
    def dtype(self) -> torch.dtype:
        """The language model's dtype; in float16, the other parts stay in float32."""
        return self.base_model.language_model.dtype

    def initialize_weights(self) -> None:
        """Initialize missing weights, those of sub-models by their own rules, which transformers skips in part."""
        for child in self.children():
            if isinstance(child, PreTrainedModel):
                child.initialize_weights()
        super().initialize_weights()

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """
        See [`~transformers.PreTrainedModel.push_to_hub`]. Writes our model card where the repository has none, but not
        with `create_pr` or `revision`, as it would go to the main branch.
        """
        token, api = kwargs.get("token"), HfApi()
        if not kwargs.get("create_pr") and not kwargs.get("revision"):
            # Adds the namespace to the name, without which the Hub does not find an existing card.
            repo_id = api.create_repo(repo_id, private=kwargs.get("private"), token=token, exist_ok=True).repo_id
            if not api.file_exists(repo_id, "README.md", token=token):
                card = str(create_model_card(self.config, repo_id)).encode()  # transformers adds its tags to this card
                api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo_id, token=token)
        return super().push_to_hub(repo_id, **kwargs)


class MetaMorphModel(MetaMorphPreTrainedModel):
    """Vision tower, projector and language model, without `lm_head` and vision head."""

    def __init__(self, config: MetaMorphConfig):
        super().__init__(config)
        if config.text_config.model_type in WITHOUT_COMMON_CACHE:
            model_type = config.text_config.model_type
            raise ValueError(f"{model_type} models have no cache for `generate`: choose another, such as Llama.")
        width = config.text_config.hidden_size
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.projector = MetaMorphMLP(config.visual_token_dim, width, width, config.projector_layers)
        self.language_model = AutoModel.from_config(config.text_config)
        is_parallel = config.visual_decoding == "parallel"
        self.visual_queries = nn.Embedding(config.num_image_tokens, width) if is_parallel else None
        self.post_init()

    def train(self, mode: bool = True) -> "MetaMorphModel":
        """See [`torch.nn.Module.train`]. A frozen vision tower stays in eval mode."""
        super().train(mode)
        self.vision_tower.train(mode and self._is_vision_tower_trained())
        return self

    def _is_vision_tower_trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self.vision_tower.parameters())

    def normalize_visual_tokens(self, visual_tokens: torch.Tensor) -> torch.Tensor:
        """L2-normalize (..., V) over channels, if the configuration says so."""
        return F.normalize(visual_tokens, dim=-1) if self.config.normalize_visual_tokens else visual_tokens

    def reduce_patches(self, patches: torch.Tensor) -> torch.Tensor:
        """Resize a square patch grid (I, P, C) to N tokens (I, N, V), in float32."""
        config, (num_images, num_patches, channels) = self.config, patches.shape
        is_concatenated = config.token_reduction == "concat_interpolation"
        side, target = round(num_patches**0.5), config.grid_side * (2 if is_concatenated else 1)
        if side**2 != num_patches:
            problem = f"The vision tower returned {num_patches} patches per image, which do not form a square grid"
            raise ValueError(f"{problem}: use a vision encoder with square images and patches.")
        grid = patches.transpose(1, 2).reshape(num_images, channels, side, side)
        if side != target:
            resized = F.interpolate(grid.float(), size=(target, target), mode="bilinear", align_corners=False)
            grid = resized.to(patches.dtype)
        if is_concatenated:  # channels of a token: top-left, top-right, bottom-left, bottom-right
            grid = F.pixel_unshuffle(grid, 2).unflatten(1, (channels, 4)).transpose(1, 2).flatten(1, 2)
        return grid.flatten(2).transpose(1, 2)

    def get_visual_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Encode images (I, 3, height, width) to visual tokens (I, N, V): the tower's last layer *before* its final norm,
        resized on the patch grid and L2-normalized (paper, section 3). Pass them as `visual_tokens` later on.
        """
        return self._encode(pixel_values)[1]

    def _encode(self, pixel_values, output_hidden_states=None, **kwargs) -> tuple[ModelOutput, torch.Tensor]:
        """Run the vision tower; return its output and the visual tokens (I, N, V)."""
        if pixel_values.ndim != 4:
            shape = tuple(pixel_values.shape)
            raise ValueError(f"`pixel_values` has shape {shape}, expected (images, 3, height, width).")
        config, (height, width) = self.config.vision_config, pixel_values.shape[2:]
        num_patches = (height // config.patch_size) * (width // config.patch_size)
        states = True if output_hidden_states or config.output_hidden_states else [-1]
        # Gradient checkpointing makes the inputs of every layer require gradients, even in a frozen tower.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._is_vision_tower_trained()):
            pixel_values, options = pixel_values.to(self.vision_tower.dtype), {**kwargs, "return_dict": True}
            outputs = self.vision_tower(pixel_values, output_hidden_states=states, **options)
        patches = outputs.hidden_states[-1][:, -num_patches:]  # drops class and register tokens, which come first
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
        Encode images, or take encoded ones, and project them to the language model's width.

        Args:
            pixel_values (`torch.Tensor` of shape (I, 3, height, width), *optional*): Images.
            visual_tokens (`torch.Tensor` of shape (I, N, V), *optional*): Encoded images, instead of `pixel_values`.
            image_indices (`torch.Tensor` of shape (I,), int64, *optional*):
                Index of the given image that stands at each image's position, so that one image can stand at several.
            noise_mask (`torch.Tensor` of shape (I,), bool, *optional*):
                Images whose projected tokens carry noise in training (see `visual_token_noise` in the configuration).

        Raises:
            ValueError: if both or none of the inputs are given, or `visual_tokens` has a wrong shape.
        """
        if (pixel_values is None) == (visual_tokens is None):
            raise ValueError("Pass exactly one of `pixel_values` and `visual_tokens`.")
        outputs = BaseModelOutputWithPooling()
        if visual_tokens is None:
            outputs, visual_tokens = self._encode(pixel_values, **kwargs)
        found, expected = tuple(visual_tokens.shape), (self.config.num_image_tokens, self.config.visual_token_dim)
        if found[1:] != expected:
            raise ValueError(f"`visual_tokens` has shape {found}, expected (images, {expected[0]}, {expected[1]}).")
        if image_indices is not None:
            check_image_indices(image_indices, len(visual_tokens))
            visual_tokens = visual_tokens[image_indices]
        has_noise = self.training and self.config.visual_token_noise and self.visual_queries is None
        inputs = self._add_noise(visual_tokens, noise_mask) if has_noise and noise_mask is not None else visual_tokens
        return MetaMorphImageFeatures(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.projector(inputs),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            visual_tokens=visual_tokens,
        )

    def _add_noise(self, visual_tokens: torch.Tensor, noise_mask: torch.Tensor) -> torch.Tensor:
        """Replace a random share of the selected images' visual tokens (I, N, V) by noise of the same norm."""
        share = torch.rand(len(visual_tokens), 1, 1, device=visual_tokens.device) * self.config.visual_token_noise
        share = (share.clamp(max=1) * noise_mask[:, None, None]).to(visual_tokens.dtype)
        noise = F.normalize(torch.randn_like(visual_tokens), dim=-1) * visual_tokens.norm(dim=-1, keepdim=True)
        return self.normalize_visual_tokens(torch.lerp(visual_tokens, noise, share))

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """Return the mask (B, S) of positions that `image_features` (I, N, D) fill; their counts must agree."""
        if input_ids is None:
            image_token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        self.check_image_count(mask, image_features.shape[0] * image_features.shape[1])
        return mask

    def check_image_ids(self) -> None:
        """Raise a ValueError if the language model's vocabulary has no room for the three image tokens."""
        config, vocab_size = self.config, self.config.text_config.vocab_size
        image_ids = (config.image_token_id, config.image_start_token_id, config.image_end_token_id)
        if max(image_ids) >= vocab_size:
            problem = f"The image token ids {image_ids} do not fit in the language model's vocabulary of {vocab_size}"
            raise ValueError(f"{problem}: call model.resize_token_embeddings(len(tokenizer)).")

    def check_image_count(self, mask: torch.Tensor, num_features: int) -> None:
        """Raise an error that states both counts unless the mask of image tokens has `num_features` positions."""
        num_images = num_features / self.config.num_image_tokens
        torch_compilable_check(
            mask.sum() == num_features,
            lambda: (
                f"The input has {int(mask.sum())} image token positions, but the images fill {num_features} "
                f"({num_images:g} images): pass one image per placeholder, e.g. through the processor."
            ),
        )

    def _embed(self, input_ids, inputs_embeds, image_embeds, generated_visual_tokens, query_indices) -> torch.Tensor:
        """Return embeddings (B, S, D) with images and generated visual tokens at the image token positions."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        device, dtype, generated = inputs_embeds.device, inputs_embeds.dtype, inputs_embeds[:, :0]
        if query_indices is not None:
            generated = self.visual_queries(query_indices)
        elif generated_visual_tokens is not None:
            generated = self.projector(generated_visual_tokens)
        prompt_length = inputs_embeds.shape[1] - generated.shape[1]
        prompt, answer = inputs_embeds[:, :prompt_length], inputs_embeds[:, prompt_length:]
        prompt_ids = None if input_ids is None else input_ids[:, :prompt_length]
        if image_embeds is not None:
            if not isinstance(image_embeds, torch.Tensor):  # generate() passes lists when it splits or expands
                image_embeds = torch.stack(list(image_embeds))
            mask = self.get_placeholder_mask(prompt_ids, prompt, image_embeds)[..., None].to(device)
            prompt = prompt.masked_scatter(mask, image_embeds.to(device, dtype))
        elif prompt_ids is not None and prompt_length > 1:
            self.check_image_count(prompt_ids == self.config.image_token_id, 0)
        if answer.shape[1] == 0:
            return prompt
        is_generated = (input_ids[:, prompt_length:] == self.config.image_token_id).unsqueeze(-1)
        return torch.cat([prompt, torch.where(is_generated, generated.to(device, dtype), answer)], dim=1)

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
        query_indices: torch.LongTensor | None = None,
        visual_target_mask: torch.BoolTensor | None = None,
        mm_encoder_outputs: dict[str, MetaMorphImageFeatures] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MultimodalMoeBaseModelOutputWithPast:
        """
        Run the language model on text and images (see [`get_image_features`]), which stand at `image_token_id`.

        Args:
            generated_visual_tokens (`torch.Tensor` of shape (B, G, V)), query_indices (`torch.LongTensor` (B, G)):
                Set by `generate()`: predictions, or visual queries, for image tokens at the last G positions.
            visual_target_mask (`torch.BoolTensor` of shape (B, S)): Visual tokens that are regression targets; they
                are replaced by visual queries in parallel decoding, otherwise `visual_token_noise` applies to them.
            mm_encoder_outputs (`dict`): `{"image": MetaMorphImageFeatures}`, instead of `pixel_values`.

        Raises:
            ValueError: if inputs are missing, given twice, or differ in their numbers of images.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if input_ids is None or input_ids.shape[1] > 1:  # not at each decoding step
            self.check_image_ids()
        features = (mm_encoder_outputs or {}).get("image")
        given = [images for images in (image_indices, pixel_values, visual_tokens) if images is not None]
        if given and features is not None:
            raise ValueError("Images are given twice: in `mm_encoder_outputs` and as pixels or visual tokens.")
        is_target, num_tokens = None, self.config.num_image_tokens  # which of the images (I,) are regression targets
        if visual_target_mask is not None and (given or features is not None):
            is_image = input_ids == self.config.image_token_id
            num_images = len(given[0] if given else features.pooler_output)
            self.check_image_count(is_image, num_images * num_tokens)
            is_target = visual_target_mask[is_image].view(num_images, num_tokens).any(-1)
        if given:
            # Other kwargs, such as those for packing, are for the language model only.
            shared = ("output_attentions", "output_hidden_states")
            tower_kwargs = {name: kwargs[name] for name in shared if name in kwargs}
            features = self.get_image_features(
                pixel_values, visual_tokens, image_indices, is_target, return_dict=True, **tower_kwargs
            )
        image_embeds = None if features is None else features.pooler_output
        if is_target is not None and self.visual_queries is not None:
            queries = self.visual_queries(torch.arange(num_tokens, device=image_embeds.device)).to(image_embeds.dtype)
            image_embeds = torch.where(is_target[:, None, None], queries, image_embeds)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=self._embed(input_ids, inputs_embeds, image_embeds, generated_visual_tokens, query_indices),
            **kwargs,
        )
        return MultimodalMoeBaseModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.get("attentions"),  # Mamba has none
            image_outputs=features,
            router_logits=outputs.get("router_logits"),
        )


class MetaMorphForConditionalGeneration(MetaMorphGenerationMixin, MetaMorphPreTrainedModel):
    """MetaMorph with `lm_head` for text and vision head for visual tokens; `generate()` mixes the two."""

    generation_config_class = MetaMorphGenerationConfig
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

    def get_image_features(self, *args, **kwargs) -> MetaMorphImageFeatures:
        """See [`MetaMorphModel.get_image_features`]."""
        return self.model.get_image_features(*args, **kwargs)

    def get_visual_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See [`MetaMorphModel.get_visual_tokens`]."""
        return self.model.get_visual_tokens(pixel_values)

    @torch.no_grad()
    def enable_parallel_decoding(self, visual_tokens: torch.Tensor) -> None:
        """
        Switch an autoregressive model to `visual_decoding="parallel"`; it must be trained on to generate images again.
        The visual queries start as the mean of the projections of some `visual_tokens` (I, N, V).
        """
        if self.model.visual_queries is not None:
            raise ValueError('The model has visual_decoding="parallel" already: its visual queries would be lost.')
        queries = self.get_image_features(visual_tokens=visual_tokens, return_dict=True).pooler_output.mean(0)
        self.model.visual_queries = nn.Embedding(*queries.shape, _weight=queries.to(self.dtype))
        self.config.visual_decoding = "parallel"

    def visual_loss_function(self, predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the float32 loss (M,) of each predicted visual token (M, V)."""
        predictions, targets = self.model.normalize_visual_tokens(predictions.float()), targets.detach().float()
        if self.config.visual_loss_type == "cosine":
            return -F.cosine_similarity(predictions, targets, dim=-1)
        loss = F.l1_loss if self.config.visual_loss_type == "l1" else F.mse_loss
        return loss(predictions, targets, reduction="none").mean(-1)

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
        query_indices: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, MetaMorphImageFeatures] | None = None,
        num_items_in_batch: torch.Tensor | None = None,
        precomputed_outputs: MetaMorphCausalLMOutputWithPast | None = None,
        measure_text: Callable | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MetaMorphCausalLMOutputWithPast:
        """
        Predict text and visual tokens. See [`MetaMorphModel.forward`] for the inputs.

        Args:
            labels (`torch.LongTensor` of shape (B, S)): At a text position the token id to predict or -100. At a
                visual token, `image_token_id` if it is a regression target, -100 if it is only context.
            num_items_in_batch (`torch.Tensor` of shape (2,), int64): Text and visual labels of a whole optimization
                step (all devices, all accumulation steps), by which the losses are divided.
            precomputed_outputs ([`MetaMorphCausalLMOutputWithPast`]): Set by `generate()` to be returned as it is.
            measure_text (`Callable`, *optional*): Called with model, hidden states and labels in the place of the
                method `measure_text`. [`VPiTTrainer`] passes one that needs less memory.

        Raises:
            ValueError: if `labels` mark a visual token where `input_ids` hold none.
        """
        if precomputed_outputs is not None:
            return precomputed_outputs
        target_mask = None if labels is None else self._find_visual_targets(input_ids, labels)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            visual_tokens=visual_tokens,
            image_indices=image_indices,
            query_indices=query_indices,
            visual_target_mask=target_mask,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        hidden_states, results = outputs.last_hidden_state, {}
        if labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            results["logits"] = self.lm_head(hidden_states[:, kept])
        if labels is None:
            num_steps = 1 if query_indices is None else query_indices.shape[1]
            predictions = self.vision_head(hidden_states[:, -num_steps:])
            results["next_visual_token"] = self.model.normalize_visual_tokens(predictions)
        else:
            results |= self._compute_losses(outputs, input_ids, labels, target_mask, num_items_in_batch, measure_text)
            if outputs.router_logits:
                results |= self._add_aux_loss(results["loss"], outputs.router_logits, attention_mask, position_ids)
        return MetaMorphCausalLMOutputWithPast(
            **results,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=outputs.image_outputs,
        )

    def _add_aux_loss(self, loss, router_logits, attention_mask, position_ids) -> dict:
        """Measure how unevenly experts are used for tokens that are not padding, and add that to the loss."""
        config, num_experts = self.config.text_config, router_logits[0].shape[-1]
        if attention_mask is None and position_ids is not None:  # packed; each position of the padding is 0
            is_token = (position_ids > 0) | (F.pad(position_ids[:, 1:], (0, 1)) == 1)
            is_token = is_token.expand(len(router_logits[0]) // is_token.shape[1], -1)
            attention_mask = is_token | ~is_token.any()  # a mean over no tokens would be NaN
        aux_loss = load_balancing_loss_func(router_logits, num_experts, config.num_experts_per_tok, attention_mask)
        aux_loss = aux_loss.to(loss.device)
        return {"loss": loss + config.router_aux_loss_coef * aux_loss, "aux_loss": aux_loss}

    def _find_visual_targets(self, input_ids: torch.LongTensor | None, labels: torch.LongTensor) -> torch.Tensor:
        """Return the mask (B, S) of the visual tokens to be regressed. Nothing predicts position 0."""
        if input_ids is None:
            raise ValueError("`labels` need `input_ids`: visual targets are found by their image token ids.")
        is_target = labels == self.config.image_token_id
        is_target[:, 0] = False
        torch_compilable_check(
            (input_ids[is_target] == self.config.image_token_id).all(),
            lambda: "`labels` hold `image_token_id` where `input_ids` do not: a target must be a visual token.",
        )
        return is_target

    def measure_text(self, hidden_states: torch.Tensor, labels: torch.LongTensor) -> torch.Tensor:
        """
        Return cross-entropy, correctness and entropy (3, M) of the predictions of (M,) labels from (M, D) hidden
        states, without holding (M, vocabulary) logits at once.
        """

        def measure_chunk(hidden_states: torch.Tensor, labels: torch.LongTensor) -> torch.Tensor:
            logits = self.lm_head(hidden_states).float()
            # The image token takes no probability. A sum in place passes the gradient on without a copy.
            is_image = torch.arange(logits.shape[-1], device=logits.device) == self.config.image_token_id
            logits += torch.zeros_like(logits[:1]).masked_fill(is_image, -torch.inf)
            loss = F.cross_entropy(logits, labels.to(logits.device), reduction="none")
            with torch.no_grad():
                correct = logits.argmax(-1) == labels.to(logits.device)
                # In slices, so that the probabilities take little memory beside the logits.
                rows = max(1, MAX_LOGITS // 16 // logits.shape[-1])
                entropy = torch.cat([torch.special.entr(part.softmax(-1)).sum(-1) for part in logits.split(rows)])
            return torch.stack([loss, correct.to(loss), entropy])

        rows = max(1, MAX_LOGITS // self.config.text_config.vocab_size)
        if len(labels) <= rows:
            return measure_chunk(hidden_states, labels)
        chunks = zip(hidden_states.split(rows), labels.split(rows), strict=True)
        return torch.cat([checkpoint(measure_chunk, *chunk, use_reentrant=False) for chunk in chunks], dim=1)

    def _compute_losses(self, outputs, input_ids, labels, target_mask, num_items_in_batch, measure_text) -> dict:
        """Compute both losses, each over its own count (paper, section 3.2). An empty selection gives an exact 0."""
        hidden_states, features = outputs.last_hidden_state, outputs.image_outputs
        is_text = (labels != -100) & (labels != self.config.image_token_id)
        is_text[:, 0] = False
        predicts_text, predicts_visual = (F.pad(mask[:, 1:], (0, 1)) for mask in (is_text, target_mask))
        measure_text = measure_text or type(self).measure_text
        text_measures = measure_text(self, hidden_states[predicts_text], labels[is_text])
        text_sums = text_measures.sum(1)
        predictions = self.vision_head(hidden_states[predicts_visual])
        targets = predictions.detach()
        if features is not None:  # without images there are no visual labels either
            is_target = target_mask[input_ids == self.config.image_token_id]
            targets = features.visual_tokens.flatten(0, 1)[is_target].to(predictions.device)
        visual_losses = self.visual_loss_function(predictions, targets)
        cosine_sum = F.cosine_similarity(predictions.detach().float(), targets.float(), dim=-1).sum()

        counts = torch.stack([is_text.sum(), target_mask.sum()])
        num_text, num_visual = counts.clamp(min=1)
        total_text, total_visual = (counts if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        text_loss, visual_loss = text_sums[0] / total_text, visual_losses.sum() / total_visual
        return {
            "loss": text_loss + self.config.visual_loss_weight * visual_loss.to(text_loss.device),
            "text_loss": text_loss,
            "visual_loss": visual_loss,
            "text_accuracy": text_sums[1].detach() / num_text,
            "text_entropy": text_sums[2].detach() / num_text,
            "visual_cosine": cosine_sum / num_visual,
            "num_text_labels": counts[0],
            "num_visual_labels": counts[1],
            "text_losses": text_measures[0].detach(),
            "visual_losses": visual_losses.detach(),
        }
