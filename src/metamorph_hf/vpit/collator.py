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
from ..processing_metamorph import MetaMorphProcessor, check_unicode, normalize_message


logger = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant", "tool")


@dataclass
class _Conversation:
    """A sample on its way into a batch: its content, then its rendered text, then its ids and labels."""

    messages: list[dict[str, Any]]
    tools: list
    images: list | tuple  # or visual tokens
    column: str
    num_dropped: int = 0
    text: str = ""
    answers: list[tuple[int, int]] | None = None  # spans of the text
    input_ids: np.ndarray | None = None
    labels: np.ndarray | None = None


def join_rows(
    rows: list[list[tuple[torch.Tensor, torch.Tensor]]], pad_id: int, is_packed: bool, padding_free: bool = False
) -> dict[str, Any]:
    """Return the tensors of rows that hold the ids and labels of one or, if packed, several conversations."""
    if padding_free:
        rows = [list(chain(*rows))]
    input_ids, labels = ([torch.cat(part) for part in parts] for parts in zip(*(zip(*row) for row in rows)))
    batch = {"input_ids": pad_sequence(input_ids, True, pad_id), "labels": pad_sequence(labels, True, -100)}
    if not is_packed:
        return batch | {"attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], True)}
    # Each position of the padding is 0, a conversation of its own.
    positions = [torch.cat([torch.arange(len(ids)) for ids, _ in row]) for row in rows]
    batch["position_ids"] = pad_sequence(positions, True)
    batch["labels"][batch["position_ids"] == 0] = -100  # nothing predicts a first token
    if padding_free:
        lengths = torch.tensor([0, *(len(ids) for ids, _ in rows[0])], dtype=torch.int32)
        batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = lengths.cumsum(0, dtype=torch.int32)
        batch["max_length_q"] = batch["max_length_k"] = int(lengths.max())
    return batch


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
    (I, 3, H, W), with `image_indices` if images repeat, or `visual_tokens` of shape (I, N, V); `sample_ids`; `tasks`,
    such as "task/source", if the examples have any; and `rejected`, if there are any: a dictionary with `sample`,
    `task`, `reason` and `kind` for each example that was `"skipped"` or `"shortened"`. A batch of skipped examples
    alone holds one token without a target.

    An example of a packed dataset has `conversations`, a list of such examples that share a row. Such batches, and
    padding-free ones, have `position_ids` (B, S), which restart at each conversation, instead of `attention_mask`. A
    padding-free one also has `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k` for flash attention.

    Args:
        processor (`MetaMorphProcessor`): Its chat template (of several, the one named default) needs
            `{% generation %}` marks around answers. An EOS token right after them is a target, too.
        max_length (`int`, *optional*): Number of tokens of the longest conversation.
        on_bad_sample (`str`, *optional*, defaults to `"raise"`): `"raise"` raises an error that names the example;
            `"skip"` leaves it out and reports it in `rejected`.
        on_too_long (`str`, *optional*, defaults to `"refuse"`): `"refuse"` treats a conversation longer than
            `max_length` as a bad sample; `"drop_turns"` drops whole turns from its end until it fits.
        padding_free (`bool`, *optional*, defaults to `False`): Join all conversations of a batch in one row.

    Raises:
        ValueError: If the chat template has no `{% generation %}` marks, or the tokenizer no token to pad with.
        BadSample: If an example cannot be trained on.
    """

    processor: MetaMorphProcessor
    max_length: int | None = None
    on_bad_sample: Literal["raise", "skip"] = "raise"
    on_too_long: Literal["refuse", "drop_turns"] = "refuse"
    padding_free: bool = False

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
        self._image_ids = np.array(image.input_ids)
        self._stray_ids, self._eos_id = {*image.input_ids} - {processor.image_token_id}, tokenizer.eos_token_id
        self._options = {"chat_template": self._template, "return_assistant_tokens_mask": True}
        self._options |= tokenizer.special_tokens_map
        messages = [{"role": role, "content": "Hi"} for role in ("user", "assistant", "user")]
        (probe,) = self._encode([{"messages": messages}], max_length=None)
        if isinstance(probe, BadSample):  # the template takes other conversations than this one
            return
        labels = probe.labels[probe.labels != -100].tolist()
        targets = [target for target in labels if tokenizer.decode([target]).strip()]
        if not {tokenizer.eos_token_id, *tokenizer.get_added_vocab().values()} & set(targets[-1:]):
            logger.warning(
                "The chat template's {% generation %} marks leave out the token that ends an answer, so the model "
                "would not learn to stop: close the marks after it."
            )

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        for index, example in enumerate(examples):
            if not isinstance(example, Mapping):
                raise TypeError(f"Example {index} of the batch is {type(example).__name__}, expected a dictionary.")
        groups = [example.get("conversations", [example]) for example in examples]
        samples, numbers = list(chain(*groups)), np.repeat(range(len(groups)), [len(group) for group in groups])
        rows, sample_ids, tasks, rejected, keys, visual_tokens = [[] for _ in groups], [], [], [], [], []
        images: dict[str | int, PIL.Image.Image] = {}
        encoded = self._encode(samples, self.max_length)
        for index, (number, example, conversation) in enumerate(zip(numbers, samples, encoded)):
            source = f" of {example['source']}" if example.get("source") is not None else ""
            name = f"Example {f'{index} of the batch' if example.get('id') is None else example['id']}{source}"
            report = {"sample": name, "task": example.get("task")}
            try:
                if isinstance(conversation, BadSample):
                    raise conversation
                new_keys, new_tokens = self._read_images(conversation, images)
            except BadSample as error:
                if self.on_bad_sample == "raise":
                    raise BadSample(f"{name} {error}") from error
                rejected.append({**report, "kind": "skipped", "reason": str(error)})
                continue
            if conversation.num_dropped:
                reason = f"{conversation.num_dropped} messages dropped to keep to {self.max_length} tokens"
                rejected.append({**report, "kind": "shortened", "reason": reason})
            rows[number].append((torch.from_numpy(conversation.input_ids), torch.from_numpy(conversation.labels)))
            sample_ids.append(name)
            tasks.append("/".join(str(example[key]) for key in ("task", "source") if example.get(key) is not None))
            keys += new_keys
            visual_tokens += new_tokens
        rows = [row for row in rows if row] or [[(torch.tensor([self._pad_id]), torch.tensor([-100]))]]
        is_packed = self.padding_free or any("conversations" in example for example in examples)
        batch = join_rows(rows, self._pad_id, is_packed, self.padding_free) | {"sample_ids": sample_ids}
        if any(tasks):
            batch["tasks"] = tasks
        if rejected:
            batch["rejected"] = rejected
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

    def measure(self, examples: list[dict[str, Any]]) -> list[int]:
        """Return the number of tokens of each example, 0 for bad ones. No image is read."""
        encoded = self._encode(examples, self.max_length)
        return [0 if isinstance(each, BadSample) else len(each.input_ids) for each in encoded]

    def _encode(self, examples: list[dict[str, Any]], max_length: int | None) -> list[_Conversation | BadSample]:
        """Return each example with its ids and labels, or the error in it. The texts are tokenized together."""
        found = []
        for example in examples:
            try:
                found.append(self._render(self._check(example)))
            except BadSample as error:
                found.append(error)
        good = [index for index, conversation in enumerate(found) if not isinstance(conversation, BadSample)]
        for index, encoding in zip(good, self._tokenize([found[index] for index in good])):
            try:
                found[index] = self._shorten(self._label(found[index], encoding), max_length)
            except BadSample as error:
                found[index] = error
        return found

    def _tokenize(self, conversations: list[_Conversation]) -> list[tuple[list, list] | None]:
        """Return ids and the places in the text of their tokens; None for slow tokenizers."""
        if not self.processor.tokenizer.is_fast or not conversations:
            return [None] * len(conversations)
        texts = [conversation.text for conversation in conversations]
        encoded = self.processor.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        return list(zip(encoded["input_ids"], encoded["offset_mapping"]))

    def _check(self, example: dict[str, Any]) -> _Conversation:
        """Return the parts of an example, whose images are as many as it has places for."""
        if example.get("bad") is not None:  # its source's row could not be made into a conversation
            raise BadSample(example["bad"])
        messages, within = self._check_messages(example.get("messages"))
        for key in ("tool_calls", "reasoning_content"):
            if key not in self._template and any(message.get(key) for message in messages):
                raise BadSample(f"has {key}, which the chat template does not write: use one that does.")
        if any(message.get("weight", 1) != 1 for message in messages):
            raise BadSample("has a message with a weight, which is not supported: every answer is learned alike.")
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
        return _Conversation(messages, tools, given, column)

    def _render(self, conversation: _Conversation) -> _Conversation:
        """Add the text, and the spans of answers in it."""
        try:
            rendered = render_jinja_template([conversation.messages], conversation.tools or None, **self._options)
            (conversation.text,), (conversation.answers,) = rendered
            check_unicode(conversation.text)
        except Exception as error:  # a template raises anything for values that it does not expect
            raise BadSample(f"does not fit the chat template: {error}") from error
        return conversation

    def _label(self, conversation: _Conversation, encoding: tuple[list, list] | None) -> _Conversation:
        """Add ids and labels, with each image expanded to its N + 2 tokens. A slow tokenizer gives no encoding."""
        tokenizer, image_id = self.processor.tokenizer, self.processor.image_token_id
        if encoding is None:
            ids, learned = self._tokenize_in_pieces(conversation.text, conversation.answers)
        else:
            ids, (starts, ends) = np.array(encoding[0], dtype=np.int64), np.array(encoding[1]).reshape(-1, 2).T
            learned = np.zeros(len(ids), dtype=bool)
            for first, last in conversation.answers:
                learned |= (starts < last) & (ends > first)
        is_image, expected = ids == image_id, count_images(conversation.messages)
        count, stray = int(is_image.sum()), self._stray_ids.intersection(ids.tolist())
        if stray or count > expected:
            word = tokenizer.convert_ids_to_tokens(min(stray, default=image_id))
            raise BadSample(f'has {word} in a text: images are parts of their own, {{"type": "image"}}.')
        if count < expected:
            raise BadSample(f"has {expected} images, but the chat template writes {count}.")
        is_eos = ids == self._eos_id
        learned[1:] |= learned[:-1] & is_eos[1:] & ~is_eos[:-1]
        repeats = np.where(is_image, len(self._image_ids), 1)
        conversation.input_ids = ids.repeat(repeats)
        conversation.input_ids[is_image.repeat(repeats)] = np.tile(self._image_ids, count)
        conversation.labels = np.where(learned.repeat(repeats), conversation.input_ids, -100)
        return conversation

    def _shorten(self, conversation: _Conversation, max_length: int | None) -> _Conversation:
        """Drop whole turns from the end until the conversation fits."""
        num_messages = len(conversation.messages)
        while max_length is not None and len(conversation.input_ids) > max_length:
            messages = conversation.messages
            answers = [index for index, message in enumerate(messages[:-1]) if message["role"] == "assistant"]
            if self.on_too_long == "refuse" or not answers:
                raise BadSample(
                    f"has {len(conversation.input_ids)} tokens, more than max_length={max_length}. Shorten it, leave "
                    "it out, or raise max_length: cutting it could cut through an image."
                )
            conversation.messages = messages[: answers[-1] + 1]
            self._label(self._render(conversation), self._tokenize([conversation])[0])
        conversation.num_dropped = num_messages - len(conversation.messages)
        return conversation

    def _read_images(
        self, conversation: _Conversation, images: dict[str | int, PIL.Image.Image]
    ) -> tuple[list[str | int], list[torch.Tensor]]:
        """Return keys of images and visual tokens. Adds images that are new to the batch to `images`."""
        keys, visual_tokens, column = [], [], conversation.column
        for index, image in enumerate(conversation.images[: count_images(conversation.messages)]):
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
        return keys, visual_tokens

    def _tokenize_in_pieces(self, text: str, answers: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Return ids, and which are of answers, by a slow tokenizer, which does not know the places of its tokens."""
        tokenizer, ids, learned = self.processor.tokenizer, [], []
        edges = sorted({0, len(text), *chain.from_iterable(answers)})
        for start, end in zip(edges, edges[1:]):
            piece = tokenizer(text[start:end], add_special_tokens=False).input_ids
            ids += piece
            learned += [any(first <= start and end <= last for first, last in answers)] * len(piece)
        if ids != tokenizer(text, add_special_tokens=False).input_ids:
            raise BadSample(
                "does not fit a slow tokenizer, which joins the edges of answers and prompts: use a fast one."
            )
        return np.array(ids, dtype=np.int64), np.array(learned, dtype=bool)

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
