"""Visual tokens of a stored dataset, computed once so that training does not run the vision tower."""

from functools import partial
from pathlib import Path
from typing import Literal

import torch
from datasets import Array3D, Dataset, Features, Value
from trl.trainer.utils import hash_module

from ..image_reading import ImageReadError, read_image
from ..modeling_metamorph import MetaMorphForConditionalGeneration
from ..processing_metamorph import MetaMorphProcessor
from .mixture import cache_options, disable_decoding


def precompute_visual_tokens(
    dataset: Dataset,
    model: MetaMorphForConditionalGeneration,
    processor: MetaMorphProcessor,
    batch_size: int = 32,
    dtype: Literal["float32", "float16"] = "float32",
) -> Dataset:
    """
    Replace the images of a dataset by their visual tokens, which are kept in the cache of datasets.

    Args:
        dataset ([`~datasets.Dataset`]): A mixture, or a dataset with `images`, lists of what [`read_image`] accepts.
        model ([`MetaMorphForConditionalGeneration`]): Encodes the images of `batch_size` rows together, on its device.
        dtype (`str`, *optional*, defaults to `"float32"`): Stored dtype. `"float16"` halves the size, with 3 digits.

    Returns:
        [`~datasets.Dataset`] with `visual_tokens`, arrays of shape (images of the row, N, V), instead of `images`. If
        an image cannot be read, the row's `bad` gives the reason, and the collator treats it as a bad sample.

    Raises:
        ValueError: if the dataset is a stream.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{type(dataset).__name__} is not a stored dataset: load it without streaming.")
    shape, unreadable = (model.config.num_image_tokens, model.config.visual_token_dim), []

    @torch.no_grad()
    def encode(rows: dict[str, list]) -> dict[str, list]:
        images, counts, bad = [], [], list(rows.get("bad") or [None] * len(rows["images"]))
        for index, row in enumerate(rows["images"]):
            try:
                read = [read_image(image) for image in row or []]
            except ImageReadError as error:
                read, bad[index] = [], f"has a bad image. {error}"
                unreadable.append(index)
            images += read
            counts.append(len(read))
        tokens = torch.zeros(0, *shape)
        if images:
            pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
            tokens = model.get_visual_tokens(pixels.to(model.device)).float().cpu()
        return {"visual_tokens": [part.numpy() for part in tokens.split(counts)], "bad": bad}

    is_transformed = dataset.format["type"] == "custom"  # as the records of a mixture are
    dataset = disable_decoding(dataset)
    removed = set(dataset.column_names) if is_transformed else {"images", "bad"} & set(dataset.column_names)
    features = {name: feature for name, feature in dataset.features.items() if name not in removed}
    features |= {"visual_tokens": Array3D((None, *shape), dtype), "bad": Value("string")}
    options = {"batched": True, "batch_size": batch_size, "remove_columns": list(removed), "desc": "Visual tokens"}
    parts = (hash_module(model.base_model.vision_tower), model.config.to_dict(), processor.image_processor.to_dict())
    options |= cache_options(dataset, "visual-tokens", *parts, dtype)
    # A result with unreadable images is not used again: they may have been repaired.
    incomplete = Path(options["cache_file_name"]).with_suffix(".unreadable")
    options["load_from_cache_file"] &= not incomplete.exists()
    encoded = dataset.map(encode, features=Features(features), **options)
    if unreadable:
        incomplete.touch()
    else:
        incomplete.unlink(missing_ok=True)
    encoded = encoded.with_format("numpy", columns=["visual_tokens"], output_all_columns=True)
    if not is_transformed:
        return encoded
    rows = Dataset.from_dict({"row": range(len(dataset))})
    return rows.with_transform(partial(_replace_images, dataset=dataset, encoded=encoded))


def _replace_images(columns: dict[str, list], dataset: Dataset, encoded: Dataset) -> dict[str, list]:
    records = {**dataset[columns["row"]], **encoded[columns["row"]]}
    del records["images"]
    return records
