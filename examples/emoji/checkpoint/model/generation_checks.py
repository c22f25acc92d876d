"""Checks of the arguments of `generate()`, which transformers compares, counts and calls without looking at them."""

from collections.abc import Callable, Mapping
from numbers import Integral, Real
from types import FunctionType
from typing import Any

import torch
from huggingface_hub.dataclasses import type_validator
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.generation import BaseStreamer
from transformers.utils import ModelOutput


# The types of options, in words and as annotations, and the names of the options.
OPTION_TYPES = {
    "an integer": (
        Integral,
        "max_new_tokens min_new_tokens max_length min_length num_beams num_return_sequences top_k pad_token_id "
        "bos_token_id no_repeat_ngram_size encoder_no_repeat_ngram_size max_images prompt_lookup_num_tokens",
    ),
    "a finite number": (
        Real,
        "max_time temperature top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty "
        "length_penalty encoder_repetition_penalty guidance_scale",
    ),
    "True or False": (
        bool,
        "do_sample use_cache force_image output_scores output_logits output_attentions "
        "output_hidden_states return_dict_in_generate remove_invalid_values renormalize_logits",
    ),
    "a tensor of finite values": (
        torch.Tensor,
        "inputs input_ids attention_mask position_ids pixel_values inputs_embeds image_indices",
    ),
    "a list of functions": (list[Callable], "logits_processor stopping_criteria"),
    "token ids": (Integral | list[Integral] | torch.Tensor, "eos_token_id"),
    "a list of token ids": (list[Integral], "suppress_tokens begin_suppress_tokens"),
    "a list of lists": (list[list], "bad_words_ids"),
    "a dictionary or a list of lists": (dict | list[list], "sequence_bias"),
    "a dictionary of outputs": (dict[str, ModelOutput], "mm_encoder_outputs"),
    "a string": (str, "cache_implementation"),
    "a GenerationConfig": (GenerationConfig, "generation_config"),
    "a streamer": (BaseStreamer, "streamer"),
    "a Cache": (Cache, "cache"),
}


def is_count(value: Any) -> bool:
    """Return whether a value is an integer of at least 1."""
    return isinstance(value, Integral) and value >= 1


def _has_type(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type, or meets a condition. Numbers must be finite and fit into 64 bits."""
    if isinstance(kind, FunctionType):
        return kind(value)
    try:
        type_validator("value", value, kind)
    except TypeError:
        return False
    if isinstance(value, torch.Tensor):
        return bool(value.isfinite().all())
    is_bool = kind is Integral and isinstance(value, bool)  # which Python counts as an integer
    return not is_bool and (abs(value) < 2**63 if isinstance(value, Real) else True)


def check_types(options: Mapping[str, Any], types: dict[str, tuple[Any, str]]) -> None:
    """Raise a ValueError for an option that has another type than in a table such as `OPTION_TYPES`."""
    for expected, (kind, names) in types.items():
        for name in names.split():
            value = options.get(name)
            if value is not None and not _has_type(value, kind):
                raise ValueError(f"`{name}` is {value!r:.100}, but must be {expected}.")


def check_options(options: Mapping[str, Any]) -> None:
    """Raise a ValueError for an option of `generate()` of a wrong type or shape."""
    check_types(options, OPTION_TYPES)
    ids, embeds = options.get("input_ids", options.get("inputs")), options.get("inputs_embeds")
    if ids is not None and (ids.ndim != 2 or ids.is_floating_point()):
        raise ValueError(f"`input_ids` has shape {tuple(ids.shape)} and dtype {ids.dtype}, expected (B, S) and int64.")
    if embeds is not None and (embeds.ndim != 3 or not embeds.is_floating_point()):
        raise ValueError(f"`inputs_embeds` has shape {tuple(embeds.shape)}, expected floats of shape (B, S, D).")
    for name in ("attention_mask", "position_ids"):
        tensor = options.get(name)
        if tensor is None or ids is None or not ids.numel():
            continue
        length = tensor.shape[-1] if tensor.ndim > 1 else 0
        # With a cache, the ids may be those of the new tokens alone, beside the mask of all tokens.
        is_longer = name == "attention_mask" and options.get("cache") is not None and length > ids.shape[1]
        if length != ids.shape[1] and not is_longer:
            raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}, but `input_ids` has {tuple(ids.shape)}.")


def check_image_indices(indices: torch.Tensor, num_images: int) -> None:
    """Raise a ValueError unless `image_indices` (I,) are indices of the images, pixels or visual tokens."""
    is_valid = indices.ndim == 1 and not indices.is_floating_point()
    if not is_valid or not ((indices >= 0) & (indices < num_images)).all():
        raise ValueError(f"`image_indices` is {indices!r:.100}, but must be integers below {num_images}, the images.")


def join_visual_tokens(visual_tokens: Any) -> torch.Tensor:
    """Return visual tokens (I, N, V), or a list of (images, N, V) or (N, V), as one tensor, or raise a ValueError."""
    try:
        if isinstance(visual_tokens, (list, tuple)):
            rows = [torch.as_tensor(row) for row in visual_tokens]
            visual_tokens = torch.cat([row[None] if row.ndim == 2 else row for row in rows])
        visual_tokens = torch.as_tensor(visual_tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`visual_tokens` must be a tensor, an array or a list of them: {error}") from error
    if not visual_tokens.is_floating_point() or not visual_tokens.isfinite().all():
        raise ValueError("`visual_tokens` must be floating-point numbers, none of them NaN or infinite.")
    return visual_tokens
