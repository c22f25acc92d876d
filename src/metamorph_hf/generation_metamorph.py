"""What `generate()` needs to mix text steps and visual steps.

The decoding loop is transformers' own. A logits processor keeps each row in step: after `<image_start>` it forces N
times the placeholder id, then `<image_end>`. Where a placeholder was chosen, the next forward pass reads
projector(visual token) instead of an embedding; the visual token is the vision head's output of the step before.
"""

import inspect
from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    ProcessorMixin,
    StoppingCriteria,
    TextIteratorStreamer,
)
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList
from transformers.utils import ModelOutput, logging

from .configuration_metamorph import MetaMorphConfig


logger = logging.get_logger(__name__)


@dataclass
class MetaMorphGenerateOutput(GenerateDecoderOnlyOutput):
    """
    [`GenerateDecoderOnlyOutput`] and what was drawn (B rows, N visual tokens per image, V wide).

    Args:
        visual_tokens (`list[torch.Tensor]`):
            For each row its finished generated images, (images, N, V), normalised, in reading order.
        unfinished_images (`torch.Tensor` of shape (B,), bool):
            Rows that a stopping criterion ended inside an image. Its visual tokens are in `sequences` as placeholders
            but not in `visual_tokens`. `max_new_tokens` never does this: an image that has begun is finished.
    """

    visual_tokens: list[torch.FloatTensor] | None = None
    unfinished_images: torch.BoolTensor | None = None


def is_inside_image(last: torch.LongTensor, image_token_id: int, image_start_token_id: int) -> torch.BoolTensor:
    """Whether a visual token, or `<image_end>` after the last of them, comes after these ids."""
    return (last == image_token_id) | (last == image_start_token_id)


class ImageTokensLogitsProcessor(LogitsProcessor):
    """Forces exactly `num_image_tokens` placeholders after `<image_start>`, then `<image_end>`.

    Args:
        config ([`MetaMorphConfig`]): Says the ids and the number.
        begun (`torch.Tensor` of shape (B,), bool, *optional*): Rows whose prompt of `inputs_embeds` begins an image.
        force_at (`int`, *optional*): Where `<image_start>` itself is forced, a length of `input_ids`.
    """

    def __init__(self, config: MetaMorphConfig, begun: torch.BoolTensor | None = None, force_at: int | None = None):
        self.image_token_id = config.image_token_id  # an attribute of a configuration is slow to get
        self.image_start_token_id = config.image_start_token_id
        self.image_end_token_id = config.image_end_token_id
        self.num_image_tokens = config.num_image_tokens
        self.begun = begun
        self.force_at = force_at

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        # No ids in the first step after a prompt of `inputs_embeds`.
        inside = is_inside_image(input_ids[:, -1:], self.image_token_id, self.image_start_token_id).any(dim=-1)
        if self.begun is not None and input_ids.shape[1] == 0:
            inside = self.begun
        is_forced = input_ids.shape[1] == self.force_at
        if inside.device.type == "cpu" and not is_forced and not inside.any():  # elsewhere a look would have to wait
            return scores
        full = torch.zeros_like(inside)
        if input_ids.shape[1] >= self.num_image_tokens:
            full = (input_ids[:, -self.num_image_tokens :] == self.image_token_id).all(dim=-1)
        forced_id = torch.where(full, self.image_end_token_id, self.image_token_id)
        if is_forced:
            forced_id = torch.where(inside, forced_id, self.image_start_token_id)
            inside = torch.ones_like(inside)
        forced_score = torch.where(inside[:, None], 0.0, scores.gather(1, forced_id[:, None]))
        return scores.masked_fill(inside[:, None], float("-inf")).scatter_(1, forced_id[:, None], forced_score)

    # transformers asks for it in every step; found anew, it costs as much as the rest.
    __call__.__signature__ = inspect.signature(__call__)


class ForbiddenTokensLogitsProcessor(LogitsProcessor):
    """Forbids some ids: transformers' `SuppressTokensLogitsProcessor`, without a search of the vocabulary per step."""

    def __init__(self, token_ids: torch.LongTensor):
        self.token_ids = token_ids

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores.index_fill(-1, self.token_ids, float("-inf"))

    __call__.__signature__ = inspect.signature(__call__)  # as above


class MaxImagesLogitsProcessor(LogitsProcessor):
    """
    Forbids `<image_start>` to rows that have begun `max_images` images, and to all where an image no longer fits. It
    counts, so it serves one answer only.

    Args:
        image_start_token_id (`int`): Id of `<image_start>`.
        max_images (`int`, *optional*): Images of an answer; any number without it.
        last_start (`int`, *optional*): Up to which length of `input_ids` an image fits; any without it.
        begun (`torch.Tensor` of shape (B,), bool, *optional*): Rows whose prompt of `inputs_embeds` begins an image.
    """

    def __init__(
        self,
        image_start_token_id: int,
        max_images: int | None,
        last_start: int | None,
        begun: torch.BoolTensor | None = None,
    ):
        self.image_start_token_id = image_start_token_id
        self.max_images = max_images
        self.last_start = last_start
        self.begun = 0 if begun is None else begun.long()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.begun = self.begun + (input_ids[:, -1:] == self.image_start_token_id).any(dim=-1)
        forbidden = torch.zeros_like(self.begun, dtype=torch.bool)
        if self.max_images is not None:
            forbidden = self.begun >= self.max_images
        if self.last_start is not None and input_ids.shape[1] > self.last_start:
            forbidden = torch.ones_like(forbidden)
        start_score = scores[:, self.image_start_token_id].masked_fill(forbidden, float("-inf"))
        return scores.select_scatter(start_score, 1, self.image_start_token_id)


class MetaMorphStreamer(TextIteratorStreamer):
    """
    Yields an answer while `generate()` writes it in another thread: pieces of text (`str`), and each image as soon as
    it is finished (`torch.Tensor` of shape (N, V), its visual tokens). For one prompt at a time, as transformers'
    streamers are.

    Args:
        processor ([`MetaMorphProcessor`]): Its tokenizer makes text of ids.
        skip_prompt (`bool`, defaults to `True`): Yield the answer alone.
        timeout (`float`, *optional*): Seconds to wait for the next piece before `queue.Empty` is raised.
        decode_kwargs: For the tokenizer's `decode`; special tokens are skipped unless they say otherwise.

    Example:

        ```py
        >>> streamer = MetaMorphStreamer(processor)
        >>> Thread(target=model.generate, kwargs={**inputs, "streamer": streamer}).start()
        >>> for piece in streamer:
        ...     print(piece, end="") if isinstance(piece, str) else pipe.decode_visual_tokens(piece[None])[0].show()
        ```
    """

    def __init__(
        self, processor: ProcessorMixin, skip_prompt: bool = True, timeout: float | None = None, **decode_kwargs
    ):
        decode_kwargs = {"skip_special_tokens": True, **decode_kwargs}
        super().__init__(processor.tokenizer, skip_prompt=skip_prompt, timeout=timeout, **decode_kwargs)
        self.image_token_id = processor.image_token_id
        self.num_image_tokens = processor.num_image_tokens
        self.begin([])

    def begin(self, visual_token_steps: list[torch.Tensor]) -> None:
        """Called by `generate()`: where it puts what the vision head gives, (1, 1, V) for each new token."""
        self.visual_token_steps = visual_token_steps
        self.new_tokens = self.drawn = 0

    def put(self, value: torch.LongTensor) -> None:
        if self.next_tokens_are_prompt:
            super().put(value)
            self.next_tokens_are_prompt = False
            return
        self.new_tokens += 1
        if value.flatten()[0].item() != self.image_token_id:
            super().put(value)
            return
        self.drawn += 1
        if self.drawn % self.num_image_tokens == 0:
            # Text that waits for its word to end comes before the image.
            text = self.tokenizer.decode(self.token_cache, **self.decode_kwargs)[self.print_len :]
            self.token_cache, self.print_len = [], 0
            self.on_finalized_text(text)
            first = self.new_tokens - self.num_image_tokens
            self.text_queue.put(torch.cat(self.visual_token_steps[first : self.new_tokens], dim=1)[0])


class MaxLengthOutsideImageCriteria(StoppingCriteria):
    """
    transformers' `MaxLengthCriteria`, but a row finishes the image it is in, at most N + 1 tokens more. It is none of
    them, since where those are the decoding loop stops by itself at their `max_length`.
    """

    def __init__(self, max_length: int, config: MetaMorphConfig, pads: bool):
        self.max_length = max_length
        self.image_token_id = config.image_token_id
        self.image_start_token_id = config.image_start_token_id
        if pads:  # rows end at different times: where a criterion has this attribute, the loop pads those that have
            self.eos_token_id = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        inside = is_inside_image(input_ids[:, -1], self.image_token_id, self.image_start_token_id)
        return ~inside & (input_ids.shape[1] >= self.max_length)


class MetaMorphGenerationMixin(GenerationMixin):
    """
    `generate()` for text and images: greedy search and sampling, cached or not, any batch.

    Options of `generate()` beside transformers' own, also as entries of `generation_config`:

    - `max_images` (`int`): At most so many images in an answer. With 0 it is text only, and beam search and assisted
      decoding are possible; they are refused otherwise.
    - `force_image` (`bool`): The answer begins with an image. So does one to a prompt that ends with `<image_start>`.
    - `visual_tokens` (`torch.Tensor` of shape (I, N, V) or list of such): Instead of `pixel_values`, the prompts'
      images as `get_visual_tokens` or an earlier answer gives them: an image asked about often is encoded once. As in
      `forward`, `image_indices` says which of them stands at each place.

    No image begins where it no longer fits into the language model's context or a static cache.
    """

    def _prepare_generation_config(self, generation_config, **kwargs):
        if kwargs.pop("generation_mode", "text") != "text":  # what pipeline("any-to-any") passes on
            raise ValueError(
                "`generate` gives visual tokens, which no pipeline of transformers makes pixels of: use "
                "MetaMorphPipeline for pictures, or `generate` with force_image=True and "
                "return_dict_in_generate=True for visual tokens."
            )
        given = {name: kwargs.pop(name) for name in ("max_images", "force_image") if name in kwargs}
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        options = {"max_images": None, "force_image": False, **generation_config.to_dict(), **given}
        max_images, force_image = options["max_images"], options["force_image"]
        if max_images is not None and (type(max_images) is not int or max_images < 0):
            raise ValueError(f"`max_images` is {max_images!r}, but must be 0, for text only, or a larger number.")
        if force_image and max_images == 0 and len(given) == 1:  # what a call says goes before what is stored
            max_images, force_image = (0, False) if "max_images" in given else (None, True)
        generation_config.max_images, generation_config.force_image = max_images, force_image
        if force_image and not self._can_draw(generation_config):
            raise ValueError(
                "`force_image` asks for an image, but `max_images=0`, `suppress_tokens` or `bad_words_ids` allow none."
            )
        return generation_config, model_kwargs

    def _can_draw(self, generation_config: GenerationConfig) -> bool:
        bad_words = [word[0] for word in generation_config.bad_words_ids or [] if len(word) == 1]
        never = [*(generation_config.suppress_tokens or []), *bad_words]
        return generation_config.max_images != 0 and self.config.image_start_token_id not in never

    def _begins_image(
        self, input_ids: torch.LongTensor | None = None, inputs_embeds: torch.Tensor | None = None, **kwargs
    ) -> torch.BoolTensor:
        """Which prompts end with `<image_start>`, (B,), whether they are ids or `inputs_embeds` alone."""
        if input_ids is not None and input_ids.shape[1]:
            return input_ids[:, -1] == self.config.image_start_token_id
        if inputs_embeds is None:
            raise ValueError("The prompt is empty: give `input_ids` or `inputs_embeds` of one position at least.")
        image_start = torch.tensor(self.config.image_start_token_id, device=inputs_embeds.device)
        return (inputs_embeds[:, -1] == self.get_input_embeddings()(image_start)).all(-1)

    @property
    def _context(self) -> int | None:
        """The language model's; one with ALiBi or without attention has no limit."""
        return getattr(self.config.text_config, "max_position_embeddings", None)

    def _last_image_start(
        self, prompt_length: int, cache: Cache | None = None, inputs_embeds: torch.Tensor | None = None, **kwargs
    ) -> int | None:
        """Where in `input_ids` an image can begin at the latest, to fit into context and cache; None for anywhere."""
        limits = [self._context] if self._context is not None else []
        if cache is not None:
            lengths = [layer.get_max_length() for layer, slides in zip(cache.layers, cache.is_sliding) if not slides]
            limits += [length for length in lengths if length >= 0]
        unseen = inputs_embeds.shape[1] if prompt_length == 0 and inputs_embeds is not None else 0
        return min(limits) - unseen - self.config.num_image_tokens - 1 if limits else None

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        supported = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        if generation_mode not in supported and self._can_draw(generation_config):
            raise ValueError(
                f"{generation_mode.value.replace('_', ' ')} cannot draw images: visual tokens are regressed one by "
                "one, so there are no alternatives to rank or verify. Use greedy search or sampling (num_beams=1, no "
                "assistant), or switch images off with max_images=0."
            )
        if generation_config.guidance_scale not in (None, 1) and self._can_draw(generation_config):
            raise ValueError(
                "Classifier-free guidance (guidance_scale) cannot draw images: its second pass reads the answer as "
                "ids, without visual tokens, and guides the choice of text only. Leave guidance_scale out, or switch "
                "images off with max_images=0."
            )
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        raise NotImplementedError(
            "Continuous batching (`generate_batch`, the paged cache) hands on token ids alone, and no visual tokens: "
            "call `generate` with a batch."
        )

    def _validate_generated_length(self, generation_config, input_ids_length, has_default_max_length):
        if self._context is not None and input_ids_length >= self._context:
            raise ValueError(
                f"The prompt has {input_ids_length} tokens, visual tokens included, longer than the model's "
                f"context of {self._context} tokens. Shorten it or leave out images."
            )
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)

    def _get_logits_processor(self, generation_config: GenerationConfig, *args, **kwargs) -> LogitsProcessorList:
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        config, device, prompt_length = self.config, kwargs.get("device"), kwargs["input_ids_seq_length"]
        begun = None
        if prompt_length == 0:
            begun = self._begins_image(**kwargs["model_kwargs"])
        # First, so that sampling and user processors choose among real text tokens; the forcing comes last.
        never_text = [config.image_token_id, config.image_end_token_id]
        if generation_config.max_images == 0:
            never_text.append(config.image_start_token_id)
        processors.insert(0, ForbiddenTokensLogitsProcessor(torch.tensor(never_text, device=device)))
        if self._can_draw(generation_config):
            max_images = generation_config.max_images
            last_start = self._last_image_start(prompt_length, **kwargs["model_kwargs"])
            if last_start is not None and last_start >= generation_config.max_length - 1:
                last_start = None  # none begins that late
            if max_images is not None or last_start is not None:
                start = config.image_start_token_id
                processors.insert(0, MaxImagesLogitsProcessor(start, max_images, last_start, begun))
            force_at = prompt_length if generation_config.force_image else None
            processors.append(ImageTokensLogitsProcessor(config, begun, force_at))
        return processors

    def _get_stopping_criteria(self, generation_config: GenerationConfig, *args, **kwargs) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        if not self._can_draw(generation_config):
            return criteria
        pads = generation_config._pad_token_tensor is not None
        return StoppingCriteriaList(
            MaxLengthOutsideImageCriteria(criterion.max_length, self.config, pads)
            if type(criterion) is MaxLengthCriteria
            else criterion
            for criterion in criteria
        )

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        # Room in a static cache for finishing an image that begins just before `max_length`.
        max_cache_length += self.config.num_image_tokens + 1 if self._can_draw(generation_config) else 0
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs):
        visual_tokens = model_kwargs.pop("visual_tokens", None)
        if visual_tokens is not None:
            if model_kwargs.get("pixel_values") is not None or model_kwargs.get("mm_encoder_outputs"):
                raise ValueError(
                    "Images are given twice: pass `visual_tokens`, `pixel_values` or `mm_encoder_outputs` alone."
                )
            if not isinstance(visual_tokens, torch.Tensor):
                visual_tokens = torch.cat(list(visual_tokens))
            features = self.get_image_features(
                visual_tokens=visual_tokens, image_indices=model_kwargs.pop("image_indices", None), return_dict=True
            )
            model_kwargs["mm_encoder_outputs"] = {"image": features}
        return super()._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        features = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        if features is not None and expand_size > 1 and model_kwargs.get("cache") is None:
            # transformers expands as many images as there are places, and drops the rest.
            ids = input_ids if input_ids is not None and input_ids.numel() else None
            self.model.get_placeholder_mask(ids, model_kwargs.get("inputs_embeds"), features.pooler_output)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        cache=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        **kwargs,
    ):
        kwargs.pop("visual_token_steps", None)
        may_look, may_skip_logits = kwargs.pop("may_look", False), kwargs.pop("skip_logits", False)
        # On a CPU a look at the ids costs nothing, so text steps leave out vision head and projector, and steps whose
        # next ids are forced leave out `lm_head`: logits processors see zeros there. An accelerator would have to wait
        # for it, and a compiled step is the same each time.
        if may_look and input_ids.shape[1]:  # it is empty before the first token of a prompt of `inputs_embeds`
            last, image_token_id = input_ids[:, -1], self.config.image_token_id
            inside = is_inside_image(last, image_token_id, self.config.image_start_token_id)
            kwargs["skip_visual_token"] = not inside.any()
            kwargs["skip_logits"] = may_skip_logits and bool(inside.all())
            if kwargs["skip_visual_token"] or not (last == image_token_id).any():
                kwargs.pop("generated_visual_tokens", None)
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            cache=cache,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if (steps := model_kwargs.get("visual_token_steps")) is not None:
            # None in a text step. A copy, since a step compiled to a CUDA graph writes its outputs over those before.
            steps.append(None if outputs.next_visual_token is None else outputs.next_visual_token.clone())
            # Without a cache the whole answer is read again, so all of its visual tokens are needed.
            model_kwargs["generated_visual_tokens"] = (
                steps[-1] if model_kwargs.get("use_cache", True) else torch.cat(steps, dim=1)
            )
        return model_kwargs

    def _check_prompts(
        self,
        input_ids: torch.LongTensor,
        begun: torch.BoolTensor,
        generation_config: GenerationConfig,
        model_kwargs: dict,
    ) -> None:
        """The looks at the prompts, before the loop."""
        self.model.check_image_ids()
        config, (rows, length) = self.config, input_ids.shape
        vocab_size = config.text_config.vocab_size
        unknown = input_ids[(input_ids < 0) | (input_ids >= vocab_size)]
        if unknown.numel():
            raise ValueError(
                f"`input_ids` hold {unknown[0].item()}, but the model's vocabulary has {vocab_size} tokens: the "
                "ids come from another tokenizer."
            )
        if length:
            is_visual = input_ids[:, -config.num_image_tokens :] == config.image_token_id
            partly = is_visual[:, -1] & (is_visual.sum(-1) < config.num_image_tokens)
            if partly.any():
                raise ValueError(
                    f"Prompts {partly.nonzero().flatten().tolist()} end in the middle of an image: an image in the "
                    f"prompt takes all of its {config.num_image_tokens} placeholders and <image_end>."
                )
        cache, features = model_kwargs.get("cache"), (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        # Mamba's cache does not say how much it has seen.
        is_countable = cache is None or not cache.layers or not all(cache.is_linear)
        if features is None and model_kwargs.get("inputs_embeds") is None and is_countable:
            seen = 0 if cache is None else int(cache.get_seq_length())
            self.model.check_image_count(input_ids[:, seen:] == config.image_token_id, 0)
        if not self._can_draw(generation_config):
            return
        if rows > 1 and generation_config._pad_token_tensor is None:
            raise ValueError(
                "Rows that draw end later than others, which are padded then, but there is no padding token: pass "
                "`pad_token_id`, or switch images off with max_images=0."
            )
        last_start = self._last_image_start(length, **model_kwargs)
        start = length if generation_config.force_image else length - 1 if begun.any() else None
        if None not in (start, last_start) and start > last_start:
            raise ValueError(
                f"After the prompt there is no room for an image of {config.num_image_tokens} visual tokens in the "
                "language model's context or in the static cache: shorten the prompt, or pass a longer cache."
            )

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        config, prompt_length, can_draw = self.config, input_ids.shape[1], self._can_draw(generation_config)
        begun = self._begins_image(input_ids, **kwargs)
        self._check_prompts(input_ids, begun, generation_config, kwargs)
        steps = []
        if isinstance(kwargs.get("streamer"), MetaMorphStreamer):
            kwargs["streamer"].begin(steps)
        if can_draw:
            is_compiled = self._valid_auto_compile_criteria(kwargs, generation_config)
            kwargs |= {
                "visual_token_steps": steps,
                "may_look": input_ids.device.type == "cpu" and generation_config.use_cache and not is_compiled,
                "skip_logits": not generation_config.output_logits,
            }
        else:
            kwargs["skip_visual_token"] = True
        outputs = super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
        sequences = outputs.sequences if isinstance(outputs, ModelOutput) else outputs
        is_visual = sequences[:, prompt_length:] == config.image_token_id
        counts = is_visual.sum(-1)
        begun = begun + (sequences[:, prompt_length:] == config.image_start_token_id).sum(-1)
        unfinished_images = (
            (counts < begun * config.num_image_tokens) if can_draw else torch.zeros_like(is_visual[:, 0])
        )
        if unfinished_images.any():
            logger.warning(
                "A stopping criterion ended rows %s inside an image, which is left out of `visual_tokens`.",
                unfinished_images.nonzero().flatten().tolist(),
            )
        if not isinstance(outputs, ModelOutput):
            return outputs
        finished = (counts // config.num_image_tokens * config.num_image_tokens).tolist()
        # A device that stops one step late has computed one visual token more than there are new tokens.
        steps = steps[: is_visual.shape[1]] if can_draw else [None] * is_visual.shape[1]
        dtype = next(self.vision_head.parameters()).dtype  # float32 in a model that was loaded in float16
        shape, device = (len(sequences), 1, config.visual_token_dim), sequences.device
        none = torch.zeros((), dtype=dtype, device=device).expand(shape)
        drawn = torch.cat([none if step is None else step.to(device) for step in steps], dim=1)
        visual_tokens = [
            row[mask][:count].unflatten(0, (-1, config.num_image_tokens))
            for row, mask, count in zip(drawn, is_visual, finished)
        ]
        return MetaMorphGenerateOutput(**outputs, visual_tokens=visual_tokens, unfinished_images=unfinished_images)


__all__ = ["MetaMorphGenerationMixin", "MetaMorphGenerateOutput", "MetaMorphStreamer"]
