"""The pipeline: prompts and pictures in, text and pictures out.

Shapes: B prompts, I generated images of all prompts together, N visual tokens per image, V vision width.
"""

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.utils import BaseOutput, logging
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from transformers import PreTrainedModel, ProcessorMixin, StoppingCriteria
from transformers.dynamic_module_utils import custom_object_save


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# Modules of this package whose classes a saved pipeline may hold. Their code is saved with it.
OWN_MODULES = (
    "modeling_metamorph",
    "pipeline_metamorph",
    "processing_metamorph",
    "small_visualizer",
    "visual_token_projector",
)

CARD = """---
{metadata}
---

# {title}

A [MetaMorph](https://arxiv.org/abs/2412.14164) pipeline: {does}, and a latent diffusion U-Net paints {tokens} visual
tokens an image, {width} wide, in {height} x {across} pixels.

{description}

## How to use it

With the package `metamorph_hf` installed:

```python
from metamorph_hf import MetaMorphPipeline

pipe = MetaMorphPipeline.from_pretrained("{name}")
{call}
```
"""

Conversation = list[dict]


@dataclass
class MetaMorphPipelineOutput(BaseOutput):
    """
    Args:
        images (`list[PIL.Image.Image]`, or `np.ndarray` or `torch.Tensor` with I first):
            The pictures of all answers, in order; those of one drawing (`num_images_per_prompt`, and for each of them
            the scales of `guidance_scale`) follow each other.
        text (`list[str]` of length B): The answers, with `<image>` where a picture stands.
        image_counts (`list[int]` of length B): How many of `images` belong to each answer.
        nsfw_content_detected (`list[bool]`, *optional*): What the safety checker blackened, if there is one.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    text: list[str]
    image_counts: list[int]
    nsfw_content_detected: list[bool] | None = None


class _ProgressCriteria(StoppingCriteria):
    """Never stops; moves a progress bar on by a step."""

    def __init__(self, progress_bar):
        self.progress_bar = progress_bar

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        self.progress_bar.update()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class MetaMorphPipeline(DiffusionPipeline, StableDiffusionMixin, StableDiffusionLoraLoaderMixin):
    r"""
    Answers prompts with text and pictures: MetaMorph writes text and visual tokens, and a latent diffusion U-Net that
    attends to the visual tokens paints them.

    Args:
        model ([`MetaMorphForConditionalGeneration`], *optional*):
            Writes the answer. Without it the pipeline can only paint, [`~MetaMorphPipeline.decode_visual_tokens`].
        processor ([`MetaMorphProcessor`], *optional*): Messages to the model's inputs, and ids back to text.
        projector ([`VisualTokenProjector`]): Visual tokens to the U-Net's cross-attention states.
        unet ([`UNet2DConditionModel`]): Its `sample_size` decides the size of the pictures.
        vae ([`AutoencoderKL`] or [`PatchVAE`]): Latents to pixels.
        scheduler ([`SchedulerMixin`]): Any that works with a Stable Diffusion U-Net.
        safety_checker ([`PreTrainedModel`], *optional*), feature_extractor (*optional*):
            Stable Diffusion's: the first blackens pictures that the second has prepared for it.
        instruction_template (`str`, *optional*, defaults to `"Generate an image of {}."`):
            What a caption is put in, at `{}`. `None` sends captions as they are.
        default_num_inference_steps (`int`, defaults to 50), default_guidance_scale (`float`, defaults to 7.5):
            What suits these weights, where a call does not say.

    Raises:
        ValueError: if the template has no place for the caption, or two components do not fit: widths of visual
            tokens (model, projector), of cross-attention (projector, U-Net), or channels of latents (U-Net, VAE).

    Example:

        ```py
        >>> pipe = MetaMorphPipeline.from_pretrained("path/to/pipeline")
        >>> pipe("a red apple").images[0]
        >>> pipe("Make it green.", image=picture).images[0]
        >>> pipe(messages=[{"role": "user", "content": [{"type": "text", "text": "Hello!"}]}]).text[0]
        ```
    """

    model_cpu_offload_seq = "model->projector->unet->vae"
    _callback_tensor_inputs = ["latents", "prompt_embeds"]
    _optional_components = ["model", "processor", "safety_checker", "feature_extractor"]
    _exclude_from_cpu_offload = ["safety_checker"]
    # LoRAs of Stable Diffusion load into the U-Net; what they have for its text encoder (under its name) is left out.
    _lora_loadable_modules = ["unet"]
    text_encoder_name = "model"

    def __init__(
        self,
        model: PreTrainedModel | None,
        processor: ProcessorMixin | None,
        projector: ModelMixin,
        unet: UNet2DConditionModel | ModelMixin,  # `from_pipe` takes over what is named here
        vae: AutoencoderKL | ModelMixin,
        scheduler: SchedulerMixin,
        safety_checker: PreTrainedModel | None = None,
        feature_extractor: Any = None,
        instruction_template: str | None = "Generate an image of {}.",
        default_num_inference_steps: int = 50,
        default_guidance_scale: float = 7.5,
    ):
        super().__init__()
        if instruction_template is not None and "{}" not in instruction_template:
            raise ValueError(
                f"`instruction_template` is {instruction_template!r}, but needs a {{}} where the caption goes. "
                "Pass None to send captions as they are."
            )
        if (safety_checker is None) != (feature_extractor is None):
            raise ValueError("`safety_checker` and `feature_extractor` go together: pass both or none.")
        self._check_fit(model, projector, unet, vae)
        if model is not None:  # a folder may lack it, and then only paints; this pipeline cannot answer without
            self._optional_components = ["safety_checker", "feature_extractor"]
        self.register_modules(
            model=model,
            processor=processor,
            projector=projector,
            unet=unet,
            vae=vae,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
        )
        self.register_to_config(
            instruction_template=instruction_template,
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
        )
        # An AutoencoderKL halves at every block but the first; a PatchVAE says its patch.
        blocks = vae.config.get("block_out_channels")
        self.vae_scale_factor = vae.config.patch_size if blocks is None else 2 ** (len(blocks) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @staticmethod
    def _check_fit(model, projector, unet, vae) -> None:
        pairs = [
            ("projector", "cross_attention_dim", projector.config, "U-Net", "cross_attention_dim", unet.config),
            ("VAE", "latent_channels", vae.config, "U-Net", "in_channels", unet.config),
        ]
        if model is not None:
            pairs.append(
                ("model", "visual_token_dim", model.config, "projector", "visual_token_dim", projector.config)
            )
        for one, name, config, other, other_name, other_config in pairs:
            value, other_value = getattr(config, name), getattr(other_config, other_name)
            if value != other_value:
                raise ValueError(
                    f"The {one}'s {name} is {value}, but the {other}'s {other_name} is {other_value}: they do not fit "
                    "together."
                )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "MetaMorphPipeline":
        """
        As of every diffusers pipeline.

        Raises:
            FileNotFoundError: if a folder lacks one of the components that its `model_index.json` names.
        """
        folder = Path(pretrained_model_name_or_path)
        index = folder / cls.config_name
        if index.is_file():
            parts = {name: value for name, value in json.loads(index.read_text()).items() if name[0] != "_"}
            missing = [
                name
                for name, value in parts.items()
                if isinstance(value, list) and value[0] and name not in kwargs and not (folder / name).is_dir()
            ]
            if missing:
                raise FileNotFoundError(
                    f"{folder} lacks the folders {', '.join(missing)} named in its {cls.config_name}: copy it whole, "
                    f"or pass what is missing ({missing[0]}=...)."
                )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        """
        Fetches a repository of the Hub whole. diffusers' own choice of files leaves out the language model's
        `generation_config.json`, which says where an answer ends.
        """
        options = ("cache_dir", "force_download", "local_files_only", "revision", "token")
        return snapshot_download(pretrained_model_name, **{name: kwargs[name] for name in options if name in kwargs})

    def save_config(self, save_directory, **kwargs) -> None:
        """Writes `model_index.json`, and beside it and the components the code that `trust_remote_code` needs."""
        super().save_config(save_directory, **kwargs)
        folder = Path(save_directory)
        index = json.loads((folder / self.config_name).read_text())
        for name, part in {"_class_name": self, **self.components}.items():
            module = type(part).__module__.rpartition(".")[2]
            if module in OWN_MODULES:
                custom_object_save(part, folder if part is self else folder / name)
                index[name] = [module, type(part).__name__]
        (folder / self.config_name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def create_model_card(self, name: str, description: str = "", base_model: str | None = None) -> ModelCard:
        """
        The card that `push_to_hub` writes where there is none.

        Args:
            name (`str`): What users load the pipeline by, such as `"user/pipeline"`.
            description (`str`, *optional*): Markdown, such as facts of training and pictures.
            base_model (`str`, *optional*): The Hub's name of the pipeline whose U-Net this was.
        """
        tags = ["metamorph", "text-to-image", "diffusers"]
        metadata = ModelCardData(
            library_name="diffusers", pipeline_tag="text-to-image", tags=tags, base_model=base_model
        )
        does, call = "a language model writes text and visual tokens", 'pipe("a red apple").images[0]'
        if self.model is None:
            does = "a model of your own writes visual tokens"
            call = "pipe.decode_visual_tokens(visual_tokens)[0]  # (images, tokens, width), from model.generate"
        size = self.unet.config.sample_size
        height, across = (self.vae_scale_factor * side for side in ((size, size) if isinstance(size, int) else size))
        config = self.projector.config
        return ModelCard(
            CARD.format(
                metadata=metadata.to_yaml(),
                title=Path(name).name,
                does=does,
                tokens=config.num_image_tokens or "any number of",
                width=config.visual_token_dim,
                height=height,
                across=across,
                description=description,
                name=name,
                call=call,
            )
        )

    def _upload_folder(self, working_dir, repo_id, **kwargs):
        # Both ways to push pass here, with a card of diffusers' making where the repository had none.
        if not HfApi().file_exists(repo_id, "README.md", token=kwargs.get("token")):
            target, source = Path(working_dir), self.config.get("_name_or_path")
            own = source is not None and Path(source).resolve() != target.resolve()
            if own and (Path(source) / "README.md").is_file():  # of the folder it was loaded from, with its pictures
                for file in (Path(source) / "README.md", *Path(source).glob("*.png")):
                    shutil.copy(file, target)
            else:
                self.create_model_card(repo_id).save(target / "README.md")
        return super()._upload_folder(working_dir, repo_id, **kwargs)

    @property
    def guidance_scale(self) -> float | list[float]:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return max(self._scales) > 1

    @property
    def _scales(self) -> list[float]:
        return self._guidance_scale if isinstance(self._guidance_scale, list) else [self._guidance_scale]

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def check_inputs(self, prompt, image, messages, generator, num_images_per_prompt) -> None:
        if self.model is None or self.processor is None:
            raise ValueError(
                "This pipeline was saved without a model or its processor, so it can only paint: use "
                "`decode_visual_tokens`, or pass `model=` and `processor=` to `from_pretrained`."
            )
        if (prompt is None) == (messages is None):
            given = "neither" if prompt is None else "both"
            raise ValueError(f"Pass either `prompt` or `messages`, but got {given}.")
        if prompt is not None and not isinstance(prompt, str):
            if not isinstance(prompt, list) or not prompt or not all(isinstance(text, str) for text in prompt):
                raise ValueError(f"`prompt` must be a string or a list of strings, but is {prompt!r}.")
        if messages is not None:
            if image is not None:
                raise ValueError(
                    "`image` goes with `prompt`. In `messages`, images stand in the content: "
                    '{"type": "image", "image": image}.'
                )
            conversations = messages if messages and isinstance(messages[0], list) else [messages]
            if not all(turns and all(isinstance(turn, dict) for turn in turns) for turns in conversations):
                raise ValueError(
                    '`messages` must be a conversation, [{"role": "user", "content": ...}, ...], or a list of '
                    "conversations, and none may be empty."
                )
        if isinstance(image, list) and isinstance(prompt, list) and len(image) != len(prompt):
            raise ValueError(
                f"Got {len(prompt)} prompts but {len(image)} entries in `image`: pass one entry per prompt (a list of "
                "images where a prompt has several), or one image for all prompts."
            )
        count = 1 if isinstance(prompt, str) else len(prompt if prompt is not None else conversations)
        self.check_generators(generator, count, num_images_per_prompt, "prompts")

    @staticmethod
    def check_generators(generator, count: int, num_images_per_prompt: int, of: str) -> None:
        if isinstance(generator, list) and len(generator) not in (count, count * num_images_per_prompt):
            pictures = f", or one for each of their {num_images_per_prompt} pictures"
            raise ValueError(
                f"Got {count} {of} but {len(generator)} generators: pass one generator for each of the {of}"
                + (pictures if num_images_per_prompt > 1 else "")
                + "."
            )

    def check_paint_inputs(
        self,
        num_inference_steps,
        guidance_scale,
        num_images_per_prompt,
        height,
        width,
        batch_size,
        output_type,
        callback_on_step_end_tensor_inputs,
    ) -> None:
        counts = {
            "num_inference_steps": num_inference_steps,
            "num_images_per_prompt": num_images_per_prompt,
            "batch_size": batch_size,
        }
        for name, number in counts.items():
            if number is not None and number < 1:
                raise ValueError(f"`{name}` is {number}, but must be at least 1.")
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and (pixels < self.vae_scale_factor or pixels % self.vae_scale_factor):
                raise ValueError(f"`{name}` is {pixels}, but must be a multiple of {self.vae_scale_factor}.")
        if isinstance(guidance_scale, list) and not guidance_scale:
            raise ValueError("`guidance_scale` is an empty list: name the scales of the row, or pass a number.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` is {output_type!r}, but must be one of {', '.join(OUTPUT_TYPES)}.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}, but must be from "
                f"{self._callback_tensor_inputs}."
            )

    def prepare_conversations(self, prompt, image, messages) -> list[Conversation]:
        """Whatever form the input has, as a list of B conversations."""
        if messages is not None:
            return messages if isinstance(messages[0], list) else [messages]
        if isinstance(prompt, str):
            prompts, images = [prompt], [image]
        else:
            prompts, images = prompt, image if isinstance(image, list) else [image] * len(prompt)
        template = self.config.instruction_template if image is None else None
        conversations = []
        for text, entry in zip(prompts, images):
            pictures = [] if entry is None else entry if isinstance(entry, (list, tuple)) else [entry]
            pictures = [str(picture) if isinstance(picture, Path) else picture for picture in pictures]
            content = [{"type": "image", "image": picture} for picture in pictures]
            content.append({"type": "text", "text": text if template is None else template.replace("{}", text)})
            conversations.append([{"role": "user", "content": content}])
        return conversations

    def generate_visual_tokens(
        self, conversations: list[Conversation], max_new_tokens: int = 512, generation_kwargs: dict | None = None
    ) -> tuple[list[str], list[torch.Tensor]]:
        """
        The model's answers, unpainted.

        Args:
            conversations (list of B `list[dict]`): Messages in the standard chat form.
            max_new_tokens (`int`, defaults to 512): Length of an answer.
            generation_kwargs (`dict`, *optional*): More for `model.generate`.

        Returns:
            B texts, with `<image>` where an image stands, and B tensors (images, N, V) of visual tokens.
        """
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self._execution_device, dtype=self.model.dtype)
        # Offloading moves a model in when `forward` is called, but `generate` reads its device before that.
        generate = apply_forward_hook(type(self.model).generate)
        with self.progress_bar(total=max_new_tokens) as progress_bar:
            progress_bar.set_description("Answering")
            criteria = [*(generation_kwargs or {}).get("stopping_criteria", []), _ProgressCriteria(progress_bar)]
            options = {**(generation_kwargs or {}), "stopping_criteria": criteria}
            answers = generate(
                self.model, **inputs, max_new_tokens=max_new_tokens, return_dict_in_generate=True, **options
            )
        text = self.processor.decode_generated(answers.sequences[:, inputs["input_ids"].shape[1] :])
        visual_tokens = answers.get("visual_tokens")
        if visual_tokens is None:  # beam search and assisted decoding, which cannot draw
            config = self.model.config
            none = torch.zeros(0, config.num_image_tokens, config.visual_token_dim, device=answers.sequences.device)
            visual_tokens = [none] * len(text)
        return text, visual_tokens

    @torch.no_grad()
    def get_visual_tokens(self, images: PIL.Image.Image | list[PIL.Image.Image]) -> torch.Tensor:
        """The visual tokens (I, N, V) of pictures, as the model's vision tower sees them."""
        pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        encode = apply_forward_hook(type(self.model).get_visual_tokens)
        return encode(self.model, pixels.to(self._execution_device))

    def reconstruct(self, images: PIL.Image.Image | list[PIL.Image.Image], **kwargs):
        """
        Pictures through the vision tower and back: the best that the visualizer can do for any answer. `kwargs` are
        those of [`~MetaMorphPipeline.decode_visual_tokens`], which also says what is returned.
        """
        return self.decode_visual_tokens(self.get_visual_tokens(images), **kwargs)

    def encode_visual_tokens(
        self, visual_tokens: torch.Tensor, negative_visual_tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Visual tokens (I, N, V) to cross-attention states; after the negative or unconditional ones for guidance."""
        dtype, device = self.projector.dtype, self._execution_device
        visual_tokens = visual_tokens.to(device, dtype)
        states = self.projector(visual_tokens).to(self.unet.dtype)
        if not self.do_classifier_free_guidance:
            return states
        if negative_visual_tokens is None:
            first = visual_tokens[:1]
            negative = self.projector(first, kept=torch.zeros(len(first), dtype=torch.bool, device=device))
        else:
            if negative_visual_tokens.ndim == 2:
                negative_visual_tokens = negative_visual_tokens.unsqueeze(0)
            negative = self.projector(negative_visual_tokens.to(device, dtype))
        if len(negative) not in (1, len(states)):
            raise ValueError(
                f"Got {len(states)} images but {len(negative)} negative ones: pass as many, or one for all."
            )
        return torch.cat([negative.to(self.unet.dtype).expand_as(states), states])

    def prepare_latents(
        self, count: int, height: int | None, width: int | None, generator, dtype: torch.dtype, device, latents=None
    ) -> torch.Tensor:
        size = self.unet.config.sample_size
        default_height, default_width = (size, size) if isinstance(size, int) else size
        height = default_height if height is None else height // self.vae_scale_factor
        width = default_width if width is None else width // self.vae_scale_factor
        shape = (count, self.unet.config.in_channels, height, width)
        if latents is None or count == 0:  # an answer without a picture leaves nothing to paint
            latents = randn_tensor(shape, generator, torch.device(device), dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"`latents` have shape {tuple(latents.shape)}, expected {shape}.")
        return latents.to(device, dtype) * self.scheduler.init_noise_sigma

    def set_timesteps(self, num_inference_steps, timesteps, sigmas, device) -> None:
        custom = {name: value for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
        if len(custom) > 1:
            raise ValueError("`timesteps` and `sigmas` are given: pass one of the two.")
        accepted = inspect.signature(self.scheduler.set_timesteps).parameters
        if unknown := custom.keys() - accepted:
            raise ValueError(
                f"{type(self.scheduler).__name__} takes no {unknown.pop()} of yours: leave them out, or change it."
            )
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        options = custom or {"num_inference_steps": num_inference_steps}
        self.scheduler.set_timesteps(**options, device=device)

    def prepare_extra_step_kwargs(self, generator, eta: float) -> dict:
        # Schedulers differ in what their `step` takes.
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator, "eta": eta}
        return {name: value for name, value in options.items() if name in accepted}

    @torch.no_grad()
    def decode_visual_tokens(
        self,
        visual_tokens: torch.Tensor,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | list[float] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        latents: torch.Tensor | None = None,
        negative_visual_tokens: torch.Tensor | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int | None = None,
        cross_attention_kwargs: dict | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """
        Paints visual tokens, from [`MetaMorphForConditionalGeneration.generate`] or its `get_visual_tokens`.

        Args:
            visual_tokens (`torch.Tensor` of shape (I, N, V)): In the model's space, L2-normalised if its are.
            num_inference_steps (`int`, *optional*): Denoising steps; `default_num_inference_steps` if not given.
            timesteps (`list[int]`, *optional*), sigmas (`list[float]`, *optional*):
                A schedule of your own, where the scheduler takes one.
            guidance_scale (`float` or `list[float]`, *optional*):
                How far to go from what the U-Net predicts without visual tokens towards what it predicts with them;
                1 goes exactly there, at half the cost. A list gives a row of pictures, one per scale and all of the
                same noise, as the paper shows them. `default_guidance_scale` if not given.
            num_images_per_prompt (`int`, defaults to 1): Pictures of each of the I images, of different noise.
            height, width (`int`, *optional*): In pixels; the U-Net's `sample_size` decides if not given.
            latents (`torch.Tensor` of shape (I * num_images_per_prompt, C, h, w), *optional*): Noise to start from.
            negative_visual_tokens (`torch.Tensor` of shape (N, V) or (I, N, V), *optional*):
                What to go away from instead of the projector's unconditional states (zeros, or learned).
            eta (`float`, defaults to 0.0): DDIM's; other schedulers ignore it.
            generator (`torch.Generator` or list of I or of I * num_images_per_prompt of them, *optional*):
                Makes the pictures reproducible.
            batch_size (`int`, *optional*): How many pictures to paint at once; all if not given.
            cross_attention_kwargs (`dict`, *optional*):
                For the U-Net's attention processors; `{"scale": 0.5}` halves a LoRA's effect.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            callback_on_step_end (`Callable`, *optional*):
                Called after each denoising step as `callback(pipe, step, timestep, tensors)`; returns the tensors it
                changes.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                Which of `latents` and `prompt_embeds` (the cross-attention states) `tensors` holds.

        Returns:
            The I images (times `num_images_per_prompt` and scales), in the form that `output_type` names.

        Raises:
            ValueError: if shapes, counts or options do not fit, or a visual token is NaN or infinite.
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}
        images, _ = self._paint(**arguments)
        self.maybe_free_model_hooks()
        return images

    def _paint(
        self,
        visual_tokens,
        num_inference_steps,
        timesteps,
        sigmas,
        guidance_scale,
        num_images_per_prompt,
        height,
        width,
        latents,
        negative_visual_tokens,
        eta,
        generator,
        batch_size,
        cross_attention_kwargs,
        output_type,
        callback_on_step_end,
        callback_on_step_end_tensor_inputs,
    ):
        """What [`~MetaMorphPipeline.decode_visual_tokens`] returns, and what the safety checker blackened."""
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_paint_inputs(
            num_inference_steps,
            guidance_scale,
            num_images_per_prompt,
            height,
            width,
            batch_size,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        if not visual_tokens.isfinite().all():
            raise ValueError("`visual_tokens` hold NaN or infinite numbers: the model that made them is broken.")
        guidance_scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        self._guidance_scale = guidance_scale
        self._interrupt = False
        scales, device, dtype = len(self._scales), self._execution_device, self.unet.dtype
        repeats = num_images_per_prompt * scales

        # Prepare what the U-Net attends to, and noise: one for all scales
        prompt_embeds = self.encode_visual_tokens(visual_tokens, negative_visual_tokens)
        halves = prompt_embeds.chunk(2) if self.do_classifier_free_guidance else (prompt_embeds,)
        halves = [half.repeat_interleave(repeats, dim=0) for half in halves]
        self.check_generators(generator, len(visual_tokens), num_images_per_prompt, "images")
        count = len(visual_tokens) * num_images_per_prompt
        if isinstance(generator, list) and len(generator) != count:
            # An image's noises come one after the other from its generator.
            generator = [source for source in generator for _ in range(num_images_per_prompt)]
        self.set_timesteps(num_inference_steps, timesteps, sigmas, device)  # init_noise_sigma may depend on it
        latents = self.prepare_latents(count, height, width, generator, dtype, device, latents)
        latents = latents.repeat_interleave(scales, dim=0)
        generators = None
        if isinstance(generator, list):
            generators = [source for source in generator for _ in range(scales)]

        # Denoise, in chunks
        size = batch_size or max(1, len(latents))
        starts = range(0, len(latents), size)
        self._num_timesteps = len(self.scheduler.timesteps) if len(latents) else 0
        painted = []
        with self.progress_bar(total=self._num_timesteps * len(starts)) as progress_bar:
            for start in starts:
                if start:  # a scheduler remembers what it has seen, and a callback may have changed the scale
                    self.set_timesteps(num_inference_steps, timesteps, sigmas, device)
                    self._guidance_scale = guidance_scale
                chunk = slice(start, start + size)
                painted.append(
                    self._denoise(
                        latents[chunk],
                        torch.cat([half[chunk] for half in halves]),
                        cross_attention_kwargs,
                        self.prepare_extra_step_kwargs(generators[chunk] if generators else generator, eta),
                        start,
                        callback_on_step_end,
                        callback_on_step_end_tensor_inputs,
                        progress_bar,
                    )
                )

        # Decode, in the same chunks
        if output_type == "latent":
            return torch.cat(painted) if painted else latents, None
        # Not every VAE can decode an empty batch.
        painted = painted or [latents.new_zeros(1, *latents.shape[1:])]
        scaled = (part.to(self.vae.dtype) / self.vae.config.scaling_factor for part in painted)
        images = torch.cat([self.vae.decode(part, return_dict=False)[0] for part in scaled])
        images, flagged = self.run_safety_checker(images[: len(latents)])
        return self.image_processor.postprocess(images, output_type=output_type), flagged

    def _denoise(
        self,
        latents,
        prompt_embeds,
        cross_attention_kwargs,
        extra_step_kwargs,
        first,
        callback,
        callback_tensor_inputs,
        progress_bar,
    ) -> torch.Tensor:
        """The denoised latents of a chunk whose first picture is number `first` of all."""
        for i, t in enumerate(self.scheduler.timesteps):
            if self.interrupt:
                continue
            latent_model_input = torch.cat([latents] * 2) if self.do_classifier_free_guidance else latents
            latent_model_input = self.scheduler.scale_model_input(latent_model_input, t)
            noise_pred = self.unet(
                latent_model_input,
                t,
                encoder_hidden_states=prompt_embeds,
                cross_attention_kwargs=cross_attention_kwargs,
                return_dict=False,
            )[0]
            if self.do_classifier_free_guidance:
                unconditional, conditional = noise_pred.chunk(2)
                scale = self._guidance_scale  # a callback may have changed it
                if isinstance(scale, list):
                    places = range(first, first + len(latents))
                    scale = latents.new_tensor([scale[place % len(scale)] for place in places]).view(-1, 1, 1, 1)
                noise_pred = unconditional + scale * (conditional - unconditional)
            latents = self.scheduler.step(noise_pred, t, latents, **extra_step_kwargs, return_dict=False)[0]

            if callback is not None:
                tensors = {"latents": latents, "prompt_embeds": prompt_embeds}
                changed = callback(self, i, t, {name: tensors[name] for name in callback_tensor_inputs})
                latents = changed.pop("latents", latents)
                prompt_embeds = changed.pop("prompt_embeds", prompt_embeds)
            progress_bar.update()
        return latents

    def fuse_lora(self, components: list[str] = ("unet",), **kwargs) -> None:
        """As of Stable Diffusion's pipelines, which have a text encoder, too."""
        super().fuse_lora(components=list(components), **kwargs)

    def unfuse_lora(self, components: list[str] = ("unet",), **kwargs) -> None:
        """Undoes [`~MetaMorphPipeline.fuse_lora`]."""
        super().unfuse_lora(components=list(components), **kwargs)

    def run_safety_checker(self, images: torch.Tensor) -> tuple[torch.Tensor, list[bool] | None]:
        """What Stable Diffusion's checker makes of pictures (I, 3, H, W) in [-1, 1], and which it blackened."""
        if self.safety_checker is None or not len(images):
            return images, None
        pictures = self.image_processor.postprocess(images, output_type="pil")
        clip_input = self.feature_extractor(pictures, return_tensors="pt").to(images.device)
        return self.safety_checker(images=images, clip_input=clip_input.pixel_values.to(images.dtype))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PIL.Image.Image | str | list | None = None,
        messages: Conversation | list[Conversation] | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | list[float] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        latents: torch.Tensor | None = None,
        negative_visual_tokens: torch.Tensor | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int | None = None,
        cross_attention_kwargs: dict | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        max_new_tokens: int = 512,
        generation_kwargs: dict | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
    ) -> MetaMorphPipelineOutput | tuple:
        """
        Answers prompts or conversations. Lists are batches.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                Without `image`, captions, which `instruction_template` turns into requests. With `image`, what to do
                with it, sent as it is.
            image (`PIL.Image.Image`, path or URL, or list of them, *optional*):
                Stands before the prompt's text. A list gives a single prompt several images, and a list of prompts
                one entry each (itself a list where a prompt has several images). One image is for all prompts.
            messages (`list[dict]` or list of such lists, *optional*):
                Instead of `prompt`: a conversation `[{"role": "user", "content": [{"type": "image", "image": image},
                {"type": "text", "text": "..."}]}]` or several of them.
            generator (`torch.Generator` or list of B or of B * num_images_per_prompt of them, *optional*):
                Makes the painting reproducible. With one per prompt, a prompt's pictures do not depend on the others.
                The answer itself is random only if it is sampled, and then follows `torch.manual_seed`.
            return_dict (`bool`, defaults to `True`): False gives the plain tuple (images, text, image_counts).
            max_new_tokens (`int`, defaults to 512):
                Length of an answer. An image takes N + 2 tokens, and one that has begun is finished.
            generation_kwargs (`dict`, *optional*): More for `model.generate`, such as `{"do_sample": True}`.

        The other arguments are those of [`~MetaMorphPipeline.decode_visual_tokens`]; I is the images of all answers.

        Returns:
            [`MetaMorphPipelineOutput`], or a tuple if `return_dict` is `False`.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Check inputs
        self.check_inputs(prompt, image, messages, generator, num_images_per_prompt)
        self.check_paint_inputs(
            num_inference_steps,
            guidance_scale,
            num_images_per_prompt,
            height,
            width,
            batch_size,
            output_type,
            callback_on_step_end_tensor_inputs,
        )

        # 2. Generate text and visual tokens
        image = None if isinstance(image, list) and not image else image
        conversations = self.prepare_conversations(prompt, image, messages)
        text, visual_tokens = self.generate_visual_tokens(conversations, max_new_tokens, generation_kwargs)
        image_counts = [len(images) for images in visual_tokens]
        for index, (answer, count) in enumerate(zip(text, image_counts)):
            if count == 0:
                logger.warning("Prompt %d was answered without a picture: %r", index, answer)
        if isinstance(generator, list):  # per prompt so far, or per picture of one
            each, answers = len(generator) // len(conversations), len(text) // len(conversations)
            generator = [
                source
                for place, count in enumerate(image_counts)
                for source in generator[place // answers * each : (place // answers + 1) * each] * count
            ] or None  # `randn_tensor` takes no empty list

        # 3. to 5. Prepare latents, denoise, decode
        images, flagged = self._paint(
            torch.cat(visual_tokens),
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            height=height,
            width=width,
            latents=latents,
            negative_visual_tokens=negative_visual_tokens,
            eta=eta,
            generator=generator,
            batch_size=batch_size,
            cross_attention_kwargs=cross_attention_kwargs,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        scales = len(guidance_scale) if isinstance(guidance_scale, list) else 1
        image_counts = [count * num_images_per_prompt * scales for count in image_counts]

        # Offload all models
        self.maybe_free_model_hooks()

        if not return_dict:
            return images, text, image_counts
        return MetaMorphPipelineOutput(
            images=images, text=text, image_counts=image_counts, nsfw_content_detected=flagged
        )


__all__ = ["MetaMorphPipeline", "MetaMorphPipelineOutput"]
