"""The pipeline: prompts and images in, text and images out.

Shapes: B prompts, I generated images of all prompts together, N visual tokens per image, V vision width, L
cross-attention states of width C per image.
"""

import copy
import inspect
import math
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
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.utils import BaseOutput, logging
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, ProcessorMixin, StoppingCriteria

from .pipeline_saving import PipelineSavingMixin


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Conversation = list[dict]


@dataclass
class MetaMorphPipelineOutput(BaseOutput):
    """
    Output of [`MetaMorphPipeline`].

    Args:
        images (`list[PIL.Image.Image]`, or `np.ndarray` or `torch.Tensor` with I as the first dimension):
            The images of all answers, in order. The `num_images_per_prompt` decodings of one image are adjacent.
        text (`list[str]` of length B): The answers, with `<image>` in the place of each image.
        image_counts (`list[int]` of length B): The number of `images` that belong to each answer.
        nsfw_content_detected (`list[bool]`, *optional*):
            Whether the safety checker blackened each image; `None` without a safety checker.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    text: list[str]
    image_counts: list[int]
    nsfw_content_detected: list[bool] | None = None


class _ProgressCriteria(StoppingCriteria):
    """Advances a progress bar at every step, and never stops."""

    def __init__(self, progress_bar):
        self.progress_bar = progress_bar

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        self.progress_bar.update()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _check_components(model, projector, unet, vae) -> None:
    pairs = [
        ("projector", projector, "cross_attention_dim", "U-Net", unet, "cross_attention_dim"),
        ("VAE", vae, "latent_channels", "U-Net", unet, "in_channels"),
    ]
    if model is not None:
        pairs.append(("model", model, "visual_token_dim", "projector", projector, "visual_token_dim"))
    for name, component, field, other_name, other, other_field in pairs:
        value, other_value = getattr(component.config, field), getattr(other.config, other_field)
        if value != other_value:
            raise ValueError(
                f"The {name}'s {field} is {value}, but the {other_name}'s {other_field} is {other_value}: they do "
                "not fit together."
            )


def _build_conversations(prompt, image, messages, template: str | None) -> list[Conversation]:
    """Validate the forms of input that a call accepts, and bring them to a list of B conversations."""
    if (prompt is None) == (messages is None):
        given = "neither" if prompt is None else "both"
        raise ValueError(f"Pass either `prompt` or `messages`, but got {given}.")
    if messages is not None:
        if image is not None:
            raise ValueError(
                "`image` goes with `prompt`. In `messages`, images are part of the content: "
                '{"type": "image", "image": image}.'
            )
        conversations = messages if messages and isinstance(messages[0], list) else [messages]
        if not all(turns and all(isinstance(turn, dict) for turn in turns) for turns in conversations):
            raise ValueError(
                '`messages` must be a conversation, [{"role": "user", "content": ...}, ...], or a list of '
                "conversations, and none may be empty."
            )
        return conversations
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"`prompt` must be a string or a list of strings, but is {prompt!r}.")
    images = image if isinstance(image, list) and isinstance(prompt, list) else [image] * len(prompts)
    if len(images) != len(prompts):
        raise ValueError(
            f"Got {len(prompts)} prompts but {len(images)} entries in `image`: pass one entry per prompt (a list of "
            "images where a prompt has several), or one image for all prompts."
        )
    if not (image is None or (isinstance(image, list) and not image)):
        template = None
    conversations = []
    for text, entry in zip(prompts, images):
        entries = [] if entry is None else entry if isinstance(entry, (list, tuple)) else [entry]
        content = [{"type": "image", "image": str(item) if isinstance(item, Path) else item} for item in entries]
        content.append({"type": "text", "text": text if template is None else template.replace("{}", text)})
        conversations.append([{"role": "user", "content": content}])
    return conversations


def _check_generators(generator, count: int, num_images_per_prompt: int, what: str) -> None:
    """Validate the number of generators; `what` says whether there are `count` prompts or images."""
    if isinstance(generator, list) and len(generator) not in (count, count * num_images_per_prompt):
        also = f", or one for each of their {num_images_per_prompt} images" if num_images_per_prompt > 1 else ""
        raise ValueError(
            f"Got {count} {what} but {len(generator)} generators: pass one generator for each of the {what}{also}."
        )


class MetaMorphPipeline(PipelineSavingMixin, DiffusionPipeline, StableDiffusionMixin, StableDiffusionLoraLoaderMixin):
    r"""
    Pipeline that answers prompts with text and images: MetaMorph generates text and visual tokens, and a latent
    diffusion U-Net that attends to the visual tokens decodes them into images. Threads may share a pipeline.

    Args:
        model ([`MetaMorphForConditionalGeneration`], *optional*):
            Generates the answer. Without it, the pipeline can only decode visual tokens.
        processor ([`MetaMorphProcessor`], *optional*): Prepares messages for the model and decodes its answers.
        projector ([`VisualTokenProjector`]): Maps visual tokens to the U-Net's cross-attention states.
        unet ([`UNet2DConditionModel`]): Denoises latents; its `sample_size` is the default size of the images.
        vae ([`AutoencoderKL`] or [`PatchVAE`]): Decodes latents into pixels.
        scheduler ([`SchedulerMixin`]): Any scheduler that works with a Stable Diffusion U-Net.
        safety_checker ([`PreTrainedModel`], *optional*), feature_extractor (*optional*):
            Those of Stable Diffusion; the checker blackens images that it finds unsafe.
        instruction_template (`str`, *optional*, defaults to `"Generate an image of {}."`):
            Request into which a caption is inserted at `{}`. `None` sends captions verbatim.
        default_num_inference_steps (`int`, defaults to 50), default_guidance_scale (`float`, defaults to 7.5):
            Settings that suit these weights, for calls that do not choose their own.

    Raises:
        ValueError: If the template has no `{}`, or if two components do not fit: the widths of visual tokens (model
            and projector) or of cross-attention (projector and U-Net), or the latent channels (U-Net and VAE).

    Example:

        ```py
        >>> pipe = MetaMorphPipeline.from_pretrained("path/to/pipeline")
        >>> pipe("a red apple").images[0]
        >>> pipe("Make it green.", image=image).images[0]
        >>> pipe(messages=[{"role": "user", "content": [{"type": "text", "text": "Hello!"}]}]).text[0]
        ```
    """

    model_cpu_offload_seq = "model->projector->unet->vae"
    _callback_tensor_inputs = ["latents", "prompt_embeds"]
    _optional_components = ["model", "processor", "safety_checker", "feature_extractor"]
    _exclude_from_cpu_offload = ["safety_checker"]
    # Stable Diffusion's LoRAs load into the U-Net; their text encoder layers are ignored.
    _lora_loadable_modules = ["unet"]
    text_encoder_name = "model"
    _interrupt = False  # set to True by callbacks, or from another thread to stop all calls

    def __init__(
        self,
        model: PreTrainedModel | None,
        processor: ProcessorMixin | None,
        projector: ModelMixin,
        unet: UNet2DConditionModel | ModelMixin,  # `from_pipe` only takes over the classes named here
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
                "Pass None to send captions verbatim."
            )
        if (safety_checker is None) != (feature_extractor is None):
            raise ValueError("`safety_checker` and `feature_extractor` need each other: pass both or neither.")
        _check_components(model, projector, unet, vae)
        if model is not None:  # a saved folder may lack the model, but this pipeline cannot answer without it
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
        # An AutoencoderKL halves the size in every block but the first; a PatchVAE states its patch size.
        blocks = vae.config.get("block_out_channels")
        self.vae_scale_factor = vae.config.patch_size if blocks is None else 2 ** (len(blocks) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels, unless a call asks for another size."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def check_options(self, num_images_per_prompt, height, width, latents, negative_visual_tokens, eta, output_type):
        """Validate the options of decoding before anything runs."""
        if num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt` is {num_images_per_prompt}, but must be at least 1.")
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and (pixels < self.vae_scale_factor or pixels % self.vae_scale_factor):
                raise ValueError(f"`{name}` is {pixels}, but must be a multiple of {self.vae_scale_factor}.")
        for name, tensor in (("latents", latents), ("negative_visual_tokens", negative_visual_tokens)):
            if tensor is not None and not tensor.isfinite().all():
                raise ValueError(f"`{name}` contain NaN or infinite values, but all values must be finite.")
        if not math.isfinite(eta):
            raise ValueError(f"`eta` is {eta}, but must be a finite number.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` is {output_type!r}, but must be one of {', '.join(OUTPUT_TYPES)}.")

    def _require_model(self) -> None:
        if self.model is None or self.processor is None:
            raise ValueError(
                "This pipeline was saved without a model or its processor, so it can only decode visual tokens: use "
                "`decode_visual_tokens`, or pass `model=` and `processor=` to `from_pretrained`."
            )

    def generate_visual_tokens(
        self, conversations: list[Conversation], max_new_tokens: int = 512, generation_kwargs: dict | None = None
    ) -> tuple[list[str], list[torch.Tensor]]:
        """
        Generate the model's answers without decoding their images.

        Args:
            conversations (list of B `list[dict]`): Messages in the standard chat format.
            max_new_tokens (`int`, defaults to 512): Maximum length of an answer.
            generation_kwargs (`dict`, *optional*): Additional arguments of `model.generate`.

        Returns:
            B texts, with `<image>` in the place of each image, and B tensors of visual tokens (images, N, V).
        """
        self._require_model()
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self._execution_device, dtype=self.model.dtype)
        # Offloading moves a model to the device when `forward` is called, but `generate` reads its device before that.
        generate = apply_forward_hook(type(self.model).generate)
        options = {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True, **(generation_kwargs or {})}
        with self.progress_bar(total=max_new_tokens) as progress_bar:
            progress_bar.set_description("Answering")
            options["stopping_criteria"] = [*options.get("stopping_criteria", []), _ProgressCriteria(progress_bar)]
            answers = generate(self.model, **inputs, **options)
        text = self.processor.decode_generated(answers.sequences[:, inputs["input_ids"].shape[1] :])
        visual_tokens = answers.get("visual_tokens")
        if visual_tokens is None:  # beam search and assisted decoding only generate text
            config = self.model.config
            empty = torch.zeros(0, config.num_image_tokens, config.visual_token_dim, device=answers.sequences.device)
            visual_tokens = [empty] * len(text)
        return text, visual_tokens

    @torch.no_grad()
    def get_visual_tokens(self, images: PIL.Image.Image | list[PIL.Image.Image]) -> torch.Tensor:
        """Encode images to visual tokens (I, N, V) with the model's vision tower."""
        self._require_model()
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        encode = apply_forward_hook(type(self.model).get_visual_tokens)
        return encode(self.model, pixels.to(self._execution_device))

    def reconstruct(
        self, images: PIL.Image.Image | list[PIL.Image.Image], **kwargs
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """
        Encode images with the vision tower and decode them again, which bounds the quality of any answer. `kwargs`
        and the result are those of [`~MetaMorphPipeline.decode_visual_tokens`].
        """
        return self.decode_visual_tokens(self.get_visual_tokens(images), **kwargs)

    def encode_visual_tokens(
        self,
        visual_tokens: torch.Tensor,
        negative_visual_tokens: torch.Tensor | None = None,
        do_classifier_free_guidance: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Map visual tokens to what the U-Net attends to.

        Args:
            visual_tokens (`torch.Tensor` of shape (I, N, V)): The images.
            negative_visual_tokens (`torch.Tensor` of shape (N, V) or (I, N, V), *optional*):
                Visual tokens to guide away from. Defaults to the projector's unconditional states.
            do_classifier_free_guidance (`bool`, defaults to `True`): Whether the negative states are needed.

        Returns:
            Cross-attention states (I, L, C), and the negative ones of the same shape, or `None` without guidance.
        """
        dtype, device = self.projector.dtype, self._execution_device
        if not visual_tokens.isfinite().all():
            raise ValueError("`visual_tokens` contain NaN or infinite values: the model that made them is broken.")
        visual_tokens = visual_tokens.to(device, dtype)
        embeds = self.projector(visual_tokens).to(self.unet.dtype)
        if not do_classifier_free_guidance:
            return embeds, None
        kept = None
        if negative_visual_tokens is None:  # the projector replaces images that are not kept
            negative_visual_tokens = visual_tokens[:1]
            kept = torch.zeros(len(negative_visual_tokens), dtype=torch.bool, device=device)
        elif negative_visual_tokens.ndim == 2:
            negative_visual_tokens = negative_visual_tokens[None]
        negative_embeds = self.projector(negative_visual_tokens.to(device, dtype), kept)
        if len(negative_embeds) not in (1, len(embeds)):
            raise ValueError(
                f"Got {len(embeds)} images but {len(negative_embeds)} negative ones: pass as many, or one for all."
            )
        return embeds, negative_embeds.to(embeds.dtype).expand_as(embeds)

    def _start_call(self, guidance_scale, num_inference_steps, timesteps, sigmas, callback, callback_tensor_inputs):
        """
        Validate the settings of a call, and return a copy of this pipeline that shares its components but has these
        settings and a scheduler of its own. Callbacks receive the copy, so that they only change their own call.
        """
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            callback_tensor_inputs = callback.tensor_inputs
        allowed = self._callback_tensor_inputs
        if unknown := sorted(set(callback_tensor_inputs) - set(allowed)):
            raise ValueError(f"`callback_on_step_end_tensor_inputs` has {unknown}, but must be from {allowed}.")
        steps = self.config.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        if steps < 1:
            raise ValueError(f"`num_inference_steps` is {steps}, but must be at least 1.")
        if isinstance(scale, (list, tuple)) or not math.isfinite(scale):
            raise ValueError(
                f"`guidance_scale` is {scale}, but must be one finite number. To compare several scales, call once "
                "per scale with generators of the same seed."
            )
        self._interrupt = False
        call = copy.copy(self)
        call.scheduler = copy.deepcopy(self.scheduler)
        call._guidance_scale = scale
        call._on_step_end = (callback, callback_tensor_inputs)
        _, call._num_timesteps = retrieve_timesteps(call.scheduler, steps, self._execution_device, timesteps, sigmas)
        return call

    def prepare_latents(self, count: int, height, width, generator, latents) -> torch.Tensor:
        """Return `count` latents of pure noise at the scale of the scheduler."""
        height, width = height or self.default_size[0], width or self.default_size[1]
        factor = self.vae_scale_factor
        shape = (count, self.unet.config.in_channels, height // factor, width // factor)
        if latents is None or count == 0:  # an answer without an image leaves nothing to decode
            latents = randn_tensor(shape, generator or None, self._execution_device, self.unet.dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"`latents` have shape {tuple(latents.shape)}, but must have shape {shape}.")
        return latents.to(self._execution_device, self.unet.dtype) * self.scheduler.init_noise_sigma

    def _denoise(self, call, latents, prompt_embeds, negative_prompt_embeds, generator, eta, cross_attention_kwargs):
        """Denoise latents (I * num_images_per_prompt, C, h, w), given the states of I images."""
        if len(latents) == 0:
            return latents
        states = [prompt_embeds] if negative_prompt_embeds is None else [negative_prompt_embeds, prompt_embeds]
        repeats = len(latents) // len(prompt_embeds)
        prompt_embeds = torch.cat([state.repeat_interleave(repeats, dim=0) for state in states])
        accepted = inspect.signature(call.scheduler.step).parameters  # schedulers differ in this
        step_kwargs = {name: value for name, value in {"generator": generator, "eta": eta}.items() if name in accepted}
        callback, callback_tensor_inputs = call._on_step_end
        for index, timestep in enumerate(call.progress_bar(call.scheduler.timesteps)):
            if call.interrupt or self.interrupt:
                continue
            guided = call.do_classifier_free_guidance  # a callback may end guidance
            latent_model_input = torch.cat([latents] * 2) if guided else latents
            noise_pred = self.unet(
                call.scheduler.scale_model_input(latent_model_input, timestep),
                timestep,
                encoder_hidden_states=prompt_embeds,
                cross_attention_kwargs=cross_attention_kwargs,
                return_dict=False,
            )[0]
            if guided:
                unconditional, conditional = noise_pred.chunk(2)
                noise_pred = unconditional + call.guidance_scale * (conditional - unconditional)
            latents = call.scheduler.step(noise_pred, timestep, latents, **step_kwargs, return_dict=False)[0]

            if callback is not None:
                tensors = {"latents": latents, "prompt_embeds": prompt_embeds}
                changed = callback(call, index, timestep, {name: tensors[name] for name in callback_tensor_inputs})
                latents = changed.pop("latents", latents)
                prompt_embeds = changed.pop("prompt_embeds", prompt_embeds)
        return latents

    def decode_latents(
        self, latents: torch.Tensor, output_type: str
    ) -> tuple[list[PIL.Image.Image] | np.ndarray | torch.Tensor, list[bool] | None]:
        """Decode latents into images, and tell which of them the safety checker has blackened."""
        if output_type == "latent":
            return latents, None
        # Not every VAE can decode an empty batch.
        batch = latents if len(latents) else latents.new_zeros(1, *latents.shape[1:])
        scaled = batch.to(self.vae.dtype) / self.vae.config.scaling_factor
        images = self.vae.decode(scaled, return_dict=False)[0][: len(latents)]
        nsfw_content_detected = None
        if self.safety_checker is not None and len(images):
            pil_images = self.image_processor.postprocess(images, output_type="pil")
            clip_input = self.feature_extractor(pil_images, return_tensors="pt").to(images.device, images.dtype)
            images, nsfw_content_detected = self.safety_checker(images=images, clip_input=clip_input.pixel_values)
        return self.image_processor.postprocess(images, output_type=output_type), nsfw_content_detected

    def fuse_lora(self, components: list[str] = ("unet",), **kwargs) -> None:
        """See [`~loaders.StableDiffusionLoraLoaderMixin.fuse_lora`], whose default includes a text encoder."""
        super().fuse_lora(components=list(components), **kwargs)

    def unfuse_lora(self, components: list[str] = ("unet",), **kwargs) -> None:
        """Undo [`~MetaMorphPipeline.fuse_lora`]."""
        super().unfuse_lora(components=list(components), **kwargs)

    @torch.no_grad()
    def decode_visual_tokens(
        self,
        visual_tokens: torch.Tensor,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        latents: torch.Tensor | None = None,
        negative_visual_tokens: torch.Tensor | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        cross_attention_kwargs: dict | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """
        Decode visual tokens into I * `num_images_per_prompt` images. If memory is short, call with a few at a time.

        Args:
            visual_tokens (`torch.Tensor` of shape (I, N, V)): From `model.generate` or [`get_visual_tokens`].
            num_inference_steps (`int`), guidance_scale (`float`): Default to the pipeline's. A scale above 1
                follows the visual tokens more closely, and takes twice as long.
            timesteps (`list[int]`), sigmas (`list[float]`): A custom schedule, if the scheduler takes one.
            num_images_per_prompt (`int`): Number of decodings of each image, from different noise.
            height, width (`int`): In pixels; default to the U-Net's `sample_size`.
            latents (`torch.Tensor` of shape (I * num_images_per_prompt, C, h, w)): Initial noise.
            negative_visual_tokens (`torch.Tensor` of shape (N, V) or (I, N, V)):
                Guide away from these instead of the projector's unconditional states (zeros, or learned).
            eta (`float`): The noise of DDIM; ignored by other schedulers.
            generator (`torch.Generator`, or list of I or of I * num_images_per_prompt): Source of the noise.
            cross_attention_kwargs (`dict`): For the attention processors: `{"scale": 0.5}` halves a LoRA's effect.
            output_type (`str`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            callback_on_step_end (`Callable`): Called after every step as `callback(pipe, step, timestep, tensors)`
                with a view of the pipeline that belongs to this call; returns the tensors to replace.
            callback_on_step_end_tensor_inputs (`list[str]`): Names of `tensors`: `latents`, `prompt_embeds`.

        Raises:
            ValueError: If shapes, counts or options do not fit, or a value is NaN or infinite.
        """
        self.check_options(num_images_per_prompt, height, width, latents, negative_visual_tokens, eta, output_type)
        count = len(visual_tokens)
        _check_generators(generator, count, num_images_per_prompt, "images")
        on_step_end = (callback_on_step_end, callback_on_step_end_tensor_inputs)
        call = self._start_call(guidance_scale, num_inference_steps, timesteps, sigmas, *on_step_end)
        generator = _expand_generators(generator, count, [1] * count, num_images_per_prompt)
        guided = call.do_classifier_free_guidance
        embeds, negative_embeds = self.encode_visual_tokens(visual_tokens, negative_visual_tokens, guided)
        latents = call.prepare_latents(count * num_images_per_prompt, height, width, generator, latents)
        latents = self._denoise(call, latents, embeds, negative_embeds, generator, eta, cross_attention_kwargs)
        images, _ = self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        return images

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PIL.Image.Image | str | list | None = None,
        messages: Conversation | list[Conversation] | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        latents: torch.Tensor | None = None,
        negative_visual_tokens: torch.Tensor | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        cross_attention_kwargs: dict | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        max_new_tokens: int = 512,
        generation_kwargs: dict | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
    ) -> MetaMorphPipelineOutput | tuple:
        """
        Answer B prompts or conversations. The other arguments are those of [`decode_visual_tokens`].

        Args:
            prompt (`str` or `list[str]`): A caption for `instruction_template`, or with `image` a verbatim request.
            image (`PIL.Image.Image`, path or URL, or list): Precedes the prompt. A list has the images of a single
                prompt, or one entry (or list) per prompt; one image goes with all prompts.
            messages (`list[dict]` or list of them): Instead of `prompt`, whole conversations: `[{"role": "user",
                "content": [{"type": "image", "image": image}, {"type": "text", "text": "..."}]}]`.
            generator (`torch.Generator`, or list of B or of B * num_images_per_prompt): Source of the noise. The
                answer is random only if it is sampled, and then follows `torch.manual_seed`.
            return_dict (`bool`): `False` returns a tuple (images, text, image_counts).
            max_new_tokens (`int`): Maximum length of an answer, in which an image takes N + 2 tokens.
            generation_kwargs (`dict`): Additional arguments of `model.generate`, such as `{"do_sample": True}`.
        """
        # 1. Check the inputs
        conversations = _build_conversations(prompt, image, messages, self.config.instruction_template)
        _check_generators(generator, len(conversations), num_images_per_prompt, "prompts")
        self.check_options(num_images_per_prompt, height, width, latents, negative_visual_tokens, eta, output_type)
        on_step_end = (callback_on_step_end, callback_on_step_end_tensor_inputs)
        call = self._start_call(guidance_scale, num_inference_steps, timesteps, sigmas, *on_step_end)
        # 2. Answer with text and visual tokens
        text, visual_tokens = self.generate_visual_tokens(conversations, max_new_tokens, generation_kwargs)
        image_counts = [len(images) for images in visual_tokens]
        for index, (answer, count) in enumerate(zip(text, image_counts)):
            if not count:
                logger.warning("Prompt %d was answered without an image: %r", index, answer)
        generator = _expand_generators(generator, len(conversations), image_counts, num_images_per_prompt)
        # 3. Encode the visual tokens
        visual_tokens, guided = torch.cat(visual_tokens), call.do_classifier_free_guidance
        embeds, negative_embeds = self.encode_visual_tokens(visual_tokens, negative_visual_tokens, guided)
        # 4. Denoise
        count = len(visual_tokens) * num_images_per_prompt
        latents = call.prepare_latents(count, height, width, generator, latents)
        latents = self._denoise(call, latents, embeds, negative_embeds, generator, eta, cross_attention_kwargs)
        # 5. Decode
        images, nsfw_content_detected = self.decode_latents(latents, output_type)
        image_counts = [count * num_images_per_prompt for count in image_counts]
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, text, image_counts
        return MetaMorphPipelineOutput(images, text, image_counts, nsfw_content_detected)


def _expand_generators(generator, num_prompts: int, image_counts: list[int], num_images_per_prompt: int):
    """Expand a list of one generator per prompt, or per decoding of a prompt's images, to one per decoded image."""
    if not isinstance(generator, list) or not generator:
        return generator
    each, answers = len(generator) // num_prompts, len(image_counts) // num_prompts
    expanded = []
    for index, count in enumerate(image_counts):
        start = index // answers * each
        expanded += generator[start : start + each] * (count * num_images_per_prompt // each)
    return expanded


__all__ = ["MetaMorphPipeline", "MetaMorphPipelineOutput"]
