"""`generate()` for answers that mix text and images.

The decoding loop is transformers' own. After `<image_start>` a logits processor forces N image token ids, then
`<image_end>`. Where that id was chosen, the next forward pass reads projector(visual token), the vision head's output
of the step before. With `visual_decoding="parallel"` it reads a learned query, so that one pass can cover an image.

Shapes: B rows, S sequence, I images, N visual tokens per image, V width of a visual token.
"""

from dataclasses import dataclass, field

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    ProcessorMixin,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.utils import ModelOutput, logging
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_metamorph import MetaMorphConfig
from .generation_checks import check_options, join_visual_tokens


logger = logging.get_logger(__name__)


class MetaMorphGenerationConfig(GenerationConfig):
    """
    A [`GenerationConfig`] with two fields more, which `generate()` takes as arguments, too.

    Args:
        max_images (`int`, *optional*): Largest number of images in an answer. Only with 0 are beam search, assisted
            decoding and classifier-free guidance possible.
        force_image (`bool`, *optional*): Begin the answer with an image.
    """

    def __init__(self, **kwargs):
        self.max_images = kwargs.pop("max_images", None)
        self.force_image = kwargs.pop("force_image", None)
        super().__init__(**kwargs)

    @classmethod
    def from_model_config(cls, model_config) -> "MetaMorphGenerationConfig":
        """See [`GenerationConfig.from_model_config`], which expects its own fields only."""
        return cls(**GenerationConfig.from_model_config(model_config).to_dict())


@dataclass
class MetaMorphGenerateOutput(GenerateDecoderOnlyOutput):
    """
    [`GenerateDecoderOnlyOutput`] with the generated visual tokens.

    Args:
        visual_tokens (`list[torch.Tensor]`): Of each row the finished images (images, N, V), normalized.
        unfinished_images (`torch.Tensor` of shape (B,), bool): Rows that a stopping criterion ended inside an image.
    """

    visual_tokens: list[torch.FloatTensor] | None = None
    unfinished_images: torch.BoolTensor | None = None


class ForbidImagesLogitsProcessor(LogitsProcessor):
    """Forbid images beyond `max_images`, and those that would end after `max_length`."""

    def __init__(self, config: MetaMorphConfig, max_images: int | None, prompt_length: int, max_length: int):
        # Reading an attribute of a configuration is slow, and this runs at each step.
        self.image_start_token_id, self.num_new_tokens = config.image_start_token_id, config.num_image_tokens + 2
        self.max_images, self.prompt_length, self.max_length = max_images, prompt_length, max_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        max_images = self.max_images if input_ids.shape[1] + self.num_new_tokens <= self.max_length else 0
        if max_images is None:
            return scores
        start = self.image_start_token_id
        # The prompt's last token may begin the answer's first image.
        num_begun = (input_ids[:, max(self.prompt_length - 1, 0) :] == start).sum(-1)
        start_scores = scores[:, start].masked_fill(num_begun >= max_images, -torch.inf)
        return scores.select_scatter(start_scores, 1, start)


class ForceImagesLogitsProcessor(LogitsProcessor):
    """Force the rest of an image that has begun, and, if asked to, an image at the beginning of the answer."""

    def __init__(self, config: MetaMorphConfig, force_image: bool | None, prompt_length: int):
        self.image_token_id, self.num_image_tokens = config.image_token_id, config.num_image_tokens
        self.image_start_token_id, self.image_end_token_id = config.image_start_token_id, config.image_end_token_id
        self.force_image, self.prompt_length = force_image, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        start = self.image_start_token_id
        # A prompt of `inputs_embeds` has no ids, so `last` may be empty.
        last = input_ids[:, -1:]
        is_inside = ((last == self.image_token_id) | (last == start)).any(-1)
        is_full = (input_ids[:, -self.num_image_tokens :] == self.image_token_id).sum(-1) == self.num_image_tokens
        forced_ids = torch.where(is_full, self.image_end_token_id, self.image_token_id)
        if self.force_image and input_ids.shape[1] == self.prompt_length:
            forced_ids = torch.where(is_inside, forced_ids, start)
            is_inside = torch.ones_like(is_inside)
        forced_scores = scores.gather(1, forced_ids[:, None]).masked_fill(is_inside[:, None], 0.0)
        return scores.masked_fill(is_inside[:, None], -torch.inf).scatter_(1, forced_ids[:, None], forced_scores)


class MetaMorphStreamer(TextIteratorStreamer):
    """
    Yields an answer while `generate()` writes it in another thread: pieces of text (`str`), and each image as soon as
    it is finished (`torch.Tensor` of shape (N, V), its visual tokens). Arguments are those of [`TextIteratorStreamer`]
    with a [`MetaMorphProcessor`]; prompt and special tokens are skipped by default.
    """

    def __init__(self, processor: ProcessorMixin, skip_prompt: bool = True, timeout: float | None = None, **kwargs):
        super().__init__(processor.tokenizer, skip_prompt, timeout, **{"skip_special_tokens": True, **kwargs})
        self.image_token_id, self.num_image_tokens = processor.image_token_id, processor.num_image_tokens
        self.begin([])

    def begin(self, visual_token_steps: list[torch.Tensor]) -> None:
        """Start an answer. `generate()` appends the vision head's output (1, 1, V) of each step to the list."""
        self.visual_token_steps = visual_token_steps
        self.num_new_tokens = self.num_visual_tokens = 0

    def __next__(self) -> str | torch.Tensor:
        if isinstance(piece := super().__next__(), BaseException):  # `generate()` failed in its thread
            raise piece
        return piece

    def fail(self, error: BaseException) -> None:
        """Raise an error of `generate()` where the answer is read, which would wait forever otherwise."""
        self.text_queue.put(error)
        self.token_cache, self.print_len, self.next_tokens_are_prompt = [], 0, True

    def put(self, value: torch.LongTensor) -> None:
        """See [`TextIteratorStreamer.put`]."""
        if self.next_tokens_are_prompt:
            super().put(value)
            self.next_tokens_are_prompt = False
            return
        self.num_new_tokens += 1
        if value.flatten()[0].item() != self.image_token_id:
            super().put(value)
            return
        self.num_visual_tokens += 1
        if self.num_visual_tokens % self.num_image_tokens == 0:
            # Text that waits for the end of its word comes before the image.
            text = self.tokenizer.decode(self.token_cache, **self.decode_kwargs)[self.print_len :]
            self.token_cache, self.print_len = [], 0
            self.on_finalized_text(text)
            steps = self.visual_token_steps[self.num_new_tokens - self.num_image_tokens : self.num_new_tokens]
            self.text_queue.put(torch.cat(steps, dim=1)[0])


class TrackedStoppingCriteria(StoppingCriteriaList):
    """Stopping criteria that remember which rows have finished, `finished` of shape (B,)."""

    finished: torch.BoolTensor | bool = False

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        is_done = super().__call__(input_ids, scores, **kwargs)
        self.finished = self.finished | is_done
        return is_done


@dataclass
class DecodingState:
    """State of one call of `generate()` between its steps."""

    prompt_length: int
    stopping_criteria: TrackedStoppingCriteria
    allows_passes: bool  # whether one pass may cover all steps of an image
    needs_logits: bool  # whether anybody reads the logits of steps whose next id is forced
    visual_tokens: list[torch.Tensor] = field(default_factory=list)  # the vision head's output (B, 1, V) of each step
    num_ahead: int = 0  # number of steps that the current pass covers beside its own
    pending: list[ModelOutput] = field(default_factory=list)  # outputs of the next steps, computed in one pass


def _get_mask_length(attention_mask: torch.Tensor | None, generation_config: GenerationConfig) -> int:
    """Return the number of tokens in the attention mask, also if transformers has dropped it, as it hides none."""
    return getattr(generation_config, "_mask_length", 0) if attention_mask is None else attention_mask.shape[-1]


class MetaMorphGenerationMixin(GenerationMixin):
    """
    `generate()` for text and images. An image takes N + 2 tokens, and none begins where it no longer fits into
    `max_new_tokens`, the language model's context or a static cache.
    """

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    @deprecate_kwarg("cache_params", "6.0.0", new_name="cache")
    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        visual_tokens: torch.Tensor | list[torch.Tensor] | None = None,
        generation_mode: str = "text",
        **kwargs,
    ) -> MetaMorphGenerateOutput | ModelOutput | torch.LongTensor:
        """
        See [`~transformers.GenerationMixin.generate`] and [`MetaMorphGenerationConfig`] for all other arguments.

        Args:
            visual_tokens (`torch.Tensor` or `np.ndarray` of shape (I, N, V), or list of (images, N, V), *optional*):
                The prompts' images as `get_visual_tokens` or an earlier answer returns them, instead of
                `pixel_values`. As in `forward`, `image_indices` says which of them stands at each position.
            generation_mode (`str`): Set by `pipeline("any-to-any")`, which cannot decode visual tokens.

        Returns:
            Ids of shape (B, S), or with `return_dict_in_generate=True` a [`MetaMorphGenerateOutput`].

        Raises:
            ValueError: if options have wrong types or exclude each other, images and image tokens differ in number,
                the prompt is too long, or an image that is asked for does not fit.
        """
        try:
            if generation_mode != "text":
                mode = f"generation_mode={generation_mode!r}"
                raise ValueError(f"{mode} is not supported: use MetaMorphPipeline instead.")
            kwargs = self._check_call(inputs, generation_config, visual_tokens, kwargs)
            return super().generate(inputs, generation_config, *args, **kwargs)
        except BaseException as error:
            if isinstance(kwargs.get("streamer"), MetaMorphStreamer):
                kwargs["streamer"].fail(error)
            raise

    def _check_call(self, inputs, generation_config, visual_tokens, kwargs: dict) -> dict:
        """Check the arguments of `generate()`, and return its other keyword arguments as transformers takes them."""
        stored = [getattr(config, "max_images", None) for config in (generation_config, self.generation_config)]
        max_images = next((n for n in (kwargs.get("max_images"), *stored) if n is not None), None)
        if kwargs.get("custom_generate") is not None and max_images != 0:
            raise ValueError("custom_generate cannot generate images: leave it out, or set max_images=0.")
        for name in ("num_beams", "num_return_sequences", "mm_encoder_outputs"):
            if kwargs.get(name, ...) is None:
                del kwargs[name]  # transformers takes its default only where the name is missing
        given = {"inputs": inputs, "generation_config": generation_config, **kwargs}
        check_options({**getattr(generation_config, "__dict__", {}), **given})
        if not isinstance(self.generation_config, MetaMorphGenerationConfig):  # a plain one lacks our two fields
            self.generation_config = MetaMorphGenerationConfig(**self.generation_config.to_dict())
        # An option of the call outweighs a stored option that contradicts it.
        if kwargs.get("max_images") == 0:
            kwargs.setdefault("force_image", False)
        elif kwargs.get("force_image") and self.generation_config.max_images == 0:
            kwargs.setdefault("max_images", None)
        if visual_tokens is not None:
            if kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs"):
                raise ValueError("Images are given twice: as `visual_tokens`, and as pixels or `mm_encoder_outputs`.")
            visual_tokens = join_visual_tokens(visual_tokens)
            if self.device.type != "meta":  # offloaded modules fetch their inputs
                visual_tokens = visual_tokens.to(self.device)
            features = self.get_image_features(None, visual_tokens, kwargs.pop("image_indices", None))
            kwargs["mm_encoder_outputs"] = {"image": features}
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if ids is not None and kwargs.get("cache") is None:  # a cache holds images of earlier turns
            # With `num_return_sequences`, transformers would drop surplus images silently.
            given = [output.pooler_output for output in (kwargs.get("mm_encoder_outputs") or {}).values()]
            given += [kwargs[name] for name in ("image_indices", "pixel_values") if kwargs.get(name) is not None]
            num_features = len(given[0]) * self.config.num_image_tokens if given else 0
            self.model.check_image_count(ids == self.config.image_token_id, num_features)
        return kwargs

    def get_compiled_call(self, compile_config):
        """See [`~transformers.PreTrainedModel.get_compiled_call`]. Steps of one token per row are compiled."""
        compiled_call = super().get_compiled_call(compile_config)

        def call(**inputs) -> ModelOutput:
            is_step = inputs.get("input_ids") is not None and inputs["input_ids"].shape[1] == 1
            return compiled_call(**inputs) if is_step else self(**inputs)

        return call

    def init_continuous_batching(self, *args, **kwargs):
        raise NotImplementedError("Continuous batching passes on no visual tokens: call `generate` with a batch.")

    def _allows_images(self, generation_config: GenerationConfig) -> bool:
        bad_words = [word[0] for word in generation_config.bad_words_ids or [] if len(word) == 1]
        suppressed = [*(generation_config.suppress_tokens or []), *bad_words]
        return generation_config.max_images != 0 and self.config.image_start_token_id not in suppressed

    # Overridden since beam search and assisted decoding would run silently wrong.
    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
        if (generation_config.max_images or 0) < 0:
            raise ValueError(f"`max_images` is {generation_config.max_images}, but must be 0 or a larger number.")
        if not self._allows_images(generation_config):
            if generation_config.force_image:
                others = "`max_images=0`, `suppress_tokens` or `bad_words_ids`"
                raise ValueError(f"`force_image` asks for an image, but {others} forbid it.")
            return
        if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            mode = generation_mode.value.replace("_", " ")
            raise ValueError(f"{mode} cannot generate images: use greedy search or sampling, or set max_images=0.")
        if generation_config.guidance_scale not in (None, 1):
            raise ValueError("guidance_scale cannot generate images: leave it out, or set max_images=0.")

    # Overridden since processors that depend on the prompt's length cannot be passed by the caller.
    def _get_logits_processor(
        self, generation_config, input_ids_seq_length, *args, logits_processor=None, model_kwargs, **kwargs
    ):
        config, allows_images = self.config, self._allows_images(generation_config)
        suppressed = [config.image_token_id, config.image_end_token_id]
        if not allows_images:
            suppressed.append(config.image_start_token_id)
        generation_config.suppress_tokens = [*(generation_config.suppress_tokens or []), *suppressed]
        given = list(logits_processor or [])
        if allows_images:
            max_length = self._max_length_with_image(generation_config, input_ids_seq_length, **model_kwargs)
            # Before the caller's and those of `top_p` and `top_k`, which might leave `<image_start>` alone.
            arguments = (config, generation_config.max_images, input_ids_seq_length, max_length)
            given.insert(0, ForbidImagesLogitsProcessor(*arguments))
            # The caller's processors read the logits of forced steps, too.
            model_kwargs |= {"has_readers": bool(logits_processor), "max_length_with_image": max_length}
        processors = super()._get_logits_processor(
            generation_config,
            input_ids_seq_length,
            *args,
            logits_processor=LogitsProcessorList(given),
            model_kwargs=model_kwargs,
            **kwargs,
        )
        if allows_images:
            force_image = generation_config.force_image
            processors.append(ForceImagesLogitsProcessor(config, force_image, input_ids_seq_length))
        return processors

    @property
    def _context(self) -> float:
        """The language model's context in tokens; models with ALiBi and state space models have no limit."""
        return getattr(self.config.text_config, "max_position_embeddings", None) or float("inf")

    def _max_length_with_image(
        self, generation_config, prompt_length, cache=None, inputs_embeds=None, attention_mask=None, **kwargs
    ) -> float:
        """Length of `input_ids` in which an image must fit: by `max_new_tokens`, the context and a static cache."""
        limits = [self._context]
        if cache is not None:
            lengths = [layer.get_max_length() for layer, slides in zip(cache.layers, cache.is_sliding) if not slides]
            limits += [length for length in lengths if length >= 0]
        # Tokens that are not in `input_ids`: embeddings, or those in a cache if the ids are those of new tokens alone.
        num_others = inputs_embeds.shape[1] if prompt_length == 0 and inputs_embeds is not None else 0
        if cache is not None:
            num_others = max(num_others, _get_mask_length(attention_mask, generation_config) - prompt_length)
        # The last token of an answer is never read, so the context and the cache hold one token more.
        return min(generation_config.max_length, min(limits) + 1 - num_others)

    # Overridden to hand the vision head's output to the next forward pass.
    def _update_model_kwargs_for_generation(self, outputs: ModelOutput, model_kwargs: dict, *args, **kwargs) -> dict:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if (state := model_kwargs.get("decoding_state")) is None:
            return model_kwargs
        if state.num_ahead:
            # transformers' loop adds one token per step, so the outputs of a pass are dealt out to its next steps.
            num_steps = state.num_ahead + 1
            logits = outputs.logits.expand(-1, num_steps, -1).split(1, dim=1)
            visual_tokens = outputs.next_visual_token[:, -num_steps:].split(1, dim=1)
            outputs.logits, outputs.next_visual_token = logits[0], visual_tokens[0]
            state.pending = [
                type(outputs)(logits=one, next_visual_token=other, cache=outputs.cache)
                for one, other in zip(logits[1:], visual_tokens[1:], strict=True)
            ]
            state.num_ahead = 0
        # A copy, since a step compiled to a CUDA graph writes over the outputs of the step before.
        state.visual_tokens.append(outputs.next_visual_token[:, -1:].clone())
        if self.config.visual_decoding == "autoregressive":
            # Without a cache the whole answer is read again, so all of its visual tokens are needed.
            steps = state.visual_tokens[-1:] if model_kwargs["use_cache"] else state.visual_tokens
            model_kwargs["generated_visual_tokens"] = torch.cat(steps, dim=1)
        return model_kwargs

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, next_sequence_length=None, **kwargs):
        """See [`~transformers.GenerationMixin.prepare_inputs_for_generation`]."""
        state = kwargs.pop("decoding_state", None)
        is_answer = state is not None and input_ids.shape[1] > state.prompt_length
        if is_answer and self.config.visual_decoding == "parallel":
            if state.pending:
                return {"precomputed_outputs": state.pending.pop(0)}
            state.num_ahead = num_ahead = self._count_steps_ahead(input_ids, state)
            if num_ahead:
                ahead = input_ids.new_full((len(input_ids), num_ahead), self.config.image_token_id)
                input_ids = torch.cat([input_ids, ahead], dim=1)
                if kwargs.get("attention_mask") is not None:
                    kwargs["attention_mask"] = torch.cat([kwargs["attention_mask"], torch.ones_like(ahead)], dim=1)
                if (positions := kwargs.get("position_ids")) is not None:
                    steps = torch.arange(1, num_ahead + 1, device=positions.device)
                    kwargs["position_ids"] = torch.cat([positions, positions[:, -1:] + steps], dim=1)
                if state.needs_logits:
                    kwargs["logits_to_keep"] = num_ahead + 1
                next_sequence_length = next_sequence_length and num_ahead + 1
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, next_sequence_length=next_sequence_length, **kwargs
        )
        if is_answer and self.config.visual_decoding == "parallel":
            indices = self._index_queries(input_ids[:, state.prompt_length :])
            # A copy, since a compiled step would be compiled again for a slice of another tensor's strides.
            indices = indices[:, -model_inputs["input_ids"].shape[1] :]
            model_inputs["query_indices"] = indices.clone(memory_format=torch.contiguous_format)
        return model_inputs

    def _index_queries(self, answers: torch.LongTensor) -> torch.LongTensor:
        """Return the index within its image of each image token in `answers` (B, G), which hold whole images."""
        return ((answers == self.config.image_token_id).cumsum(-1) - 1) % self.config.num_image_tokens

    def _count_steps_ahead(self, input_ids: torch.LongTensor, state: DecodingState) -> int:
        """Count the visual tokens that one pass can add, if all unfinished rows are at one position of an image."""
        if not state.allows_passes:
            return 0
        last, num_image_tokens = input_ids[:, -1], self.config.num_image_tokens
        is_visual, is_start = last == self.config.image_token_id, last == self.config.image_start_token_id
        num_left = num_image_tokens - 1 - self._index_queries(input_ids[:, state.prompt_length :])[:, -1]
        num_left = num_left.where(is_visual, 0).masked_fill(is_start, num_image_tokens)
        # The loop has just waited for the device to learn whether rows are unfinished, so this copy costs little.
        counts = {*num_left.masked_fill(torch.as_tensor(state.stopping_criteria.finished), -1).tolist()} - {-1}
        return counts.pop() if len(counts) == 1 else 0

    def _check_prompts(
        self,
        input_ids,
        generation_config,
        cache=None,
        inputs_embeds=None,
        attention_mask=None,
        mm_encoder_outputs=None,
        **kwargs,
    ) -> None:
        """Raise a ValueError for prompts that cannot be continued."""
        self.model.check_image_ids()
        if cache is not None and not generation_config.use_cache:
            raise ValueError("A `cache` is given, but `use_cache` is False: leave out the cache, or set it to True.")
        config, length = self.config, input_ids.shape[1]
        num_given = length if inputs_embeds is None else max(length, inputs_embeds.shape[1])
        if cache is not None:  # with one, the ids may be those of new tokens alone
            num_given = max(num_given, _get_mask_length(attention_mask, generation_config))
        if num_given == 0:
            raise ValueError("The prompt is empty: pass `input_ids` or `inputs_embeds` of at least one position.")
        if inputs_embeds is not None and inputs_embeds.shape[-1] != (width := config.text_config.hidden_size):
            raise ValueError(f"`inputs_embeds` has shape {tuple(inputs_embeds.shape)}, expected (B, S, {width}).")
        if num_given >= (limit := self._context):
            raise ValueError(f"The prompt has {num_given} tokens, but the model's context holds {limit}: shorten it.")
        unknown = input_ids[(input_ids < 0) | (input_ids >= (size := config.text_config.vocab_size))]
        if unknown.numel():
            found = unknown[0].item()
            raise ValueError(f"`input_ids` hold {found}, but the model has {size} token ids: use its own tokenizer.")
        is_visual = input_ids[:, -config.num_image_tokens :] == config.image_token_id
        is_partial = is_visual[:, -1:].any(-1) & (is_visual.sum(-1) < config.num_image_tokens)
        if is_partial.any():
            rows = is_partial.nonzero().flatten().tolist()
            raise ValueError(f"Prompts {rows} end inside an image: it takes {config.num_image_tokens} image tokens.")
        # The cache of a state space model does not say how much it has read.
        if not mm_encoder_outputs and (cache is None or not all(cache.is_linear)):
            num_read = 0 if cache is None or num_given > length else int(cache.get_seq_length())
            self.model.check_image_count(input_ids[:, num_read:] == config.image_token_id, 0)

    def _check_room(self, input_ids, generation_config, max_length: float) -> None:
        """Raise a ValueError if an image that is asked for does not fit, and warn if none can."""
        begun = (input_ids[:, -1:] == self.config.image_start_token_id).any(-1)
        is_begun, force_image = begun.any().item(), generation_config.force_image
        num_needed = self.config.num_image_tokens + (1 if begun.all() or (is_begun and not force_image) else 2)
        num_left = max_length - input_ids.shape[1]
        if num_left >= num_needed:
            return
        advice = f"shorten the prompt by {num_needed - num_left} tokens, or use a longer context or static cache"
        if max_length == generation_config.max_length:
            advice = f"pass max_new_tokens={num_needed} or more"
        sentence = f"An image takes {num_needed} more tokens, but only {num_left} fit after the prompt"
        if is_begun or force_image:
            raise ValueError(f"{sentence}: {advice}.")
        logger.warning("%s, so the answer will be text: %s, or max_images=0 for text only.", sentence, advice)

    # Overridden to keep the state of the steps, and to return visual tokens beside the ids.
    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        has_readers=False,
        max_length_with_image=None,
        **kwargs,
    ):
        self._check_prompts(input_ids, generation_config, **kwargs)
        allows_images, image_start = self._allows_images(generation_config), self.config.image_start_token_id
        stopping_criteria = TrackedStoppingCriteria(stopping_criteria)
        allows_passes = self._allows_passes(generation_config, **kwargs)
        needs_logits = has_readers or generation_config.output_logits
        state = DecodingState(input_ids.shape[1], stopping_criteria, allows_passes, needs_logits)
        if allows_images:
            self._check_room(input_ids, generation_config, max_length_with_image)
            kwargs["decoding_state"] = state
        if isinstance(kwargs.get("streamer"), MetaMorphStreamer):
            kwargs["streamer"].begin(state.visual_tokens)
        num_begun = (input_ids[:, -1:] == image_start).sum(-1) * allows_images
        outputs = super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
        sequences = outputs.sequences if isinstance(outputs, ModelOutput) else outputs
        answers = sequences[:, state.prompt_length :]
        is_visual = answers == self.config.image_token_id
        num_begun = num_begun + (answers == image_start).sum(-1)
        unfinished_images = is_visual.sum(-1) < num_begun * self.config.num_image_tokens
        if unfinished_images.any():
            logger.warning(
                "A stopping criterion ended rows %s inside an image, which is left out of `visual_tokens`.",
                unfinished_images.nonzero().flatten().tolist(),
            )
        # A criterion has ended the answer before the last token of a pass, which the cache has read.
        if state.pending and kwargs.get("cache") is not None:
            kwargs["cache"].crop(-len(state.pending))
        if not isinstance(outputs, ModelOutput):
            return outputs
        visual_tokens = self._gather_visual_tokens(state.visual_tokens, is_visual)
        return MetaMorphGenerateOutput(**outputs, visual_tokens=visual_tokens, unfinished_images=unfinished_images)

    def _allows_passes(self, generation_config, cache=None, synced_gpus=False, **kwargs) -> bool:
        """Return whether one pass may cover all steps of an image; each of these needs a step per token."""
        return not (
            synced_gpus  # all processes must run the same number of passes
            or generation_config.output_attentions
            or generation_config.output_hidden_states
            or (cache is not None and (any(cache.is_linear) or not cache.is_croppable))
        )

    def _gather_visual_tokens(self, steps: list[torch.Tensor], is_visual: torch.BoolTensor) -> list[torch.Tensor]:
        """Select each row's finished images (images, N, V) from the vision head's outputs (B, 1, V) of all steps."""
        num_image_tokens, head = self.config.num_image_tokens, next(self.vision_head.parameters())
        empty = torch.zeros(len(is_visual), 0, self.config.visual_token_dim, dtype=head.dtype, device=is_visual.device)
        # A device that stops one step late has computed one step more than there are new tokens.
        steps = torch.cat([empty, *(step.to(empty.device) for step in steps[: is_visual.shape[1]])], dim=1)
        gathered = []
        for row, mask in zip(steps, is_visual):
            tokens = row[mask[: len(row)]]
            tokens = tokens[: len(tokens) // num_image_tokens * num_image_tokens]
            gathered.append(tokens.unflatten(0, (-1, num_image_tokens)))
        return gathered
