"""Batches of conversations with images, and a report of the samples that cannot be used.

Shapes: B batch, S sequence, I different images of the batch, N visual tokens per image, V their width.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.utils.chat_template_utils import render_jinja_template
from trl.trainer.utils import remove_none_values

from ..data.formats import BadSample, count_images, extract_images, text_part
from ..image_reading import read_image
from ..processing_metamorph import MetaMorphProcessor, normalize_message


logger = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant", "tool")


@dataclass
class DataCollatorForVPiT:
    r"""
    Collates conversations with images in any turn into a padded batch. Its `labels` are the ids of assistant turns,
    including `image_token_id` for their images, and -100 elsewhere.

    Each example has `messages` in the standard chat form (`tools` and `tool_calls` go to the chat template), and for
    each image part, in reading order, either an image (anything that [`read_image`] reads, in a list `images`, as a
    single `image`, or in the parts themselves, also in the form of OpenAI's APIs) or its `visual_tokens` of shape
    (N, V) from `model.get_visual_tokens`, which spares the vision tower. Optional `id`, `source` and `task` name the
    example in messages. An image that occurs several times in a batch (the same path or object) is decoded only once.

    Returns a dictionary with `input_ids`, `attention_mask` and `labels` of shape (B, S); `pixel_values` of shape
    (I, 3, H, W), with `image_indices` if images repeat, or `visual_tokens` of shape (I, N, V); `sample_ids`; and
    `rejected`, if there are any: a dictionary with `sample`, `task`, `reason` and `kind` for each example that was
    `"skipped"` or `"shortened"`. A batch of skipped examples alone holds one token without a target.

    Args:
        processor (`MetaMorphProcessor`): Its chat template (of several, the one named default) needs
            `{% generation %}` marks around answers. An EOS token right after them is a target, too.
        max_length (`int`, *optional*): Number of tokens of the longest conversation.
        on_bad_sample (`str`, *optional*, defaults to `"raise"`): `"raise"` raises an error that names the example;
            `"skip"` leaves it out and reports it in `rejected`.
        on_too_long (`str`, *optional*, defaults to `"refuse"`): `"refuse"` treats a conversation longer than
            `max_length` as a bad sample; `"drop_turns"` drops whole turns from its end until it fits.

    Raises:
        ValueError: If the chat template has no `{% generation %}` marks, or the tokenizer no token to pad with.
        BadSample: If an example cannot be trained on.
    """

    processor: MetaMorphProcessor
    max_length: int | None = None
    on_bad_sample: Literal["raise", "skip"] = "raise"
    on_too_long: Literal["refuse", "drop_turns"] = "refuse"

    def __post_init__(self):
        processor, template = self.processor, self.processor.chat_template
        self._template = template["default"] if isinstance(template, Mapping) and "default" in template else template
        if not re.search(r"\{%-?\s*generation\b", str(self._template)):
            raise ValueError(
                "The processor's chat template has no {% generation %} marks, so nothing would be learned: put them "
                "around the assistant's text (metamorph_hf.processing_metamorph.DEFAULT_CHAT_TEMPLATE has them)."
            )
        tokenizer = processor.tokenizer
        # The padding id, or the EOS id as in TRL: the attention mask hides it.
        self._pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if self._pad_id is None:
            raise ValueError("The tokenizer has neither a pad_token nor an eos_token: set its pad_token.")
        image = tokenizer(processor.replace_image_token(), add_special_tokens=False)
        self._image_ids = torch.tensor(image.input_ids)
        try:
            probe = [{"role": role, "content": "Hi"} for role in ("user", "assistant", "user")]
            labels = self._tokenize(probe, None)[1]
        except BadSample:  # the template takes other conversations than this one
            return
        targets = [target for target in labels[labels != -100].tolist() if tokenizer.decode([target]).strip()]
        if not {tokenizer.eos_token_id, *tokenizer.get_added_vocab().values()} & set(targets[-1:]):
            logger.warning(
                "The chat template's {% generation %} marks leave out the token that ends an answer, so the model "
                "would not learn to stop: close the marks after it."
            )

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows, sample_ids, rejected = [], [], []
        images: dict[str | int, PIL.Image.Image] = {}
        for index, example in enumerate(examples):
            if not isinstance(example, Mapping):
                raise TypeError(f"Example {index} of the batch is {type(example).__name__}, expected a dictionary.")
            source = f" of {example['source']}" if example.get("source") is not None else ""
            name = f"Example {f'{index} of the batch' if example.get('id') is None else example['id']}{source}"
            report = {"sample": name, "task": example.get("task")}
            try:
                *row, num_dropped = self._encode(example, images)
            except BadSample as error:
                if self.on_bad_sample == "raise":
                    raise BadSample(f"{name} {error}") from error
                rejected.append({**report, "kind": "skipped", "reason": str(error)})
                continue
            if num_dropped:
                reason = f"{num_dropped} messages dropped to keep to {self.max_length} tokens"
                rejected.append({**report, "kind": "shortened", "reason": reason})
            rows.append(row)
            sample_ids.append(name)
        rows = rows or [(torch.tensor([self._pad_id]), torch.tensor([-100]), [], [])]
        input_ids, labels, keys, visual_tokens = zip(*rows)
        batch = {
            "input_ids": pad_sequence(input_ids, True, self._pad_id),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], True),
            "labels": pad_sequence(labels, True, -100),
            "sample_ids": sample_ids,
        }
        if rejected:
            batch["rejected"] = rejected
        keys, visual_tokens = list(chain(*keys)), list(chain(*visual_tokens))
        if keys and visual_tokens:
            raise ValueError("Some examples of the batch have images, others `visual_tokens`: use one of the two.")
        if visual_tokens:
            batch["visual_tokens"] = torch.stack(visual_tokens)
        if keys:
            unique = list(dict.fromkeys(keys))
            pixels = self.processor.image_processor([images[key] for key in unique], return_tensors="pt")
            batch["pixel_values"] = pixels["pixel_values"]
            if len(unique) < len(keys):
                batch["image_indices"] = torch.tensor([unique.index(key) for key in keys])
        return batch

    def _encode(self, example: dict[str, Any], images: dict[str | int, PIL.Image.Image]) -> tuple:
        """
        Return ids, labels, keys of images, visual tokens, and the number of messages dropped from the end. Adds images
        that are new to the batch to `images`.
        """
        if example.get("bad") is not None:  # its source's row could not be made into a conversation
            raise BadSample(example["bad"])
        messages, within = self._check_messages(example.get("messages"))
        tools = example.get("tools")
        try:
            tools = remove_none_values(json.loads(tools) if isinstance(tools, str) else tools or [])
        except (TypeError, ValueError) as error:
            raise BadSample(f"has tools that are not a list or the JSON of one: {error}") from error
        column = "visual_tokens" if "visual_tokens" in example else "images"
        given = example.get(column)
        if given is None and column == "images":
            given = within if example.get("image") is None else [example["image"]]
        if isinstance(given, (np.ndarray, torch.Tensor)) and given.ndim:
            given = list(given)
        if not isinstance(given, (list, tuple)):
            raise BadSample(f"has `{column}` of type {type(given).__name__}, expected a list.")
        if len(given) != (count := count_images(messages)):
            raise BadSample(f"has {count} image parts in its messages, but {len(given)} images.")
        input_ids, labels = self._tokenize(messages, tools)
        num_messages = len(messages)
        while self.max_length is not None and len(input_ids) > self.max_length:
            answers = [index for index, message in enumerate(messages[:-1]) if message["role"] == "assistant"]
            if self.on_too_long == "refuse" or not answers:
                raise BadSample(
                    f"has {len(input_ids)} tokens, more than max_length={self.max_length}. Shorten it, leave it out, "
                    "or raise max_length: cutting it could cut through an image."
                )
            messages = messages[: answers[-1] + 1]
            input_ids, labels = self._tokenize(messages, tools)
        keys, visual_tokens = [], []
        for index, image in enumerate(given[: count_images(messages)]):
            try:
                if column == "visual_tokens":
                    visual_tokens.append(torch.as_tensor(image))
                    shape, num_tokens = tuple(visual_tokens[-1].shape), self.processor.num_image_tokens
                    if shape[:-1] != (num_tokens,):
                        raise ValueError(f"Its visual tokens have the shape {shape}, expected ({num_tokens}, V).")
                else:
                    keys.append(str(image) if isinstance(image, (str, Path)) else id(image))
                    images[keys[-1]] = images[keys[-1]] if keys[-1] in images else read_image(image)
            except (TypeError, ValueError, RuntimeError) as error:
                raise BadSample(f"has a bad image (`{column}`, index {index}). {error}") from error
        return input_ids, labels, keys, visual_tokens, num_messages - len(messages)

    def _tokenize(self, messages: list[dict[str, Any]], tools: list | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and labels, with each image expanded to its N + 2 tokens."""
        tokenizer, image_id = self.processor.tokenizer, self.processor.image_token_id
        try:
            if tokenizer.is_fast:
                options = {"chat_template": self._template, "return_dict": True, "return_assistant_tokens_mask": True}
                encoded = tokenizer.apply_chat_template(messages, tools=tools or None, **options)
                ids, learned = encoded["input_ids"], encoded["assistant_masks"]
            else:
                ids, learned = self._tokenize_in_pieces(messages, tools)
        except Exception as error:  # a template raises anything for values that it does not expect
            raise BadSample(f"does not fit the chat template: {error}") from error
        ids, learned = torch.tensor(ids), torch.tensor(learned).bool()
        is_image = ids == image_id
        stray = torch.isin(ids, self._image_ids[self._image_ids != image_id])
        if stray.any() or is_image.sum() > count_images(messages):
            word = tokenizer.convert_ids_to_tokens(int(ids[stray][0]) if stray.any() else image_id)
            raise BadSample(f'has {word} in a text: images are parts of their own, {{"type": "image"}}.')
        if is_image.sum() < count_images(messages):
            raise BadSample(f"has {count_images(messages)} images, but the chat template writes {is_image.sum()}.")
        learned[1:] |= learned[:-1] & (ids[1:] == tokenizer.eos_token_id) & (ids[:-1] != tokenizer.eos_token_id)
        repeats = torch.where(is_image, len(self._image_ids), 1)
        input_ids = ids.repeat_interleave(repeats)
        input_ids[is_image.repeat_interleave(repeats)] = self._image_ids.repeat(int(is_image.sum()))
        return input_ids, input_ids.where(learned.repeat_interleave(repeats), -100)

    def _tokenize_in_pieces(self, messages: list[dict[str, Any]], tools: list | None) -> tuple[list[int], list[bool]]:
        """Return ids, and which are of answers, by a slow tokenizer, which does not know the places of its tokens."""
        tokenizer = self.processor.tokenizer
        options = {"chat_template": self._template, "return_assistant_tokens_mask": True}
        options |= tokenizer.special_tokens_map
        (text,), (spans,) = render_jinja_template([messages], tools or None, **options)
        ids, learned = [], []
        edges = sorted({0, len(text), *chain.from_iterable(spans)})
        for start, end in zip(edges, edges[1:]):
            piece = tokenizer(text[start:end], add_special_tokens=False).input_ids
            ids += piece
            learned += [any(first <= start and end <= last for first, last in spans)] * len(piece)
        if ids != tokenizer(text, add_special_tokens=False).input_ids:
            raise ValueError("this slow tokenizer joins the edges of answers and prompts. Use a fast tokenizer")
        return ids, learned

    @staticmethod
    def _check_messages(messages: Any) -> tuple[list[dict[str, Any]], list]:
        """Return the messages without the empty keys that Arrow adds, and the images that stand in their parts."""
        if not isinstance(messages, list) or not messages:
            raise BadSample("has no messages.")
        messages, images = extract_images(messages)
        for index, message in enumerate(messages):
            try:
                message = normalize_message(remove_none_values(message))
            except (TypeError, ValueError) as error:
                raise BadSample(f"has a bad message (index {index}). {error}") from error
            role, content, calls_tools = message["role"], message.get("content", ""), bool(message.get("tool_calls"))
            if role not in ROLES:
                raise BadSample(f"has a message of role {role!r}, expected one of {', '.join(ROLES)}.")
            parts = [text_part(content)] if isinstance(content, str) else content
            is_empty = not any(part.get("text", "image").strip() for part in parts)
            if role == "assistant" and is_empty and not calls_tools:
                raise BadSample("has an empty answer.")
            messages[index] = {**message, "content": content}
        if all(message["role"] != "assistant" for message in messages):
            raise BadSample("has no answer: without an assistant message there is nothing to learn.")
        return messages, images


__all__ = ["DataCollatorForVPiT"]
