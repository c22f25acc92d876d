"""Visual tokens of a stored dataset, computed once so that training need not run the vision tower."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from datasets import Array3D, Dataset, Features, Value

from ..image_reading import ImageReadError, read_image
from ..modeling_metamorph import MetaMorphForConditionalGeneration
from ..processing_metamorph import MetaMorphProcessor


class _WithVisualTokens:
    """A mixture's records with the visual tokens of `encoded` in the place of their images."""

    def __init__(self, transform: Callable[[dict[str, list]], dict[str, list]], encoded: Dataset):
        self.transform, self.encoded = transform, encoded

    def __call__(self, columns: dict[str, list]) -> dict[str, list]:
        encoded = self.encoded[columns.pop("place")]
        records = {**self.transform(columns), **encoded}
        return {name: values for name, values in records.items() if name != "images"}


def precompute_visual_tokens(
    dataset: Dataset,
    model: MetaMorphForConditionalGeneration,
    processor: MetaMorphProcessor,
    batch_size: int = 32,
    dtype: Literal["float32", "float16"] = "float32",
) -> Dataset:
    """
    The dataset with a column `visual_tokens` in the place of `images`, so that training need not run the vision tower.

    Args:
        dataset ([`~datasets.Dataset`]):
            With a column `images`, lists of anything that [`read_image`] reads, or a mixture of [`load_mixture`].
        model ([`MetaMorphForConditionalGeneration`]): Encodes on the device and in the dtype it is in.
        processor ([`MetaMorphProcessor`]): The model's.
        batch_size (`int`, *optional*, defaults to 32): Rows whose images are encoded together.
        dtype (`str`, *optional*, defaults to `"float32"`): What is stored; float16 takes half and rounds to 3 digits.

    Returns:
        [`~datasets.Dataset`] whose `visual_tokens` are arrays of shape (images of the row, N, V). A row with an image
        that cannot be read has the reason in a column `bad`, and is the collator's to refuse or skip.

    Raises:
        ValueError: if the dataset is a stream.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"Visual tokens are computed once for a stored dataset, but this is {type(dataset).__name__}: load it "
            "without streaming, or train on its pixels."
        )
    shape = (model.config.num_image_tokens, model.config.visual_token_dim)

    @torch.no_grad()
    def encode(rows: dict[str, list]) -> dict[str, list]:
        images, counts, bad = [], [], list(rows.get("bad") or [None] * len(rows["images"]))
        for place, row in enumerate(rows["images"]):
            before = len(images)
            try:
                images += [read_image(image) for image in row or []]
            except ImageReadError as error:
                bad[place] = f"has a bad image. {error}"
            counts.append(len(images) - before)
        tokens = torch.zeros(0, *shape)
        if images:
            pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
            tokens = model.get_visual_tokens(pixels.to(model.device)).float().cpu()
        return {"visual_tokens": [part.numpy() for part in tokens.split(counts)], "bad": bad}

    columns = {"visual_tokens": Array3D((None, *shape), dtype), "bad": Value("string")}
    transform = dataset.format["format_kwargs"].get("transform")
    removed = {"images", "bad"} & set(dataset.column_names) if transform is None else dataset.column_names
    kept = {name: feature for name, feature in dataset.features.items() if name not in removed}
    encoded = dataset.map(
        encode,
        batched=True,
        batch_size=batch_size,
        remove_columns=list(removed),
        features=Features({**kept, **columns}),
        desc="Visual tokens",
    ).with_format("numpy", columns=["visual_tokens"], output_all_columns=True)
    if transform is None:
        return encoded
    places = dataset.with_format(None).add_column("place", np.arange(len(dataset)))
    return places.with_transform(_WithVisualTokens(transform, encoded))


__all__ = ["precompute_visual_tokens"]
