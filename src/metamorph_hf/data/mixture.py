"""
Training data: sources of any size read lazily, and mixtures of them as datasets of conversations.

A mixture holds records: what a family of `formats` makes of a row (`messages`, `images`), and `task`, `source`
and `id` to name it. A row that cannot become a record has the reason in `bad`, for the collator to raise or to skip.
"""

import json
import logging
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import (
    Dataset,
    Features,
    Image,
    IterableDataset,
    List,
    Value,
    Video,
    interleave_datasets,
    load_dataset,
)

from ..image_reading import BadSample
from .formats import FAMILIES, Record, Row


logger = logging.getLogger(__name__)


class JsonLines(Sequence):
    """
    A JSONL file by line number, without reading it whole: the places of its lines are found once (8 bytes a line), and
    a line is read and parsed when it is asked for, in whichever process asks. Empty lines at the end are none.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        ends, position = [], 0
        with open(self.path, "rb") as file:
            while block := file.read(1 << 24):
                ends.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + position)
                position += len(block)
                last = block[-1:]
        ends = np.concatenate([*ends, *([[position]] if position and last != b"\n" else [])]) if position else []
        self.offsets = np.concatenate([[0], np.asarray(ends, dtype=np.int64) + 1]).astype(np.int64)
        while len(self) and not self._line(len(self) - 1).strip():
            self.offsets = self.offsets[:-1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def _line(self, index: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offsets[index])
            return file.read(self.offsets[index + 1] - self.offsets[index])

    def __getitem__(self, index: int) -> Row:
        try:
            row = json.loads(self._line(index))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise BadSample(f"is line {index + 1} of {self.path}, which is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise BadSample(f"is line {index + 1} of {self.path}, which holds {type(row).__name__}, not an object.")
        return row


def undecoded(dataset: Dataset) -> Dataset:
    """The dataset with its images and videos as bytes and paths: images are decoded in the collator."""
    features = {}
    for name, feature in dataset.features.items():
        if isinstance(feature, (Image, Video)):
            feature = type(feature)(decode=False)
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            feature = List(Image(decode=False))
        features[name] = feature
    return dataset.cast(Features(features))


# Streams are interleaved by their columns' types, and contents of messages are of several.
STREAM_FEATURES = Features(
    {
        **{name: Value("string") for name in ("task", "source", "id", "bad", "messages")},
        "images": List(Image(decode=False)),
    }
)


@dataclass
class Source:
    """
    One entry of a mixture.

    Args:
        task (`str`): Its family, a key of `FAMILIES`.
        path (`str`):
            A `.jsonl` or `.json` file, or whatever [`~datasets.load_dataset`] takes: a Hub repository, or a builder
            (`"parquet"`, `"webdataset"`, `"imagefolder"`...) with `data_files`.
        name, split, data_files (*optional*): For `load_dataset`; the split defaults to `"train"`.
        columns (`dict`, *optional*):
            The family's names of columns to the source's, such as `{"caption": "title"}`. Columns of a webdataset are
            its members' endings (`"jpg"`, `"source.jpg"`) and the keys of its `.json` members.
        streaming (`bool`, *optional*, defaults to `False`): Read while training.
        weight (`float`, *optional*): Its share of the mixture, relative to the other weights.
        num_samples (`int`, *optional*): How many of its samples to take, drawn by the seed; repeated if it has fewer.
        options (`dict`, *optional*): More for the family, such as `image_root`.

    Raises:
        ValueError: if the task is unknown, or both `weight` and `num_samples` are given.
    """

    task: str
    path: str
    name: str | None = None
    split: str = "train"
    data_files: str | list[str] | None = None
    columns: dict[str, str] = field(default_factory=dict)
    streaming: bool = False
    weight: float | None = None
    num_samples: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.task not in FAMILIES:
            raise ValueError(f"task is {self.task!r}, expected one of {', '.join(FAMILIES)}.")
        if self.weight is not None and self.num_samples is not None:
            raise ValueError(f"{self.path} has a weight and num_samples: give one of the two.")
        for name, value in (("weight", self.weight), ("num_samples", self.num_samples)):
            if value is not None and value <= 0:
                raise ValueError(
                    f"{self.path} has {name}={value}, expected more than 0: leave out what is not wanted."
                )

    @property
    def label(self) -> str:
        """What messages and tables call it."""
        files = [self.data_files] if isinstance(self.data_files, str) else self.data_files or []
        return ", ".join(files[:1]) + " and more" * (len(files) > 1) or self.path

    def open(self) -> Sequence[Row] | IterableDataset:
        """Its rows, images undecoded."""
        if self.path.endswith(".jsonl"):
            return JsonLines(self.path)
        if self.path.endswith(".json"):  # LLaVA's lists have `image` as text or list: no table of datasets' own
            rows = json.loads(Path(self.path).read_text())
            if not isinstance(rows, list):
                raise ValueError(f"{self.path} holds {type(rows).__name__}, expected a list of samples.")
            return rows
        options = {"data_files": self.data_files, "split": self.split, "streaming": self.streaming}
        dataset = load_dataset(self.path, self.name, **options)
        return dataset.decode(False) if self.streaming else undecoded(dataset)

    def record(self, row: Row | None, index: int, seed: int, error: BadSample | None = None) -> Record:
        """The family's record of a row, or one that says why there is none. Random choices depend on `index` alone."""
        about = {"task": self.task, "source": self.label, "bad": None, "messages": None, "images": None}
        if row is not None and isinstance(row.get("json"), Mapping):  # a webdataset sample's .json member
            row = {**row, **row["json"]}
        name = None if row is None else row.get("id", row.get("__key__"))
        about["id"] = f"row {index}" if name is None else f"{name} (row {index})"
        try:
            if error is not None:
                raise error
            row = {**row, **{name: row.get(column) for name, column in self.columns.items()}}
            rng = random.Random(f"{seed} {self.path} {index}")
            return {**about, **FAMILIES[self.task](row, rng, **self.options)}
        except BadSample as error:
            return {**about, "bad": str(error)}


class _Reader:
    """Turns the two numbers that a mixture is made of, source and row, into records when they are read."""

    def __init__(self, sources: list[Source], tables: list[Sequence[Row]], seed: int):
        self.sources, self.tables, self.seed = sources, tables, seed

    def __call__(self, columns: dict[str, list[int]]) -> dict[str, list]:
        records = [self._record(*place) for place in zip(columns["source"], columns["row"])]
        return {name: [record[name] for record in records] for name in records[0]}

    def _record(self, source: int, index: int) -> Record:
        row = error = None
        try:
            row = self.tables[source][index]
        except BadSample as bad:
            error = bad
        return self.sources[source].record(row, index, self.seed, error)


def load_mixture(
    sources: Sequence[Source | Mapping[str, Any]], seed: int = 0, size: int | None = None
) -> Dataset | IterableDataset:
    """
    A dataset of records from several sources, shuffled by `seed`, to train on with [`DataCollatorForVPiT`].

    Without weights and counts every sample stands in it once. With `num_samples` a source gives that many (the paper's
    figure 4: understanding data as it is, 1,000 to 200,000 generation samples beside it). With weights, which all
    sources must have then, the mixture has `size` samples, or as many as use up the first source.

    If any source streams, the mixture does: weights are then the probabilities of [`~datasets.interleave_datasets`].

    Args:
        sources (list of [`Source`] or `dict`): Keys of a dictionary that `Source` lacks are options of the family.
        seed (`int`, *optional*, defaults to 0): Of the order, of what is drawn, and of wordings.
        size (`int`, *optional*): Samples in the mixture; with weights only.

    Raises:
        ValueError: if there are no sources, one is empty, or some have weights and others not.
    """
    sources = [source if isinstance(source, Source) else parse_source(source) for source in sources]
    weights = [source.weight for source in sources]
    if not sources or (any(weights) and not all(weights)):
        raise ValueError("A mixture needs at least one source, and a weight for every one or for none of them.")
    if size is not None and not any(weights):
        raise ValueError("size goes with weights: without them every source says itself how many samples it gives.")
    tables = [source.open() for source in sources]
    if any(isinstance(table, IterableDataset) for table in tables):
        return _stream(sources, tables, seed, size)
    for source, table in zip(sources, tables):
        if not len(table):
            raise ValueError(f"{source.path} has no samples.")
    counts = [source.num_samples or len(table) for source, table in zip(sources, tables)]
    if any(weights):
        size = size or int(min(len(table) / weight for table, weight in zip(tables, weights)) * sum(weights))
        counts = [round(size * weight / sum(weights)) for weight in weights]
    generator = np.random.default_rng(seed)
    rows = [drawn(len(table), count, generator) for table, count in zip(tables, counts)]
    places = np.stack([np.repeat(np.arange(len(rows)), counts), np.concatenate(rows)], 1)
    places = places[generator.permutation(len(places))]
    dataset = Dataset(pa.table({"source": places[:, 0], "row": places[:, 1]}))
    return dataset.with_transform(_Reader(sources, tables, seed))


def parse_source(entry: Mapping[str, Any]) -> Source:
    """A [`Source`] of a dictionary whose other keys are options of its family."""
    known = {name: value for name, value in entry.items() if name in Source.__dataclass_fields__}
    if missing := {"task", "path"} - set(known):
        raise ValueError(f"A source of a mixture lacks {' and '.join(sorted(missing))}: {dict(entry)}.")
    options = {name: value for name, value in entry.items() if name not in known}
    return Source(**{**known, "options": {**known.get("options", {}), **options}})


def drawn(available: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` rows: all of them as often as they fit, and some without repetition for the rest."""
    whole, rest = divmod(count, available)
    return np.concatenate([np.tile(np.arange(available), whole), generator.permutation(available)[:rest]])


def _stream(sources: list[Source], tables: list, seed: int, size: int | None) -> IterableDataset:
    streams = []
    for source, table in zip(sources, tables):
        if isinstance(table, Dataset):
            table = table.shuffle(seed).to_iterable_dataset()
        elif not isinstance(table, IterableDataset):
            table = IterableDataset.from_generator(_rows, gen_kwargs={"table": table})
        if source.num_samples is not None:
            table = table.take(source.num_samples)
        record = partial(_stream_record, source=source, seed=seed)
        options = {"with_indices": True, "remove_columns": table.column_names, "features": STREAM_FEATURES}
        streams.append(table.map(record, **options))
    weights = [source.weight for source in sources]
    probabilities = [weight / sum(weights) for weight in weights] if all(weights) else None
    strategy = "first_exhausted" if probabilities else "all_exhausted_without_replacement"
    mixture = interleave_datasets(streams, probabilities, seed, stopping_strategy=strategy)
    mixture = mixture.map(_loaded_messages)
    processes = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun and accelerate launch
    if 1 < processes <= mixture.num_shards:  # accelerate's prepare_data_loader gives each process whole shards then
        logger.warning(
            f"The stream's {mixture.num_shards} shards are dealt out whole to {processes} processes: one whose shards "
            "hold fewer samples ends earlier than the others. Write shards of equal length, as many as a multiple of "
            "the processes, or leave out streaming: samples are dealt out evenly then."
        )
    return mixture if size is None else mixture.take(size)


def _rows(table: Sequence[Row]) -> Iterator[Row]:
    for index in range(len(table)):
        try:
            yield {"row": table[index], "bad": None}
        except BadSample as error:
            yield {"row": None, "bad": str(error)}


def _stream_record(row: Row, index: int, source: Source, seed: int) -> Record:
    if set(row) == {"row", "bad"}:  # of _rows
        error = None if row["bad"] is None else BadSample(row["bad"])
        record = source.record(row["row"], index, seed, error)
    else:
        record = source.record(row, index, seed)
    return {**record, "messages": json.dumps(record["messages"]), "images": record["images"] or []}


def _loaded_messages(record: Record) -> Record:
    return {"messages": json.loads(record["messages"])}


def mixture_table(dataset: Dataset | IterableDataset, num_samples: int | None = 1000) -> str:
    """
    What a mixture holds, by task and source: samples, images in questions and in answers, share of samples whose
    answer has an image, bad ones. Of a larger mixture than `num_samples` the first so many are read, and the table
    says so; None reads all.
    """
    counts: dict[tuple[str, str], Counter] = {}
    read = 0
    for record in dataset:
        if read == num_samples:
            break
        read += 1
        about = counts.setdefault((record["task"], record["source"]), Counter())
        about["samples"] += 1
        if record["bad"] is not None:
            about["bad"] += 1
            continue
        parts = Counter()
        for message in record["messages"]:
            content = message["content"] if isinstance(message["content"], list) else []
            parts[message["role"] == "assistant"] += sum(part["type"] == "image" for part in content)
        about["asked"] += parts[False]
        about["answered"] += parts[True]
        about["drawing"] += parts[True] > 0
    header = f"{'task':<18}{'samples':>9}{'share':>8}{'images in':>11}{'images out':>12}{'draw':>7}{'bad':>6}  source"
    lines = [header]
    for (task, source), about in sorted(counts.items()):
        samples = about["samples"]
        numbers = f"{samples:>9,}{samples / read:>8.1%}{about['asked']:>11,}{about['answered']:>12,}"
        lines.append(f"{task:<18}{numbers}{about['drawing'] / samples:>7.0%}{about['bad']:>6}  {source}")
    total = f", the first of {len(dataset):,}" if isinstance(dataset, Dataset) and len(dataset) > read else ""
    return "\n".join([*lines, f"{read:,} samples read{total}"])


__all__ = ["JsonLines", "Source", "load_mixture", "mixture_table"]
