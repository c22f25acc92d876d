"""Processor of MetaMorph: chat messages with images to model inputs, and generated ids back to text."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import jinja2
import numpy as np
import torch
from transformers import BatchFeature, PreTrainedConfig, ProcessorMixin
from transformers.processing_utils import MultiModalData

from .image_reading import read_image


# A format without newlines for tokenizers that have no chat template of their own. The model learns the text between
# the generation marks, which includes the end-of-turn token.
DEFAULT_CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}<image>{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- render(message['content']) + eos_token -}}{%- endgeneration -%}
{%- else -%}{{- render(message['content']) + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


IMAGE_TYPES, TEXT_TYPES = ("image", "image_url", "input_image"), ("text", "input_text", "output_text")
IMAGE_KEYS = ("image", "image_url", "url", "path", "base64")


def check_unicode(text: str) -> str:
    """Return the text, or raise a ValueError for half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"A text of the conversation is not valid Unicode: {error}.") from error
    return text


def normalize_part(part: Any) -> dict[str, Any]:
    """Return a content part, also of OpenAI's APIs, as transformers writes it. Other parts raise a `ValueError`."""
    kind = str(part.get("type")) if isinstance(part, Mapping) else None
    if kind in IMAGE_TYPES:
        image = next((part[key] for key in IMAGE_KEYS if part.get(key) is not None), None)
        image = image["url"] if isinstance(image, Mapping) and "url" in image else image
        return {"type": "image"} if image is None else {"type": "image", "image": image}
    if kind in TEXT_TYPES and isinstance(part.get("text"), str):
        return {"type": "text", "text": check_unicode(part["text"])}
    types = ", ".join(TEXT_TYPES + IMAGE_TYPES)
    raise ValueError(f"A content part is neither text nor an image: {str(part)[:100]}. Known types are {types}.")


def normalize_message(message: Any) -> dict[str, Any]:
    """Return a message with its content parts as transformers writes them, or raise a `ValueError`."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"A message must have a role and a content, but it is {str(message)[:100]}.")
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        check_unicode((content or "") + message["role"])
        return dict(message)
    if isinstance(content, (list, tuple)):
        return {**message, "content": [normalize_part(part) for part in content]}
    raise ValueError(f"A message's content must be text or a list of parts, but it is {type(content).__name__}.")


class MetaMorphProcessor(ProcessorMixin):
    r"""
    Joins an image processor and a tokenizer. In the text, each `<image>` becomes `<image_start>`, N times `<image>`,
    `<image_end>`. Images are given in any form that [`read_image`] reads.

    Args:
        image_processor: Any image processor of transformers that returns `pixel_values`.
        tokenizer: A tokenizer with the three image tokens.
        num_image_tokens (`int`, *optional*, defaults to 64): Visual tokens per image, N, as in the model's config.
        chat_template (`str`, *optional*): Jinja template; defaults to the tokenizer's.
        image_token, image_start_token, image_end_token (`str`): The three tokens.

    Raises:
        ValueError: if one of the three image tokens is not in the tokenizer's vocabulary.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_image_tokens: int = 64,
        chat_template: str | None = None,
        image_token: str = "<image>",
        image_start_token: str = "<image_start>",
        image_end_token: str = "<image_end>",
        **kwargs,
    ):
        tokens, vocabulary = [image_token, image_start_token, image_end_token], tokenizer.get_vocab()
        if unknown := [token for token in tokens if token not in vocabulary]:
            call = f"tokenizer.add_special_tokens({{'additional_special_tokens': {unknown}}}, "
            call += "replace_extra_special_tokens=False)"
            raise ValueError(f"The tokenizer has no token {', '.join(unknown)}. Add it by {call}.")
        self.num_image_tokens = num_image_tokens
        self.image_token, self.image_start_token, self.image_end_token = tokens
        self.image_token_id, self.image_start_token_id, self.image_end_token_id = map(vocabulary.get, tokens)
        self.auto_map = {"AutoProcessor": "processing_metamorph.MetaMorphProcessor"}  # as saving sets it
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    def check_config(self, config: PreTrainedConfig) -> None:
        """Raise a `ValueError` if a model's configuration has other image tokens, or fewer tokens."""
        for name in ("num_image_tokens", "image_token_id", "image_start_token_id", "image_end_token_id"):
            expected, found = getattr(config, name), getattr(self, name)
            if expected != found:
                raise ValueError(
                    f"The model's {name} is {expected}, but the processor's is {found}: take both from one checkpoint."
                )
        if (size := len(self.tokenizer)) > (vocabulary := config.text_config.vocab_size):
            raise ValueError(
                f"The tokenizer has {size} tokens, but the model's vocabulary has {vocabulary}: call "
                "model.resize_token_embeddings(len(processor.tokenizer))."
            )

    def replace_image_token(self, image_inputs: dict | None = None, image_idx: int = 0, **kwargs) -> str:
        """Return the text of one image."""
        return self.image_start_token + self.image_token * self.num_image_tokens + self.image_end_token

    def __call__(self, images=None, text=None, **kwargs):
        """See [`~transformers.ProcessorMixin.__call__`]. Pads on the left by default, as generation needs."""
        if "padding_side" not in kwargs.get("text_kwargs", {}):
            kwargs.setdefault("padding_side", "left")
        return super().__call__(images, text, **kwargs)

    def apply_chat_template(self, conversation, chat_template=None, **kwargs):
        """See [`~transformers.ProcessorMixin.apply_chat_template`]. Content parts may have OpenAI's forms."""
        if not isinstance(conversation, (list, tuple)) or not conversation:
            raise ValueError(f"A conversation must be a list of messages, but it is {str(conversation)[:100]}.")
        is_batch = all(isinstance(turns, (list, tuple)) for turns in conversation)
        if is_batch and not all(conversation):
            raise ValueError("A conversation of the batch has no messages.")
        given = conversation if is_batch else [conversation]
        batch = [[normalize_message(message) for message in turns] for turns in given]
        try:
            return super().apply_chat_template(batch if is_batch else batch[0], chat_template, **kwargs)
        except jinja2.TemplateError as error:
            raise ValueError(f"The messages do not fit the chat template: {error}") from error

    def prepare_prompts(self, conversations: list) -> BatchFeature:
        """Return the inputs of `generate()` for one conversation or several, padded on the left."""
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return self.apply_chat_template(conversations, processor_kwargs={"padding": True}, **options)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """See [`~transformers.ProcessorMixin.prepare_inputs_layout`]. Reads all images with [`read_image`]."""
        if isinstance(images, (list, tuple)) and all(isinstance(row, (list, tuple)) and not row for row in images):
            images = None  # [] and [[], []] say that a batch has no images
        if images is not None:
            images = self._read_images(images)
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _read_images(self, images: Any) -> Any:
        if isinstance(images, (list, tuple)) or (isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4):
            return [self._read_images(image) for image in images]
        return read_image(images)

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs) -> None:
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)
        if text is not None and isinstance(images, (list, tuple)) and all(isinstance(row, list) for row in images):
            placeholders, counts = [sample.count(self.image_token) for sample in text], [len(row) for row in images]
            if placeholders != counts:
                given = f"{placeholders} {self.image_token} placeholders, but their lists of images hold {counts}"
                raise ValueError(f"The texts have {given}: pass one image per placeholder, in a list per text.")

    # Truncation must not cut off either end of an image; transformers counts its visual tokens alone.
    def _check_special_mm_tokens(self, text, text_inputs, modalities) -> None:
        super()._check_special_mm_tokens(text, text_inputs, [*modalities, "image_start", "image_end"])

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)

    def decode_generated(self, ids: "torch.LongTensor | list[list[int]]") -> list[str]:
        """Decode generated ids (B, S) to B texts with one `<image>` per finished image and no other special tokens."""
        special_ids = {*self.tokenizer.all_special_ids, self.image_start_token_id, self.image_end_token_id}
        kept_ids = []
        for row in ids.tolist() if isinstance(ids, torch.Tensor) else ids:
            kept_ids.append([])
            for token, run in groupby(row):
                if token == self.image_token_id:
                    kept_ids[-1] += [token] * (len(list(run)) // self.num_image_tokens)
                elif token not in special_ids:
                    kept_ids[-1] += run
        return [text.strip() for text in self.tokenizer.batch_decode(kept_ids)]
