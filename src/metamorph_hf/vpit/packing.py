"""Rows of several conversations each, for training without padding. TRL packs text alone."""

from bisect import bisect_left, insort
from functools import partial
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel

from ..data.mixture import cache_options, disable_decoding
from .collator import DataCollatorForVPiT


# Conversations that are packed together, in the dataset's order, as in TRL. A stream reads so many ahead.
WINDOW = 1000

# Layer types of transformers' configurations whose masks follow restarting positions.
PACKABLE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


def pack_lengths(lengths: list[int], max_length: int, strategy: str = "bfd") -> list[list[int]]:
    """
    Group whole conversations into rows of at most `max_length` tokens.

    Args:
        lengths (`list[int]`): Tokens of each conversation, none more than `max_length`.
        max_length (`int`): Tokens of a row.
        strategy (`str`, *optional*, defaults to `"bfd"`): `"bfd"` (best-fit decreasing, arXiv 2404.10830) puts the
            longest first, each into the fullest row that has room for it; `"wrapped"` keeps the order.

    Returns:
        `list[list[int]]`: The indices of each row's conversations.
    """
    order = range(len(lengths))
    if strategy == "bfd":
        order = sorted(order, key=lambda index: lengths[index], reverse=True)
    rows, spaces = [], []  # `spaces`: free tokens and number of each open row, sorted
    for index in order:
        fit = bisect_left(spaces, (lengths[index],))
        if fit == len(spaces):
            rows.append([])
            space, row = max_length, len(rows) - 1
        else:
            space, row = spaces.pop(fit)
        rows[row].append(index)
        if strategy == "wrapped":
            spaces.clear()  # closes all rows but this one
        insort(spaces, (space - lengths[index], row))
    return rows


def pack_dataset(
    dataset: Dataset | IterableDataset, collator: DataCollatorForVPiT, strategy: str = "bfd"
) -> Dataset | IterableDataset:
    """
    Pack the conversations of a dataset, or of a stream, into rows of `collator.max_length` tokens.

    The lengths of a dataset are measured once, without decoding images, and kept in the cache of datasets.

    Returns:
        The packed dataset: each sample has `conversations`, a list of the samples in one row.
    """
    dataset = disable_decoding(dataset)
    options = {"batched": True, "batch_size": WINDOW}
    if isinstance(dataset, IterableDataset):
        columns = dataset.column_names or list(next(iter(dataset)))
        pack = partial(_pack_window, collator=collator, strategy=strategy)
        return dataset.map(pack, remove_columns=columns, **options)
    options |= {"remove_columns": dataset.column_names, "desc": "Measuring conversations"}
    options |= cache_options(dataset, "lengths", collator)
    lengths = dataset.map(partial(_measure, collator=collator), **options).with_format(None)["length"][:]
    if bad := [index for index, length in enumerate(lengths) if not length]:  # they may have been corrected since
        for index, length in zip(bad, collator.measure([dataset[index] for index in bad])):
            lengths[index] = length
    rows = []
    for start in range(0, len(lengths), WINDOW):
        window = pack_lengths(lengths[start : start + WINDOW], collator.max_length, strategy)
        rows += [[start + index for index in row] for row in window]
    return Dataset.from_dict({"rows": rows}).with_transform(partial(_read_rows, dataset=dataset))


def _measure(columns: dict[str, list], collator: DataCollatorForVPiT) -> dict[str, list[int]]:
    return {"length": collator.measure(_split_columns(columns))}


def _pack_window(columns: dict[str, list], collator: DataCollatorForVPiT, strategy: str) -> dict[str, list]:
    samples = _split_columns(columns)
    rows = pack_lengths(collator.measure(samples), collator.max_length, strategy)
    return {"conversations": [[samples[index] for index in row] for row in rows]}


def _split_columns(columns: dict[str, list]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def _read_rows(columns: dict[str, list[list[int]]], dataset: Dataset) -> dict[str, list]:
    return {"conversations": [dataset.__getitems__(row) for row in columns["rows"]]}


@torch.no_grad()
def check_packable(language_model: PreTrainedModel, can_run: bool = True) -> None:
    """
    Raise a ValueError if a conversation in a row would see the one before it, as with recurrent layers, or with those
    that take no `position_ids`. `can_run` says that the weights are here in whole, so that it can be tried.
    """
    config = language_model.config
    others = sorted(set(getattr(config, "layer_types", None) or []) - PACKABLE_LAYERS)
    if language_model._is_stateful or others:
        reason = f"its layers ({', '.join(others) or 'recurrent'}) carry a state from one to the next"
    elif can_run and not _keeps_apart(language_model):
        reason = "its attention does not stop where `position_ids` restart"
    else:
        return
    raise ValueError(
        f"A language model of type {config.model_type} cannot keep the conversations of a row apart, as {reason}: set "
        "packing=False and padding_free=False."
    )


def _keeps_apart(language_model: PreTrainedModel) -> bool:
    """Return whether changing the first of two conversations leaves the other's hidden states as they are."""
    embeddings, was_training = language_model.get_input_embeddings(), language_model.training
    tokens = torch.arange(12, device=embeddings.weight.device)
    found = []
    language_model.eval()
    for first in (tokens[:4], tokens[4:8]):
        embeds = embeddings(torch.cat([first, tokens[8:]])[None])
        options = {"position_ids": torch.arange(4, device=embeds.device).repeat(1, 2), "use_cache": False}
        found.append(language_model(inputs_embeds=embeds, **options).last_hidden_state[:, 4:])
    language_model.train(was_training)
    tolerance = 10 * torch.finfo(found[0].dtype).eps * found[0].abs().max()
    return bool((found[0] - found[1]).abs().max() <= tolerance)
