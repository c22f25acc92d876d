"""Batches of conversations with images, and a report of the samples that cannot be used.

Shapes: B batch, S sequence, I different images of the batch, N visual tokens per image, V their width.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import PIL.Image
import torch
from torch.nn.utils.rnn import pad_sequence

from ..data.formats import BadSample
from ..image_reading import ImageReadError, read_image
from ..processing_metamorph import MetaMorphProcessor


ROLES = ("system", "user", "assistant", "tool")


@dataclass
class DataCollatorForVPiT:
    r"""
    Collates conversations with images in any turn into a padded batch. Its `labels` are the ids of assistant turns,
    including `image_token_id` for their images, and -100 elsewhere.

    Each example has `messages` in the standard chat form, and for each image part, in reading order, either an image
    (anything that [`read_image`] reads, in a list `images`, as a single `image`, or in the parts themselves,
    `{"type": "image", "image": ...}`) or its `visual_tokens` of shape (N, V) from `model.get_visual_tokens`, which
    spares the vision tower. Optional `id`, `source` and `task` name the example in messages. Images are decoded here,
    in the workers, and one that occurs several times in a batch (the same path or object) only once.

    Returns a dictionary with `input_ids`, `attention_mask` and `labels` of shape (B, S); `pixel_values` of shape
    (I, 3, H, W), with `image_indices` if images repeat, or `visual_tokens` of shape (I, N, V); `sample_ids`; and
    `rejected`, if there are any: a dictionary with `sample`, `task`, `reason` and `kind` for each example that was
    `"skipped"` or `"shortened"`. A batch of skipped examples alone holds one token without a target.

    Args:
        processor (`MetaMorphProcessor`): Its chat template needs `{% generation %}` marks.
        max_length (`int`, *optional*): Number of tokens of the longest conversation.
        on_bad_sample (`str`, *optional*, defaults to `"raise"`):
            `"raise"` raises an error that names the example; `"skip"` leaves it out and reports it in `rejected`.
        on_too_long (`str`, *optional*, defaults to `"refuse"`):
            `"refuse"` treats a conversation longer than `max_length` as a bad sample; `"drop_turns"` drops whole
            turns, with their images, from its end until it ends with an answer and fits.

    Raises:
        ValueError: If the chat template has no `{% generation %}` marks.
        BadSample: If an image cannot be read, roles, contents or the number of images are wrong, there is no answer or
            an empty one, or the conversation is too long.
    """

    processor: MetaMorphProcessor
    max_length: int | None = None
    on_bad_sample: Literal["raise", "skip"] = "raise"
    on_too_long: Literal["refuse", "drop_turns"] = "refuse"

    def __post_init__(self):
        processor = self.processor
        if not re.search(r"\{%-?\s*generation\b", str(processor.chat_template)):
            raise ValueError(
                "The processor's chat template has no {% generation %} marks, so nothing would be learned: put them "
                "around the assistant's text (metamorph_hf.processing_metamorph.DEFAULT_CHAT_TEMPLATE has them)."
            )
        text = processor.replace_image_token()
        self._image_ids = torch.tensor(processor.tokenizer(text, add_special_tokens=False).input_ids)
        ids = (processor.image_token_id, processor.image_start_token_id, processor.image_end_token_id)
        self._image_words = tuple(processor.tokenizer.convert_ids_to_tokens(ids))

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows, sample_ids, rejected = [], [], []
        images: dict[str | int, PIL.Image.Image] = {}
        for index, example in enumerate(examples):
            source = f" of {example['source']}" if example.get("source") is not None else ""
            name = f"Example {f'{index} of the batch' if example.get('id') is None else example['id']}{source}"
            report = {"sample": name, "task": example.get("task")}
            try:
                row, num_dropped = self._encode(example, images)
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
        pad_id = self.processor.tokenizer.pad_token_id
        if not rows:
            rows = [{"input_ids": torch.tensor([pad_id]), "labels": torch.tensor([-100]), "keys": [], "tokens": []}]
        batch = {
            "input_ids": pad_sequence([row["input_ids"] for row in rows], True, pad_id),
            "attention_mask": pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], True),
            "labels": pad_sequence([row["labels"] for row in rows], True, -100),
            "sample_ids": sample_ids,
        }
        if rejected:
            batch["rejected"] = rejected
        keys = [key for row in rows for key in row["keys"]]
        visual_tokens = [torch.as_tensor(tokens) for row in rows for tokens in row["tokens"]]
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

    def _encode(self, example: dict[str, Any], images: dict[str | int, PIL.Image.Image]) -> tuple[dict[str, Any], int]:
        """Return the row and the number of messages dropped from its end. Adds images that are new to the batch."""
        if example.get("bad") is not None:  # its source's row could not be made into a conversation
            raise BadSample(example["bad"])
        messages, within = self._check_messages(example.get("messages"))
        has_tokens = "visual_tokens" in example
        given = example["visual_tokens"] if has_tokens else example.get("images")
        if given is None:
            given = within if example.get("image") is None else [example["image"]]
        elif not has_tokens and not isinstance(given, (list, tuple)):
            raise BadSample(f"has `images` of type {type(given).__name__}, expected a list of images.")
        if len(given) != (count := count_images(messages)):
            raise BadSample(f"has {count} image parts in its messages, but {len(given)} images.")
        input_ids, labels = self._tokenize(messages)
        num_messages = len(messages)
        while self.max_length is not None and len(input_ids) > self.max_length:
            answers = [index for index, message in enumerate(messages[:-1]) if message["role"] == "assistant"]
            if self.on_too_long == "refuse" or not answers:
                raise BadSample(
                    f"has {len(input_ids)} tokens, more than max_length={self.max_length}. Shorten it, leave it out, "
                    "or raise max_length: cutting it could cut through an image."
                )
            messages = messages[: answers[-1] + 1]
            input_ids, labels = self._tokenize(messages)
        given = given[: count_images(messages)]
        row = {"input_ids": input_ids, "labels": labels, "keys": [], "tokens": given if has_tokens else []}
        for index, image in enumerate([] if has_tokens else given):
            key = str(image) if isinstance(image, (str, Path)) else id(image)
            if key not in images:
                try:
                    images[key] = read_image(image)
                except ImageReadError as error:
                    raise BadSample(f"has a bad image at index {index}. {error}") from error
            row["keys"].append(key)
        return row, num_messages - len(messages)

    def _tokenize(self, messages: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and labels, with each image expanded to its N + 2 tokens."""
        try:
            encoded = self.processor.tokenizer.apply_chat_template(
                messages,
                chat_template=self.processor.chat_template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except jinja2.TemplateError as error:
            raise BadSample(f"does not fit the chat template: {error}") from error
        ids, learned = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["assistant_masks"]).bool()
        is_image = ids == self.processor.image_token_id
        repeats = torch.where(is_image, len(self._image_ids), 1)
        input_ids = ids.repeat_interleave(repeats)
        input_ids[is_image.repeat_interleave(repeats)] = self._image_ids.repeat(int(is_image.sum()))
        return input_ids, input_ids.where(learned.repeat_interleave(repeats), -100)

    def _check_messages(self, messages: Any) -> tuple[list[dict[str, Any]], list]:
        """Return the messages without the keys that Arrow adds to make parts alike, and the images in their parts."""
        if not isinstance(messages, list) or not messages:
            raise BadSample("has no messages.")
        checked, images = [], []
        for message in messages:
            role = message.get("role") if isinstance(message, Mapping) else None
            if role not in ROLES:
                raise BadSample(f"has a message of role {role!r}, expected one of {', '.join(ROLES)}.")
            content = message.get("content")
            if not isinstance(content, (str, list)):
                raise BadSample(f"has a message whose content is {type(content).__name__}, expected text or parts.")
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            parts = [self._check_part(part, images) for part in parts]
            if role == "assistant" and not any(part["type"] == "image" or part["text"].strip() for part in parts):
                raise BadSample("has an empty answer.")
            checked.append({"role": role, "content": content if isinstance(content, str) else parts})
        if all(message["role"] != "assistant" for message in checked):
            raise BadSample("has no answer: without an assistant message there is nothing to learn.")
        return checked, images

    def _check_part(self, part: Any, images: list) -> dict[str, str]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            images += [] if part.get("image") is None else [part["image"]]
            return {"type": "image"}
        if kind != "text" or not isinstance(part.get("text"), str):
            raise BadSample(f"has a content part that is neither text nor an image: {str(part)[:100]}.")
        try:
            part["text"].encode()
        except UnicodeEncodeError as error:
            raise BadSample(f"has a text that is not valid Unicode: {error}") from error
        if found := [word for word in self._image_words if word in part["text"]]:
            raise BadSample(f'has {found[0]} in a text: images are parts of their own, {{"type": "image"}}.')
        return {"type": "text", "text": part["text"]}


def count_images(messages: list[dict[str, Any]]) -> int:
    parts = (part for message in messages if isinstance(message["content"], list) for part in message["content"])
    return sum(part["type"] == "image" for part in parts)


__all__ = ["DataCollatorForVPiT"]
