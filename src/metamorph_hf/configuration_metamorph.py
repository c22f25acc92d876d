"""Configuration of MetaMorph (arXiv 2412.14164)."""

import copy
import re
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


@strict
class MetaMorphConfig(PreTrainedConfig):
    r"""
    Configuration of [`MetaMorphForConditionalGeneration`]: a vision tower, a projector, a causal language model and a
    vision head. Sub-configurations are copied; objects of the caller stay as they are.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to the shape of Llama-3.1-8B):
            Configuration of any causal language model that `AutoModelForCausalLM` knows.
        vision_config (`PreTrainedConfig` or `dict`, *optional*, defaults to SigLIP so400m-patch14-384):
            Configuration of any vision encoder with a square patch grid, `image_size`, `patch_size`, `hidden_size`.
        image_token_id (`int`, *optional*, defaults to 128258): Id at each position of a visual token, in `input_ids`
            and, where the visual token is a regression target, in `labels`. It is never predicted as text.
        image_start_token_id, image_end_token_id (`int`): Ids of `<image_start>` and `<image_end>`, ordinary text.
        num_image_tokens (`int`, *optional*, defaults to 64): Visual tokens per image, N; a square number.
        token_reduction (`str`, *optional*): How the patch grid becomes N visual tokens: `"interpolation"` (bilinear to
            sqrt(N) x sqrt(N)) or `"concat_interpolation"` (to twice that side; 2x2 blocks become 4 V channels).
        projector_type (`str`, *optional*): `"linear"`, or `"mlp2x_gelu"` (the paper), `"mlp3x_gelu"` and so on for
            that many linear layers.
        vision_head_type (`str`, *optional*): `"linear"`, `"mlp"` (the paper) or `"mlp2x_gelu"`: 1, 2 or 3 layers.
        normalize_visual_tokens (`bool`, *optional*, defaults to `True`): L2-normalize visual tokens over channels.
        visual_loss_type (`str`, *optional*, defaults to `"cosine"`): `"cosine"` (the paper), `"l1"` or `"mse"`.
        visual_loss_weight (`float`, *optional*, defaults to 1.0): Weight of the visual loss beside the text loss.
        visual_token_noise (`float`, *optional*, defaults to 0.0): Largest share of noise in the visual tokens *fed in*
            for answer images in training; each image draws its share from [0, this], cut at 1. The paper has none; a
            small model without it copies its inputs and does not learn to generate images from words.
        visual_decoding (`str`, *optional*): How an answer's image is generated. `"autoregressive"` (the paper): each
            predicted visual token is fed back. `"parallel"`: the inputs are N learned queries (as in Nexus-Gen, arXiv
            2504.21356), so that one forward pass predicts all N visual tokens; `visual_token_noise` does not apply.
        tie_word_embeddings (`bool`, *optional*): Share `lm_head` with the embeddings; defaults to `text_config`'s.

    Raises:
        ValueError: if a number is out of range, `projector_type` is unknown, or image token ids are not distinct.
        StrictDataclassError: if a value has another type, or is not one of the choices.
    """

    model_type = "metamorph"
    # Trainer gathers all other outputs, whose shapes must agree on all processes.
    keys_to_ignore_at_inference = ["cache", "image_outputs", "text_losses", "visual_losses"]
    # The names of transformers' generic code.
    attribute_map = {"vision_start_token_id": "image_start_token_id", "vision_end_token_id": "image_end_token_id"}
    sub_configs_defaults = {
        "text_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="llama",
            init_kwargs={
                "vocab_size": 128259,
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "bos_token_id": 128000,
                "eos_token_id": [128001, 128009],
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 500000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
        ),
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="siglip_vision_model",
            init_kwargs={
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 384,
                "patch_size": 14,
            },
        ),
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 128258
    image_start_token_id: int = 128256
    image_end_token_id: int = 128257
    num_image_tokens: int = 64
    token_reduction: Literal["interpolation", "concat_interpolation"] = "interpolation"
    projector_type: str = "mlp2x_gelu"
    vision_head_type: Literal["linear", "mlp", "mlp2x_gelu"] = "mlp"
    normalize_visual_tokens: bool = True
    visual_loss_type: Literal["cosine", "l1", "mse"] = "cosine"
    visual_loss_weight: float | int = 1.0
    visual_token_noise: float | int = 0.0
    visual_decoding: Literal["autoregressive", "parallel"] = "autoregressive"
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        self.text_config, self.vision_config = copy.deepcopy(self.text_config), copy.deepcopy(self.vision_config)
        try:
            super().__post_init__(**kwargs)
        except (AttributeError, LookupError, RuntimeError, TypeError, ZeroDivisionError) as error:
            # The classes of transformers calculate before they validate.
            raise ValueError(f"text_config or vision_config has a value of a wrong kind: {error}") from error
        if getattr(self, "auto_map", None) is None:  # saving adds AutoConfig and AutoModel
            model_class = "modeling_metamorph.MetaMorphForConditionalGeneration"
            self.auto_map = {"AutoModelForImageTextToText": model_class, "AutoModelForMultimodalLM": model_class}
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = self.text_config.tie_word_embeddings
        # Visual tokens come from the last layer; if tied, its hidden state would be the one after the final norm.
        self.vision_config.tie_last_hidden_states = False
        # SigLIP's pooling head is never used, and its attention cannot be offloaded.
        self.vision_config.vision_use_head = False
        if self.num_image_tokens < 1 or self.grid_side**2 != self.num_image_tokens:
            raise ValueError(f"num_image_tokens is {self.num_image_tokens}, but must be a square number such as 64.")
        if self.projector_type != "linear" and not re.fullmatch(r"mlp[1-9]\d*x_gelu", self.projector_type):
            raise ValueError(f'projector_type is "{self.projector_type}", but must be "linear" or like "mlp2x_gelu".')
        for name in ("visual_loss_weight", "visual_token_noise"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, but must be 0 or a larger finite number.")
        ids = (self.image_token_id, self.image_start_token_id, self.image_end_token_id)
        if len(set(ids)) != 3 or min(ids) < 0:
            names = "image_token_id, image_start_token_id and image_end_token_id"
            raise ValueError(f"{names} are {ids}, but must be distinct ids of the vocabulary.")

    @property
    def grid_side(self) -> int:
        """Side of the square grid that the visual tokens of one image form."""
        return round(self.num_image_tokens**0.5)

    @property
    def projector_layers(self) -> int:
        """Number of linear layers of the projector."""
        return 1 if self.projector_type == "linear" else int(self.projector_type[len("mlp") : -len("x_gelu")])

    @property
    def vision_head_layers(self) -> int:
        """Number of linear layers of the vision head."""
        return {"linear": 1, "mlp": 2, "mlp2x_gelu": 3}[self.vision_head_type]

    @property
    def visual_token_dim(self) -> int:
        """Width V of one visual token."""
        return self.vision_config.hidden_size * (4 if self.token_reduction == "concat_interpolation" else 1)
