"""From conversations with images to batches, and what to do about those that cannot be used.

N visual tokens per image, V width of a visual token.
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

from ..image_reading import BadSample, read_image
from ..processing_metamorph import MetaMorphProcessor


ROLES = ("system", "user", "assistant", "tool")


@dataclass
class DataCollatorForVPiT:
    r"""
    Conversations with images in any turn to a padded batch whose `labels` say everything: assistant turns are targets,
    their images (`image_token_id`) included, all else is -100.

    Each example has `messages` in the standard chat form and, one per image part and in reading order, either `images`
    (anything that [`read_image`] reads; also within the parts, `{"type": "image", "image": ...}`, or a single one as
    `image`) or `visual_tokens` (of shape (N, V) each, from `model.get_visual_tokens`, so that the tower need not run).
    `id`, `source` and `task` name it in messages. Images are decoded here, in the
    workers, and one that a batch holds several times (the same path or object) is decoded and encoded once.

    The batch holds, beside the model's inputs, `sample_ids` and, if there are any, `rejected`: a dictionary with
    `sample`, `task` and `reason` for each example that was left out (`kind` "skipped") or shortened ("shortened").

    Args:
        processor (`MetaMorphProcessor`): Its chat template needs `{% generation %}` marks.
        max_length (`int`, *optional*): Longest conversation in tokens.
        on_bad_sample (`str`, *optional*, defaults to `"raise"`):
            `"raise"` stops and names the example; `"skip"` leaves it out of the batch and says so in `rejected`. A
            batch that nothing is left of holds one token and no target.
        on_too_long (`str`, *optional*, defaults to `"refuse"`):
            `"refuse"` takes a conversation longer than `max_length` for a bad sample; `"drop_turns"` drops as many of
            its last turns, whole and with their images, as it takes to end with an answer within `max_length`.

    Raises:
        BadSample: see [`read_image`], and if roles, content or counts of images are not as they must be, there is no
            answer or an empty one, or the conversation is too long.
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
                "around what the assistant writes (metamorph_hf.processing_metamorph.DEFAULT_CHAT_TEMPLATE has them)."
            )
        text = processor.replace_image_token()
        self._image_ids = torch.tensor(processor.tokenizer(text, add_special_tokens=False).input_ids)
        ids = (processor.image_token_id, processor.image_start_token_id, processor.image_end_token_id)
        self._image_words = tuple(processor.tokenizer.convert_ids_to_tokens(ids))

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows, names, rejected = [], [], []
        images: dict[str | int, PIL.Image.Image] = {}
        for place, example in enumerate(examples):
            name = self._name(example, place)
            about = {"sample": name, "task": example.get("task")}
            try:
                row, dropped = self._encode(example, images)
            except BadSample as error:
                if self.on_bad_sample == "raise":
                    raise BadSample(f"{name} {error}") from error
                rejected.append({**about, "kind": "skipped", "reason": str(error)})
                continue
            if dropped:
                reason = f"{dropped} messages dropped to keep to {self.max_length} tokens"
                rejected.append({**about, "kind": "shortened", "reason": reason})
            rows.append(row)
            names.append(name)
        if not rows:
            pad = torch.tensor([self.processor.tokenizer.pad_token_id])
            rows.append({"input_ids": pad, "labels": torch.full_like(pad, -100), "keys": [], "visual_tokens": []})
        if any(row["keys"] for row in rows) and any(len(row["visual_tokens"]) for row in rows):
            raise ValueError("Some examples of the batch bring `images`, others `visual_tokens`: use one of the two.")

        batch = {
            "input_ids": self._pad(rows, "input_ids", self.processor.tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True),
            "labels": self._pad(rows, "labels", -100),
            "sample_ids": names,
        }
        if rejected:
            batch["rejected"] = rejected
        visual_tokens = [torch.as_tensor(tokens) for row in rows for tokens in row["visual_tokens"]]
        if visual_tokens:
            batch["visual_tokens"] = torch.stack(visual_tokens)
        keys = [key for row in rows for key in row["keys"]]
        if keys:
            used = list(dict.fromkeys(keys))
            pixels = self.processor.image_processor([images[key] for key in used], return_tensors="pt")
            batch["pixel_values"] = pixels["pixel_values"]
            if len(used) < len(keys):
                batch["image_indices"] = torch.tensor([used.index(key) for key in keys])
        return batch

    @staticmethod
    def _pad(rows: list[dict[str, Any]], name: str, value: int) -> torch.Tensor:
        return pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)

    @staticmethod
    def _name(example: dict[str, Any], place: int) -> str:
        source = f" of {example['source']}" if example.get("source") is not None else ""
        return f"Example {f'{place} of the batch' if example.get('id') is None else example['id']}{source}"

    def _encode(self, example: dict[str, Any], images: dict[str | int, PIL.Image.Image]) -> tuple[dict[str, Any], int]:
        """The row, and how many messages were dropped from the end. Images that are new to the batch are added."""
        if example.get("bad") is not None:  # it could not even be made into a conversation
            raise BadSample(example["bad"])
        messages = self._checked(example.get("messages"))
        has_tokens = "visual_tokens" in example
        given = example["visual_tokens"] if has_tokens else self._given_images(example)
        given = [] if given is None else given
        num_parts = self._count_images(messages)
        if len(given) != num_parts:
            raise BadSample(f"has {num_parts} image parts in its messages, but {len(given)} images.")
        input_ids, labels = self._tokenize(messages)
        dropped = 0
        while self.max_length is not None and len(input_ids) > self.max_length:
            shorter = messages[:-1]
            while shorter and shorter[-1]["role"] != "assistant":
                shorter = shorter[:-1]
            if self.on_too_long == "refuse" or not shorter:
                raise BadSample(
                    f"has {len(input_ids)} tokens, more than max_length={self.max_length}. Shorten it, leave it out, "
                    "or raise max_length: cutting it could cut through an image."
                )
            dropped += len(messages) - len(shorter)
            messages = shorter
            input_ids, labels = self._tokenize(messages)
        given = given[: self._count_images(messages)]
        row = {"input_ids": input_ids, "labels": labels, "keys": [], "visual_tokens": given if has_tokens else []}
        if not has_tokens:
            for number, image in enumerate(given):
                key = str(image) if isinstance(image, (str, Path)) else id(image)
                if key not in images:
                    try:
                        images[key] = read_image(image)
                    except BadSample as error:
                        raise BadSample(f"has image {number}, which {error}") from error
                row["keys"].append(key)
        return row, dropped

    @staticmethod
    def _given_images(example: dict[str, Any]) -> list:
        """Images of a column `images` or `image`, or else of the parts themselves."""
        images = example.get("images")
        if images is None and example.get("image") is not None:
            return [example["image"]]
        if images is None:
            contents = (message["content"] for message in example["messages"])
            parts = (part for content in contents if isinstance(content, list) for part in content)
            within = (part.get("image") for part in parts if part["type"] == "image")
            return [image for image in within if image is not None]
        if not isinstance(images, (list, tuple)):
            raise BadSample(f"has `images` of type {type(images).__name__}, expected a list of images.")
        return images

    @staticmethod
    def _count_images(messages: list[dict[str, Any]]) -> int:
        parts = (part for message in messages if isinstance(message["content"], list) for part in message["content"])
        return sum(part["type"] == "image" for part in parts)

    def _tokenize(self, messages: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels, with every image part expanded to its N + 2 tokens."""
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

    def _checked(self, messages: Any) -> list[dict[str, Any]]:
        """The messages with all content as parts, without what Arrow adds to make them alike."""
        if not isinstance(messages, list) or not messages:
            raise BadSample("has no messages.")
        checked = []
        for message in messages:
            role = message.get("role") if isinstance(message, Mapping) else None
            if role not in ROLES:
                raise BadSample(f"has a message of role {role!r}, expected one of {', '.join(ROLES)}.")
            content = message.get("content")
            if not isinstance(content, (str, list)):
                raise BadSample(f"has a message whose content is {type(content).__name__}: expected text or parts.")
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            parts = [self._checked_part(part) for part in parts]
            if role == "assistant" and not any(part["type"] == "image" or part["text"].strip() for part in parts):
                raise BadSample("has an empty answer.")
            checked.append({"role": role, "content": content if isinstance(content, str) else parts})
        if all(message["role"] != "assistant" for message in checked):
            raise BadSample("has no answer: without an assistant's message nothing is learned.")
        return checked

    def _checked_part(self, part: Any) -> dict[str, str]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            return {"type": "image"}
        if kind != "text" or not isinstance(part.get("text"), str):
            raise BadSample(f"has a content part that is neither text nor an image: {str(part)[:100]}.")
        try:
            part["text"].encode()
        except UnicodeEncodeError as error:
            raise BadSample(f"has a text that is no valid Unicode: {error}") from error
        if found := [word for word in self._image_words if word in part["text"]]:
            raise BadSample(f'has {found[0]} in a text: images are parts of their own, {{"type": "image"}}.')
        return {"type": "text", "text": part["text"]}


__all__ = ["DataCollatorForVPiT"]
