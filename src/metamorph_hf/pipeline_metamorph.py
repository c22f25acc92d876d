"""The pipeline: prompts and pictures in, text and pictures out.

Shapes: B prompts, I generated images of all prompts together, N visual tokens per image, V vision width.
"""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.configuration_utils import ConfigMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput, logging
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, ProcessorMixin
from transformers.dynamic_module_utils import custom_object_save


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# Modules of this package whose classes a saved pipeline may hold. Their code is saved with it.
OWN_MODULES = (
    "grid_unet",
    "modeling_metamorph",
    "patch_vae",
    "pipeline_metamorph",
    "processing_metamorph",
    "visual_token_projector",
)

Conversation = list[dict]


@dataclass
class MetaMorphPipelineOutput(BaseOutput):
    """
    Args:
        images (`list[PIL.Image.Image]`, or `np.ndarray` or `torch.Tensor` with I first):
            The pictures of all answers, in order.
        text (`list[str]` of length B): The answers, with `<image>` where a picture stands.
        image_counts (`list[int]` of length B): How many of `images` belong to each answer.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    text: list[str]
    image_counts: list[int]


class MetaMorphPipeline(DiffusionPipeline):
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
        instruction_template (`str`, *optional*, defaults to `"Generate an image of {}."`):
            What a caption is put in, at `{}`. `None` sends captions as they are.
        default_num_inference_steps (`int`, defaults to 50), default_guidance_scale (`float`, defaults to 7.5):
            What suits these weights, where a call does not say.

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
    _optional_components = ["model", "processor"]

    def __init__(
        self,
        model: PreTrainedModel | None,
        processor: ProcessorMixin | None,
        projector: ModelMixin,
        unet: ModelMixin,
        vae: ModelMixin,
        scheduler: SchedulerMixin,
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
        self.register_modules(
            model=model, processor=processor, projector=projector, unet=unet, vae=vae, scheduler=scheduler
        )
        self.register_to_config(
            instruction_template=instruction_template,
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
        )
        self.image_processor = VaeImageProcessor()

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

    def check_inputs(
        self, prompt, image, messages, generator, output_type, callback_on_step_end_tensor_inputs
    ) -> None:
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
        self.check_paint_inputs(output_type, callback_on_step_end_tensor_inputs)
        count = 1 if isinstance(prompt, str) else len(prompt if prompt is not None else conversations)
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"Got {count} prompts but {len(generator)} generators: pass one generator per prompt.")

    def check_paint_inputs(self, output_type, callback_on_step_end_tensor_inputs) -> None:
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
            pictures = [] if entry is None else entry if isinstance(entry, list) else [entry]
            content = [{"type": "image", "image": picture} for picture in pictures]
            content.append({"type": "text", "text": text if template is None else template.format(text)})
            conversations.append([{"role": "user", "content": content}])
        return conversations

    def generate_visual_tokens(
        self, conversations: list[Conversation], max_new_tokens: int, generation_kwargs: dict
    ) -> tuple[list[str], list[torch.Tensor]]:
        """The model's answers: B texts, and for each its images' visual tokens (images, N, V)."""
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
        answers = generate(
            self.model, **inputs, max_new_tokens=max_new_tokens, return_dict_in_generate=True, **generation_kwargs
        )
        text = self.processor.decode_generated(answers.sequences[:, inputs["input_ids"].shape[1] :])
        return text, answers.visual_tokens

    def encode_visual_tokens(self, visual_tokens: torch.Tensor) -> torch.Tensor:
        """Visual tokens (I, N, V) to cross-attention states; after as many zeros if guidance needs them."""
        states = self.projector(visual_tokens.to(self._execution_device, self.projector.dtype)).to(self.unet.dtype)
        return torch.cat([torch.zeros_like(states), states]) if self.do_classifier_free_guidance else states

    def prepare_latents(self, count: int, generator, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"Got {count} images but {len(generator)} generators: pass one generator per image.")
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (count, self.unet.config.in_channels, height, width)
        return randn_tensor(shape, generator, device, dtype) * self.scheduler.init_noise_sigma

    def prepare_extra_step_kwargs(self, generator) -> dict:
        # Schedulers differ in what their `step` takes.
        accepted = inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if "generator" in accepted else {}

    @torch.no_grad()
    def decode_visual_tokens(
        self,
        visual_tokens: torch.Tensor,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """
        Paints visual tokens, from [`MetaMorphForConditionalGeneration.generate`] or its `get_visual_tokens`.

        Args:
            visual_tokens (`torch.Tensor` of shape (I, N, V)): In the model's space, L2-normalised if its are.
            generator (`torch.Generator` or list of I of them, *optional*): Makes the pictures reproducible.

        The other arguments are those of [`~MetaMorphPipeline.__call__`].

        Returns:
            The I images, in the form that `output_type` names.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_paint_inputs(output_type, callback_on_step_end_tensor_inputs)
        images = self._paint(
            visual_tokens,
            num_inference_steps,
            guidance_scale,
            generator,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        self.maybe_free_model_hooks()
        return images

    def _paint(
        self,
        visual_tokens,
        num_inference_steps,
        guidance_scale,
        generator,
        output_type,
        callback_on_step_end,
        callback_on_step_end_tensor_inputs,
    ):
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        self._guidance_scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        self._interrupt = False
        device = self._execution_device

        # Prepare what the U-Net attends to, timesteps and latents: all images in one batch
        prompt_embeds = self.encode_visual_tokens(visual_tokens)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = self.prepare_latents(len(visual_tokens), generator, prompt_embeds.dtype, device)
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator)

        # Denoise
        timesteps = self.scheduler.timesteps if len(visual_tokens) else []
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                latent_model_input = torch.cat([latents] * 2) if self.do_classifier_free_guidance else latents
                latent_model_input = self.scheduler.scale_model_input(latent_model_input, t)
                noise_pred = self.unet(latent_model_input, t, encoder_hidden_states=prompt_embeds).sample
                if self.do_classifier_free_guidance:
                    unconditional, conditional = noise_pred.chunk(2)
                    noise_pred = unconditional + self.guidance_scale * (conditional - unconditional)
                latents = self.scheduler.step(noise_pred, t, latents, **extra_step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "prompt_embeds": prompt_embeds}
                    wanted = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, t, wanted)
                    latents = changed.pop("latents", latents)
                    prompt_embeds = changed.pop("prompt_embeds", prompt_embeds)
                progress_bar.update()

        # Decode
        if output_type == "latent":
            return latents
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        # Not every VAE can decode an empty batch.
        images = self.vae.decode(latents if len(latents) else latents.new_zeros(1, *latents.shape[1:])).sample
        images = images[: len(latents)]
        return self.image_processor.postprocess(images, output_type=output_type)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PIL.Image.Image | str | list | None = None,
        messages: Conversation | list[Conversation] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
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
            num_inference_steps (`int`, *optional*): Denoising steps; `default_num_inference_steps` if not given.
            guidance_scale (`float`, *optional*):
                How far to go from what the U-Net predicts without visual tokens towards what it predicts with them;
                1 goes exactly there, at half the cost. `default_guidance_scale` if not given.
            generator (`torch.Generator` or list of B of them, *optional*):
                Makes the painting reproducible. With one per prompt, a prompt's pictures do not depend on the others.
                The answer itself is random only if it is sampled, and then follows `torch.manual_seed`.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): False gives the plain tuple (images, text, image_counts).
            max_new_tokens (`int`, defaults to 512):
                Length of an answer. An image takes N + 2 tokens, and one that has begun is finished.
            generation_kwargs (`dict`, *optional*): More for `model.generate`, such as `{"do_sample": True}`.
            callback_on_step_end (`Callable`, *optional*):
                Called after each denoising step as `callback(pipe, step, timestep, tensors)`; returns the tensors it
                changes.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                Which of `latents` and `prompt_embeds` (the cross-attention states) `tensors` holds.

        Returns:
            [`MetaMorphPipelineOutput`], or a tuple if `return_dict` is `False`.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Check inputs
        self.check_inputs(prompt, image, messages, generator, output_type, callback_on_step_end_tensor_inputs)

        # 2. Generate text and visual tokens
        conversations = self.prepare_conversations(prompt, image, messages)
        text, visual_tokens = self.generate_visual_tokens(conversations, max_new_tokens, generation_kwargs or {})
        image_counts = [len(images) for images in visual_tokens]
        for index, (answer, count) in enumerate(zip(text, image_counts)):
            if count == 0:
                logger.warning("Prompt %d was answered without a picture: %r", index, answer)
        if isinstance(generator, list):  # per prompt so far
            generator = [source for source, count in zip(generator, image_counts) for _ in range(count)]

        # 3. to 5. Prepare latents, denoise, decode
        images = self._paint(
            torch.cat(visual_tokens),
            num_inference_steps,
            guidance_scale,
            generator,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )

        # Offload all models
        self.maybe_free_model_hooks()

        if not return_dict:
            return images, text, image_counts
        return MetaMorphPipelineOutput(images=images, text=text, image_counts=image_counts)


def register_in_diffusers() -> None:
    """Let `DiffusionPipeline.from_pretrained` load a saved [`MetaMorphPipeline`] by this package's classes.

    diffusers has no registry for that: it looks a class up by its name in its own module, and one that comes with code
    beside its weights it loads from there alone, if it is trusted. The package is, so it goes first.
    """
    diffusers.MetaMorphPipeline = MetaMorphPipeline
    package = __name__.rpartition(".")[0]
    original = ConfigMixin.load_config.__func__

    def load_config(cls, *args, **kwargs):
        loaded = original(cls, *args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if config.get("_class_name") == ["pipeline_metamorph", MetaMorphPipeline.__name__]:
            config["_class_name"] = MetaMorphPipeline.__name__
            for name, value in config.items():
                if isinstance(value, list) and value[0] in OWN_MODULES:
                    config[name] = [f"{package}.{value[0]}", value[1]]
        return loaded

    DiffusionPipeline.load_config = classmethod(load_config)


__all__ = ["MetaMorphPipeline", "MetaMorphPipelineOutput"]
