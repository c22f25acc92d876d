"""The pipeline: prompts and images in, text and images out.

Shapes: B prompts, I generated images of all prompts together, N visual tokens per image, V vision width, L
cross-attention states of width C per image.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partialmethod
from numbers import Real
from typing import Literal

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline, retrieve_timesteps
from diffusers.utils import BaseOutput, logging
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin

from .generation_checks import check_types, is_count, join_visual_tokens
from .pipeline_saving import PipelineSavingMixin


logger = logging.get_logger(__name__)

# The types of options, in words and as annotations, and the names of the options.
OPTION_TYPES = {
    "an integer of at least 1": (is_count, "num_inference_steps num_images_per_prompt height width max_new_tokens"),
    "a finite number": (Real, "guidance_scale eta"),
    "a tensor of finite values": (torch.Tensor, "latents negative_visual_tokens"),
    "a torch.Generator or a list": (torch.Generator | list[torch.Generator], "generator"),
    "one of pil, np, pt, latent": (Literal["pil", "np", "pt", "latent"], "output_type"),
    "a dictionary": (dict, "cross_attention_kwargs generation_kwargs"),
    "a function": (Callable, "callback_on_step_end"),
    "a list of latents and prompt_embeds": (
        list[Literal["latents", "prompt_embeds"]],
        "callback_on_step_end_tensor_inputs",
    ),
}

Conversation = list[dict]
Images = list[PIL.Image.Image] | np.ndarray | torch.Tensor


@dataclass
class MetaMorphPipelineOutput(BaseOutput):
    """
    Output of [`MetaMorphPipeline`].

    Args:
        images: The images of all answers, in order: a list, or an array or tensor with I as its first dimension.
        text: B answers, with `<image>` in the place of each image.
        image_counts: The number of `images` that belong to each of the B answers.
    """

    images: Images
    text: list[str]
    image_counts: list[int]


@dataclass
class DecodingOptions:
    """
    Options of [`MetaMorphPipeline`] for decoding the visual tokens of I images, named as in
    [`StableDiffusionPipeline`]. `None` selects the default.

    Args:
        num_images_per_prompt: Number of decodings of each image, from different noise.
        latents (`torch.Tensor` of shape (I * num_images_per_prompt, C, h, w)): Initial noise.
        negative_visual_tokens (`torch.Tensor` of shape (N, V) or (I, N, V)): Visual tokens to guide away from,
            instead of the projector's unconditional states (zeros, or learned).
        generator: A list has one generator (or `num_images_per_prompt` of them) for each prompt, or for each image if
            there are no prompts.
        output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`.
        callback_on_step_end: Called as `callback(pipe, step, timestep, tensors)` with a view of the pipeline that
            belongs to this call; returns the `tensors` (`latents`, `prompt_embeds`) to replace, or `None`.
    """

    num_inference_steps: int | None = None
    timesteps: list[int] | None = None
    sigmas: list[float] | None = None
    guidance_scale: float | None = None
    num_images_per_prompt: int = 1
    height: int | None = None
    width: int | None = None
    latents: torch.Tensor | None = None
    negative_visual_tokens: torch.Tensor | None = None
    eta: float = 0.0
    generator: torch.Generator | list[torch.Generator] | None = None
    cross_attention_kwargs: dict | None = None
    output_type: str = "pil"
    callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None
    callback_on_step_end_tensor_inputs: list[str] | None = None


def check_fit(model, processor, projector, unet, vae, scheduler) -> None:
    """Raise a `ValueError` if a component needs more than this pipeline gives it, or does not fit another one."""
    if not isinstance(unet, UNet2DConditionModel):
        found = type(unet).__name__
        raise ValueError(f"`unet` must be a UNet2DConditionModel, as in Stable Diffusion 1.5, but is a {found}.")
    unet_fields = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "num_class_embeds")
    unet_fields += ("time_cond_proj_dim",)
    for part, fields in ((unet, unet_fields), (vae, ("shift_factor", "latents_mean", "latents_std"))):
        if found := {field: part.config[field] for field in fields if part.config.get(field)}:
            raise ValueError(
                f"The {type(part).__name__} has {found}, which this pipeline does not support. Take U-Net and VAE of "
                "a pipeline such as Stable Diffusion 1.5 or 2.1, not of Stable Diffusion XL, 3 or Flux."
            )
    if not {"init_noise_sigma", "scale_model_input"} <= {*dir(scheduler)}:
        found = type(scheduler).__name__
        raise ValueError(f"`scheduler` must be one such as DDIMScheduler, not for flow matching, but is a {found}.")
    pairs = [
        (projector, "cross_attention_dim", unet, "cross_attention_dim"),
        (vae, "latent_channels", unet, "in_channels"),
        (unet, "out_channels", unet, "in_channels"),
    ]
    if model is not None:
        pairs.append((model, "visual_token_dim", projector, "visual_token_dim"))
        if projector.config.num_image_tokens:
            pairs.append((model, "num_image_tokens", projector, "num_image_tokens"))
    if model is not None and processor is not None:
        processor.check_config(model.config)
    for part, field, other, other_field in pairs:
        # Components of another kind lack the field, and do not fit.
        value, other_value = getattr(part.config, field, None), getattr(other.config, other_field, None)
        if value != other_value:
            names = f"The {type(part).__name__}'s {field} is {value}, but the {type(other).__name__}'s {other_field}"
            raise ValueError(f"{names} is {other_value}: they do not fit together.")


class MetaMorphPipeline(PipelineSavingMixin, DiffusionPipeline, StableDiffusionMixin, StableDiffusionLoraLoaderMixin):
    r"""
    Pipeline that answers prompts with text and images: MetaMorph generates text and visual tokens, and a latent
    diffusion U-Net that attends to the visual tokens decodes them into images. Threads may share a pipeline.

    Args:
        model ([`MetaMorphForConditionalGeneration`], *optional*): Answers; without it, the pipeline can only decode.
        processor ([`MetaMorphProcessor`], *optional*): Prepares messages for the model and decodes its answers.
        projector ([`VisualTokenProjector`]): Maps visual tokens to the U-Net's cross-attention states.
        unet ([`UNet2DConditionModel`]): Denoises latents; its `sample_size` is the default size of the images.
        vae ([`AutoencoderKL`] or [`PatchAutoencoder`]): Decodes latents into pixels.
        scheduler ([`SchedulerMixin`]): Any scheduler that works with a Stable Diffusion U-Net.
        instruction_template (`str`, *optional*): Request with a caption at `{}`. `None` sends captions verbatim.
        default_num_inference_steps, default_guidance_scale: Settings that suit these weights.

    Raises:
        ValueError: If the template has no `{}`, or if two components do not fit together.
    """

    model_cpu_offload_seq = "model->projector->unet->vae"
    _callback_tensor_inputs = ["latents", "prompt_embeds"]
    _optional_components = ["model", "processor"]
    # Stable Diffusion's LoRAs load into the U-Net; their text encoder layers are ignored.
    _lora_loadable_modules = ["unet"]
    text_encoder_name = "model"
    _interrupt = False  # set to True by callbacks, or from another thread; as in diffusers, a new call resets it

    def __init__(
        self,
        model: PreTrainedModel | None,
        processor: ProcessorMixin | None,
        projector: ModelMixin,
        unet: UNet2DConditionModel | ModelMixin,  # `from_pipe` only takes over the classes named here
        vae: AutoencoderKL | ModelMixin,
        scheduler: SchedulerMixin,
        instruction_template: str | None = "Generate an image of {}.",
        default_num_inference_steps: int = 50,
        default_guidance_scale: float = 7.5,
    ):
        super().__init__()
        if instruction_template is not None and "{}" not in instruction_template:
            raise ValueError(f"`instruction_template` is {instruction_template!r}, but needs a {{}} for the caption.")
        if model is not None:
            self._optional_components = []  # a saved folder may lack the model, but this pipeline needs it to answer
        check_fit(model, processor, projector, unet, vae, scheduler)
        self.register_modules(
            model=model, processor=processor, projector=projector, unet=unet, vae=vae, scheduler=scheduler
        )
        self.register_to_config(
            instruction_template=instruction_template,
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
        )
        self._guidance_scale, self.num_timesteps = default_guidance_scale, default_num_inference_steps
        # An AutoencoderKL halves the size in every block but the first; the small ones state their patch size.
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

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "MetaMorphPipeline":
        """Create a pipeline from the components of another one. See [`DiffusionPipeline.from_pipe`]."""
        # diffusers only takes over the classes that `__init__` names, and does not explain that Flux has no U-Net.
        is_own = isinstance(pipeline, MetaMorphPipeline)
        taken = pipeline.components if is_own else {"unet": pipeline.components.get("unet")}
        created = super().from_pipe(pipeline, **{**taken, **kwargs})
        if not is_own:  # `push_to_hub` would take over the card of the other pipeline's folder
            created.register_to_config(_name_or_path=None)
        return created

    def _require_model(self) -> None:
        if self.model is None or self.processor is None:
            raise ValueError("Without a model and its processor, a pipeline can only decode visual tokens: pass both.")

    def prepare_conversations(self, prompt=None, image=None, messages=None) -> list[Conversation]:
        """Return the B conversations that a call with these arguments sends, or raise a `ValueError`."""
        if (prompt is None) == (messages is None):
            raise ValueError(f"Pass either `prompt` or `messages`, but got {'neither' if prompt is None else 'both'}.")
        if messages is not None:
            is_batch = isinstance(messages, list) and messages and isinstance(messages[0], list)
            conversations = messages if is_batch else [messages]
            if image is not None or not all(isinstance(each, (list, tuple)) and each for each in conversations):
                raise ValueError(
                    "`messages` must be a conversation or several, none of them empty. Their images are not passed as "
                    '`image`, but are part of the content: {"type": "image", "image": image}.'
                )
            return conversations
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"`prompt` must be a string or a list of strings, but is {prompt!r}.")
        entries = image if isinstance(image, list) and isinstance(prompt, list) else [image] * len(prompts)
        if len(entries) != len(prompts):
            counts = f"{len(prompts)} prompts but {len(entries)} entries in `image`"
            raise ValueError(f"Got {counts}: pass one entry (an image or a list) per prompt, or one image for all.")
        template, conversations = self.config.instruction_template, []
        for entry, text in zip(entries, prompts):
            images = entry if isinstance(entry, (list, tuple)) else [entry]
            content = [{"type": "image", "image": item} for item in images if item is not None]
            if template is not None and not content:
                text = template.replace("{}", text)
            conversations.append([{"role": "user", "content": [*content, {"type": "text", "text": text}]}])
        return conversations

    def generate_visual_tokens(
        self, conversations: list[Conversation], max_new_tokens: int = 512, generation_kwargs: dict | None = None
    ) -> tuple[list[str], list[torch.Tensor]]:
        """Return B answers with `<image>` in the place of each image, and their visual tokens, B of (images, N, V)."""
        self._require_model()
        check_types({"max_new_tokens": max_new_tokens, "generation_kwargs": generation_kwargs}, OPTION_TYPES)
        inputs = self.processor.prepare_prompts(conversations).to(self._execution_device)
        options = dict(generation_kwargs or {})
        config = options.get("generation_config")
        if isinstance(config, GenerationConfig) and (config.max_new_tokens or config.max_length):
            raise ValueError("`generation_config` limits the answer: pass `max_new_tokens` to the call instead.")
        if refused := {"max_new_tokens", "max_length", "inputs", "inputs_embeds", *inputs} & options.keys():
            names = ", ".join(sorted(refused))
            raise ValueError(f"`generation_kwargs` has {names}: pass prompt, images and `max_new_tokens` to the call.")
        # Offloading moves a model to the device when `forward` is called, but `generate` reads its device before that.
        generate = apply_forward_hook(type(self.model).generate)
        options = {"max_new_tokens": max_new_tokens, **options, "return_dict_in_generate": True}
        with self.progress_bar(total=max_new_tokens) as progress_bar:
            progress_bar.set_description("Answering")

            def advance(*args, **kwargs) -> bool:  # as a criterion, it never stops
                progress_bar.update()
                return False

            criteria = options.get("stopping_criteria") or []
            options["stopping_criteria"] = [*(criteria if isinstance(criteria, list) else [criteria]), advance]
            answers = generate(self.model, **inputs, **options)
        text = self.processor.decode_generated(answers.sequences[:, inputs["input_ids"].shape[1] :])
        # Beam search and assisted decoding only generate text.
        none = torch.zeros(0, self.model.config.num_image_tokens, self.model.config.visual_token_dim)
        return text, answers.get("visual_tokens", [none] * len(text))

    @torch.no_grad()
    def get_visual_tokens(self, images: PIL.Image.Image | list[PIL.Image.Image]) -> torch.Tensor:
        """Encode images to visual tokens (I, N, V) with the model's vision tower."""
        self._require_model()
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        encode = apply_forward_hook(type(self.model).get_visual_tokens)
        return encode(self.model, pixels.to(self._execution_device))

    def reconstruct(self, images: PIL.Image.Image | list[PIL.Image.Image], **options) -> Images:
        """Encode images and decode them again, which bounds the quality of any answer."""
        return self.decode_visual_tokens(self.get_visual_tokens(images), **options)

    def encode_visual_tokens(
        self,
        visual_tokens: torch.Tensor,
        negative_visual_tokens: torch.Tensor | None = None,
        do_classifier_free_guidance: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Return the states (I, L, C) that the U-Net attends to, given visual tokens (I, N, V), and those to guide away
        from: of `negative_visual_tokens` (N, V) or (I, N, V), or unconditional ones; `None` without guidance.
        """
        placement = {"device": self._execution_device, "dtype": self.projector.dtype}
        visual_tokens = join_visual_tokens(visual_tokens).to(**placement)
        embeds = self.projector(visual_tokens).to(self.unet.dtype)
        if not do_classifier_free_guidance:
            return embeds, None
        negative = visual_tokens if negative_visual_tokens is None else negative_visual_tokens.to(**placement)
        whole, one = tuple(visual_tokens.shape), tuple(visual_tokens.shape[1:])
        if (given := tuple(negative.shape)) not in (whole, one, (1, *one)):
            raise ValueError(f"`negative_visual_tokens` have shape {given}, but must have shape {one} or {whole}.")
        # The projector gives the unconditional states of images that are not kept.
        kept = torch.full((len(embeds),), negative_visual_tokens is not None, device=embeds.device)
        return embeds, self.projector(negative.expand_as(visual_tokens), kept).to(embeds.dtype)

    def _start_call(self, num_inputs: int, options: dict) -> "MetaMorphPipeline":
        """Check the options of a call, and return a copy of this pipeline with them and a scheduler of its own."""
        height, width = self.default_size
        steps, scale = self.config.default_num_inference_steps, self.config.default_guidance_scale
        defaults = {"num_inference_steps": steps, "guidance_scale": scale, "height": height, "width": width}
        defaults["callback_on_step_end_tensor_inputs"] = ["latents"]
        options = DecodingOptions(**defaults | {name: value for name, value in options.items() if value is not None})
        if isinstance(options.callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            options.callback_on_step_end_tensor_inputs = options.callback_on_step_end.tensor_inputs
        check_types(vars(options), OPTION_TYPES)
        factor, repeats, generator = self.vae_scale_factor, options.num_images_per_prompt, options.generator
        for name in ("height", "width"):
            if getattr(options, name) % factor:
                raise ValueError(f"`{name}` is {getattr(options, name)}, but must be a multiple of {factor}.")
        if isinstance(generator, list) and len(generator) not in (num_inputs, num_inputs * repeats):
            counts = f"{len(generator)} generators for {num_inputs} prompts or images"
            raise ValueError(f"Got {counts}: pass one for each, or one for each of their {repeats} decodings.")
        self._interrupt = False
        call = copy.copy(self)  # callbacks receive the copy, so that they only change their own call
        call.scheduler = copy.deepcopy(self.scheduler)
        call._options, call._guidance_scale = options, options.guidance_scale
        schedule = (options.num_inference_steps, self._execution_device, options.timesteps, options.sigmas)
        timesteps, _ = retrieve_timesteps(call.scheduler, *schedule)
        call.num_timesteps = len(timesteps)  # some schedulers take several for a step
        return call

    def _decode(self, call, visual_tokens: torch.Tensor, image_counts: list[int], num_inputs: int) -> Images:
        """Decode visual tokens (I, N, V) with the options of a call, given the number of images in each answer."""
        options, device, dtype = call._options, self._execution_device, self.unet.dtype
        repeats, generator = options.num_images_per_prompt, options.generator
        if isinstance(generator, list) and generator:  # an input may have several answers, with several images
            each, answers = len(generator) // num_inputs, len(image_counts) // num_inputs
            starts = [index // answers * each for index in range(len(image_counts))]
            rows = [generator[start : start + each] * (n * repeats // each) for start, n in zip(starts, image_counts)]
            generator = sum(rows, [])
        # 1. Encode the visual tokens
        guided = call.do_classifier_free_guidance
        embeds, negative_embeds = self.encode_visual_tokens(visual_tokens, options.negative_visual_tokens, guided)
        prompt_embeds = torch.cat([negative_embeds, embeds]) if guided else embeds
        prompt_embeds = prompt_embeds.repeat_interleave(repeats, dim=0)
        # 2. Prepare the noise
        size = (options.height // self.vae_scale_factor, options.width // self.vae_scale_factor)
        shape = (len(embeds) * repeats, self.unet.config.in_channels, *size)
        latents = options.latents
        if latents is None or not len(embeds):  # an answer without an image leaves nothing to decode
            latents = randn_tensor(shape, generator or None, device, dtype)
        elif latents.shape != shape:
            raise ValueError(f"`latents` have shape {tuple(latents.shape)}, but must have shape {shape}.")
        latents = latents.to(device, dtype) * call.scheduler.init_noise_sigma
        # 3. Denoise
        step_kwargs = StableDiffusionPipeline.prepare_extra_step_kwargs(call, generator, options.eta)
        for index, timestep in enumerate(call.progress_bar(call.scheduler.timesteps if len(latents) else [])):
            if call._interrupt or self._interrupt:
                continue
            guided = call.do_classifier_free_guidance  # a callback may end guidance
            noise_pred = self.unet(
                call.scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, timestep),
                timestep,
                encoder_hidden_states=prompt_embeds,
                cross_attention_kwargs=options.cross_attention_kwargs,
                return_dict=False,
            )[0]
            if guided:
                unconditional, conditional = noise_pred.chunk(2)
                noise_pred = unconditional + call.guidance_scale * (conditional - unconditional)
            latents = call.scheduler.step(noise_pred, timestep, latents, **step_kwargs, return_dict=False)[0]
            if options.callback_on_step_end is not None:
                tensors = {"latents": latents, "prompt_embeds": prompt_embeds}
                tensors = {name: tensors[name] for name in options.callback_on_step_end_tensor_inputs}
                changed = options.callback_on_step_end(call, index, timestep, tensors) or {}
                latents = changed.pop("latents", latents)
                prompt_embeds = changed.pop("prompt_embeds", prompt_embeds)
        # 4. Decode the latents
        images = latents
        if options.output_type != "latent":
            batch = latents if len(latents) else latents.new_zeros(1, *shape[1:])  # not every VAE decodes empty ones
            scaled = batch.to(self.vae.dtype) / self.vae.config.scaling_factor
            images = self.vae.decode(scaled, return_dict=False)[0][: len(latents)]
            images = self.image_processor.postprocess(images, output_type=options.output_type)
        self.maybe_free_model_hooks()
        return images

    # The defaults of diffusers include a text encoder.
    fuse_lora = partialmethod(StableDiffusionLoraLoaderMixin.fuse_lora, components=["unet"])
    unfuse_lora = partialmethod(StableDiffusionLoraLoaderMixin.unfuse_lora, components=["unet"])

    @torch.no_grad()
    def decode_visual_tokens(self, visual_tokens: torch.Tensor, **options) -> Images:
        """
        Decode visual tokens (I, N, V), or a list of them, into I * `num_images_per_prompt` images, by the options of
        [`DecodingOptions`]. If memory is short, call with a few at a time.

        Raises:
            ValueError: If shapes, counts or options do not fit, or a value is NaN or infinite.
        """
        visual_tokens = join_visual_tokens(visual_tokens)
        count = len(visual_tokens) if visual_tokens.ndim else 0
        return self._decode(self._start_call(count, options), visual_tokens, [1] * count, count)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PIL.Image.Image | str | list | None = None,
        messages: Conversation | list[Conversation] | None = None,
        max_new_tokens: int = 512,
        generation_kwargs: dict | None = None,
        return_dict: bool = True,
        **options,
    ) -> MetaMorphPipelineOutput | tuple:
        """
        Answer B prompts or conversations.

        Args:
            prompt (`str` or `list[str]`): A caption for `instruction_template`, or beside images a verbatim request.
            image (`PIL.Image.Image`, path or URL, or list): Precedes the prompt. A list has the images of a single
                prompt, or one entry (an image, a list or `None`) per prompt; one image goes with all prompts.
            messages (`list[dict]` or list of them): Instead of `prompt`, conversations in the standard chat form.
            max_new_tokens (`int`): Maximum length of an answer, in which an image takes N + 2 tokens.
            generation_kwargs (`dict`): Additional arguments of `model.generate`. A sampled answer follows
                `torch.manual_seed`, not `generator`.
            return_dict (`bool`): `False` returns a tuple (images, text, image_counts).
            options: Those of [`DecodingOptions`].

        Raises:
            ValueError: If inputs or options do not fit; most are checked before the model runs.
        """
        # 1. Check the inputs
        conversations = self.prepare_conversations(prompt, image, messages)
        call = self._start_call(len(conversations), options)
        # 2. Answer with text and visual tokens
        text, visual_tokens = self.generate_visual_tokens(conversations, max_new_tokens, generation_kwargs)
        image_counts = [len(images) for images in visual_tokens]
        answers_per_prompt = len(text) // len(conversations)
        for index, (answer, count) in enumerate(zip(text, image_counts)):
            if not count:
                logger.warning("Prompt %d was answered without an image: %r", index // answers_per_prompt, answer)
        # 3. Encode, denoise and decode the visual tokens
        images = self._decode(call, torch.cat(visual_tokens), image_counts, len(conversations))
        image_counts = [count * call._options.num_images_per_prompt for count in image_counts]
        output = MetaMorphPipelineOutput(images, text, image_counts)
        return output if return_dict else output.to_tuple()
