"""Checks of the arguments of `generate()`, so that a wrong one is refused by its name.

Shapes: B rows, S sequence, I images, N visual tokens per image, V width of a visual token, D width of the language
model.
"""

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.generation import BaseStreamer
from transformers.utils import ModelOutput


TENSORS = "inputs input_ids attention_mask position_ids pixel_values inputs_embeds image_indices"
# transformers compares, counts and calls these without looking at them, so that a wrong one ends in its own code.
OPTION_TYPES = {
    "an integer": (
        Integral,
        "max_new_tokens min_new_tokens max_length min_length num_beams num_return_sequences top_k pad_token_id "
        "bos_token_id no_repeat_ngram_size encoder_no_repeat_ngram_size max_images prompt_lookup_num_tokens",
    ),
    "a number": (
        Real,
        "max_time temperature top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty "
        "length_penalty encoder_repetition_penalty guidance_scale",
    ),
    "True or False": (
        bool,
        "do_sample use_cache force_image output_scores output_logits output_attentions "
        "output_hidden_states return_dict_in_generate remove_invalid_values renormalize_logits",
    ),
    "a tensor": (torch.Tensor, TENSORS),
    "a list": (list, "logits_processor stopping_criteria suppress_tokens begin_suppress_tokens bad_words_ids"),
    "a dictionary": (Mapping, "mm_encoder_outputs"),
    "a string": (str, "cache_implementation"),
    "a GenerationConfig": (GenerationConfig, "generation_config"),
    "a streamer": (BaseStreamer, "streamer"),
    "a Cache": (Cache, "cache"),
}
TOKEN_IDS = ("eos_token_id", "suppress_tokens", "begin_suppress_tokens")


def check_types(options: Mapping[str, Any]) -> None:
    """Raise a ValueError for an option of `generate()` that has another type than in `OPTION_TYPES`."""
    for expected, (kind, names) in OPTION_TYPES.items():
        for name in names.split():
            value = options.get(name)
            is_bool = kind is Integral and isinstance(value, bool)
            if value is not None and (is_bool or not isinstance(value, kind)):
                raise ValueError(f"`{name}` is {value!r:.100}, but must be {expected}.")
            if kind in (Integral, Real) and value is not None and not abs(value) < 2**63:
                raise ValueError(f"`{name}` is {value}, but must be a finite number of at most 64 bits.")
            if kind is torch.Tensor and value is not None and not value.isfinite().all():
                raise ValueError(f"`{name}` has NaN or infinite values, but all must be finite.")
            is_functions = name in ("logits_processor", "stopping_criteria")
            if is_functions and not all(callable(function) for function in value or ()):
                raise ValueError(f"`{name}` is {value!r:.100}, but must be a list of functions.")
    for name in TOKEN_IDS:
        ids = options.get(name)
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
        listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(isinstance(token, Integral) and abs(token) < 2**63 for token in listed):
            raise ValueError(f"`{name}` is {ids!r:.100}, but must be token ids.")
    for name in ("bad_words_ids", "sequence_bias"):
        words = options.get(name)
        if isinstance(words, list) and not all(isinstance(word, list) for word in words):
            raise ValueError(f"`{name}` is {words!r:.100}, but must be a list of lists.")
    if options.get("mm_encoder_outputs") and not isinstance(options["mm_encoder_outputs"].get("image"), ModelOutput):
        raise ValueError("`mm_encoder_outputs` must have an entry `image`, the output of `get_image_features`.")
    ids, length = options.get("input_ids", options.get("inputs")), None
    if ids is not None and (ids.ndim != 2 or ids.is_floating_point()):
        raise ValueError(f"`input_ids` has shape {tuple(ids.shape)} and dtype {ids.dtype}, expected (B, S) and int64.")
    length = ids.shape[1] if ids is not None and ids.shape[1] else None
    embeds = options.get("inputs_embeds")
    if embeds is not None and (embeds.ndim != 3 or not embeds.is_floating_point()):
        raise ValueError(f"`inputs_embeds` has shape {tuple(embeds.shape)}, expected floats of shape (B, S, D).")
    for name in ("attention_mask", "position_ids"):
        tensor = options.get(name)
        if tensor is not None and length is not None and (tensor.ndim < 2 or tensor.shape[-1] != length):
            raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}, but `input_ids` has {tuple(ids.shape)}.")


def check_image_indices(indices: torch.Tensor, num_images: int) -> None:
    """Raise a ValueError unless `image_indices` (I,) are indices of the images, pixels or visual tokens."""
    is_valid = indices.ndim == 1 and not indices.is_floating_point()
    if not is_valid or not ((indices >= 0) & (indices < num_images)).all():
        raise ValueError(f"`image_indices` is {indices!r:.100}, but must be integers below {num_images}, the images.")


def join_visual_tokens(visual_tokens: Any) -> torch.Tensor:
    """
    Join visual tokens, a tensor or array (I, N, V) or a list of them for each row, into one tensor (I, N, V).

    Raises:
        ValueError: if they are something else, or have NaN or infinite values.
    """
    try:
        if isinstance(visual_tokens, (list, tuple)):
            visual_tokens = torch.cat([torch.as_tensor(tokens) for tokens in visual_tokens])
        visual_tokens = torch.as_tensor(visual_tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        sentence = "`visual_tokens` must be a tensor or an array of shape (images, N, V), or a list of them"
        raise ValueError(f"{sentence}: {error}") from error
    if not visual_tokens.is_floating_point() or not visual_tokens.isfinite().all():
        raise ValueError("`visual_tokens` must be floating-point numbers, none of them NaN or infinite.")
    return visual_tokens
