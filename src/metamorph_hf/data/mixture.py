"""
Mixtures: datasets of records from one or more sources, read lazily whatever their size. See docs/data.md.

A record has the `messages`, `images` and `tools` that a family of `formats` makes of a row, `task`, `source` and `id`
to name it, and `bad`, which says why a row could not become one, so that the collator can raise or skip it.
"""

import inspect
import json
import logging
import math
import os
import random
import warnings
from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, List, Value, Video, interleave_datasets, load_dataset
from datasets.exceptions import DatasetsError
from datasets.fingerprint import Hasher

from .. import __version__
from . import BadSample
from .formats import FAMILIES, Record, Row, as_list, count_images, resolve_path


logger = logging.getLogger(__name__)

COLUMNS = ("task", "source", "id", "bad", "messages", "images", "tools")  # of a record

# interleave_datasets needs one type per column, and contents of messages have several. datasets.Json does not fit: its
# parser refuses lone surrogates and large integers, so that one odd row would end the stream.
STREAM_FEATURES = Features({"record": Value("string"), "images": List(Image(decode=False))})


class JsonLines(Sequence):
    """A JSONL file as a sequence of rows, of which only the lines' positions are kept in memory."""

    def __init__(self, path: str | Path):
        self.path, starts, start, count = str(path), array("q"), 0, 0
        with open(self.path, "rb") as file:
            for line in file:
                starts.append(start)
                start += len(line)
                count = len(starts) if line.strip() else count
        self.starts = starts[:count]
        self.modified = os.stat(self.path).st_mtime_ns  # part of what datasets hashes

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Row:
        with open(self.path, "rb") as file:
            file.seek(self.starts[index])
            line = file.readline()
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:  # also other encodings, and numbers of too many digits
            raise BadSample(f"is line {index + 1} of {self.path}, which is not JSON: {error}") from error


class JsonList(Sequence):
    """
    The rows of a JSON file, in memory. datasets copies and hashes the tables of a mixture again and again, so copies
    share the rows, and the path and the time of the file's last change are hashed in their place.
    """

    def __init__(self, path: str | Path):
        self.path, self.modified = str(path), os.stat(path).st_mtime_ns
        self.rows = json.loads(Path(path).read_bytes())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def __deepcopy__(self, memo: dict) -> "JsonList":
        return self

    def __reduce__(self) -> tuple:
        return JsonList, (self.path,), {"modified": self.modified}


def _disable_decoding(feature: Any) -> Any:
    if isinstance(feature, (Image, Video)):
        return type(feature)(decode=False)
    return List(_disable_decoding(feature.feature), feature.length) if isinstance(feature, List) else feature


def disable_decoding(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """
    Return a dataset with images and videos, also in lists, as bytes and paths, so that whoever reads them can name the
    broken ones. Unlike [`~datasets.Dataset.cast`], this writes no copy. A transform gets what it got before.
    """
    if isinstance(dataset, IterableDataset):
        return dataset if dataset.features is None else dataset.decode(False)  # CSV has no images to decode
    features = Features({name: _disable_decoding(feature) for name, feature in dataset.features.items()})
    if features == dataset.features or dataset.format["type"] == "custom":
        return dataset
    fingerprint = Hasher.hash([dataset._fingerprint, "undecoded"])
    info = dataset.info.copy()
    info.features = features
    undecoded = Dataset(dataset.data, info, dataset.split, indices_table=dataset._indices, fingerprint=fingerprint)
    return undecoded.with_format(**dataset.format)


@dataclass
class Source:
    """
    One source of a mixture. docs/data.md explains the fields; those of TRL's `DatasetConfig` mean the same, except for
    `columns`. `task` is a key of `FAMILIES`, and `options` are that family's.

    Raises:
        ValueError: If the task is unknown, a number is not positive, or both `fraction` and `num_samples` are given.
    """

    task: str
    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, Any] | None = None
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)
    image_root: str | None = None
    allow_remote: bool = False
    streaming: bool = False
    fraction: float | None = None
    num_samples: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.task not in FAMILIES:
            raise ValueError(f"task is {self.task!r}, expected one of {', '.join(FAMILIES)}.")
        if self.fraction is not None and self.num_samples is not None:
            raise ValueError(f"{self.path} has a fraction and num_samples: give one of the two.")
        for name, kind, kinds in (("fraction", Real, "a number"), ("num_samples", Integral, "an integer")):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, kind) and 0 < value < math.inf):
                sentence = f"{self.path} has {name}={value!r}, expected {kinds} of more than 0"
                raise ValueError(f"{sentence}: leave out unwanted sources.")
        if self.path.endswith((".json", ".jsonl")):
            names = ("name", "data_dir", "data_files", "split", "streaming")
            if ignored := [name for name in names if getattr(self, name) != getattr(Source, name)]:
                raise ValueError(f"{self.path} is read line by line, without {', '.join(ignored)}: leave them out.")
        if unknown := self.options.keys() - inspect.signature(FAMILIES[self.task]).parameters.keys():
            raise ValueError(
                f"{self.path} has {', '.join(sorted(unknown))}, neither a key of sources nor an option of {self.task}."
            )

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> "Source":
        """Build a source from a dictionary. Keys that are not fields are options of the family."""
        if not isinstance(entry, Mapping) or not {"task", "path"} <= entry.keys():
            raise ValueError(f"A source must be a dictionary with `task` and `path`, but is {entry!r}.")
        entry = dict(entry)
        if "weight" in entry:
            warnings.warn("A source's `weight` is now called `fraction`, as in TRL.", FutureWarning, stacklevel=3)
            entry["fraction"] = entry.pop("weight")
        options = {name: entry.pop(name) for name in set(entry) - set(cls.__dataclass_fields__)}
        return cls(**{**entry, "options": {**entry.get("options", {}), **options}})

    @property
    def label(self) -> str:
        """The name of the source in messages and tables."""
        files = self.data_files or self.path
        files = as_list([*files.values()] if isinstance(files, Mapping) else files)
        files = [file for entry in files for file in as_list(entry)]
        return f"{files[0]} and more" if len(files) > 1 else files[0]

    def load(self) -> Sequence[Row] | IterableDataset:
        """Load the rows, with images and videos as paths and bytes."""
        if self.path.endswith(".jsonl"):
            return JsonLines(self.path)
        if self.path.endswith(".json"):  # LLaVA's `image` is a text or a list, which datasets' tables cannot hold
            try:
                table = JsonList(self.path)
            except (ValueError, RecursionError) as error:
                if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":  # one object per line
                    return JsonLines(self.path)
                raise ValueError(f"{self.path} is not JSON in UTF-8, or it is cut off: {error}.") from error
            if not isinstance(table.rows, list):
                raise ValueError(f"{self.path} holds {type(table.rows).__name__}, expected a list of samples.")
            return table
        options = {"split": self.split, "streaming": self.streaming}
        try:
            dataset = load_dataset(self.path, self.name, self.data_dir, self.data_files, **options)
        except (DatasetsError, ValueError) as error:
            raise ValueError(f"{self.label} cannot be loaded: {error.__cause__ or error}") from error
        return disable_decoding(dataset)

    def read(self, table: Sequence[Row] | Mapping[int, Row], index: int, seed: int) -> Record:
        """Return the record of a row, or one whose `bad` says why there is none. Random choices depend on `index`."""
        record = {**dict.fromkeys(COLUMNS), "task": self.task, "source": self.label, "id": f"row {index}"}
        try:
            row = table[index]
            if not isinstance(row, Mapping):
                raise BadSample(f"is {type(row).__name__}, expected an object with columns.")
            if isinstance(row.get("json"), Mapping):  # a webdataset sample's .json member
                row = {**row, **row["json"]}
            name = row.get("id", row.get("__key__"))
            record["id"] = f"row {index}" if name is None else f"{name} (row {index})"
            row = {**row, **{column: row.get(given) for column, given in self.columns.items()}}
            resolve = partial(resolve_path, image_root=self.image_root, allow_remote=self.allow_remote)
            rng = random.Random(f"{seed} {self.path} {index}")
            return record | FAMILIES[self.task](row, rng, resolve, **self.options)
        except BadSample as error:
            return record | {"bad": str(error)}


def load_mixture(
    sources: Sequence[Source | Mapping[str, Any]], seed: int = 0, size: int | None = None
) -> Dataset | IterableDataset:
    """
    Load a dataset of records from several sources, to train on with [`DataCollatorForVPiT`]. By default it holds every
    sample once. If any source streams, the mixture does, and fractions are probabilities.

    Args:
        sources (list of [`Source`] or `dict`): Keys of a dictionary that `Source` lacks are options of the family.
        seed (`int`, *optional*, defaults to 0): Decides the order, the samples drawn, and the wordings.
        size (`int`, *optional*): Number of samples of a mixture by fractions; defaults to what uses up one source.

    Raises:
        ValueError: If there are no sources, one is empty, or some have fractions and others do not.
    """
    sources = [source if isinstance(source, Source) else Source.from_dict(source) for source in sources]
    fractions = [source.fraction for source in sources]
    if not sources or (any(fractions) and not all(fractions)):
        raise ValueError("A mixture needs at least one source, and a fraction for every one or for none of them.")
    if size is not None and not any(fractions):
        raise ValueError("size needs fractions: without them, each source says how many samples it gives.")
    tables = [source.load() for source in sources]
    for source, table in zip(sources, tables):
        if not isinstance(table, IterableDataset) and not len(table):
            raise ValueError(f"{source.label} has no samples.")
    if any(isinstance(table, IterableDataset) for table in tables):
        return _interleave_streams(sources, tables, seed, size)
    counts = [source.num_samples or len(table) for source, table in zip(sources, tables)]
    if any(fractions):
        whole = min(len(table) / share for table, share in zip(tables, fractions)) * sum(fractions)
        size = size or int(round(whole, 6))  # rounds 5.9999999 to 6 first
        counts = [round(size * share / sum(fractions)) for share in fractions]
    generator, rows = np.random.default_rng(seed), []
    for table, count in zip(tables, counts):  # all rows as often as they fit, and a random part of them for the rest
        repeats, rest = divmod(count, len(table))
        rows += [np.tile(np.arange(len(table)), repeats), generator.permutation(len(table))[:rest]]
    order = generator.permutation(sum(counts))
    columns = {"source": np.repeat(np.arange(len(tables)), counts)[order], "row": np.concatenate(rows)[order]}
    return Dataset.from_dict(columns).with_transform(partial(_read_rows, sources=sources, tables=tables, seed=seed))


def cache_options(dataset: Dataset, name: str, *parts: Any) -> dict[str, Any]:
    """
    Return options of `dataset.map` with which other processes and later runs find its result in the cache of datasets.
    By itself datasets keeps the result for a mixture, which has no files, in memory, and cannot hash a model that has
    run. `parts` are all that the result depends on beside the dataset, and the directory of relative paths.
    """
    fingerprint = Hasher.hash([dataset._fingerprint, name, __version__, os.getcwd(), *parts])
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "metamorph_hf"
    folder.mkdir(parents=True, exist_ok=True)
    options = {"new_fingerprint": fingerprint, "load_from_cache_file": datasets.is_caching_enabled()}
    return {**options, "cache_file_name": str(folder / f"{name}-{fingerprint}.arrow")}


def _read_rows(columns: dict[str, list[int]], sources: list[Source], tables: list, seed: int) -> dict[str, list]:
    pairs = zip(columns["source"], columns["row"])
    records = [sources[source].read(tables[source], row, seed) for source, row in pairs]
    return {name: [record[name] for record in records] for name in COLUMNS}


def _interleave_streams(sources: list[Source], tables: list, seed: int, size: int | None) -> IterableDataset:
    """Return the mixture of sources of which at least one is a stream."""
    streams = [_stream_records(source, table, seed) for source, table in zip(sources, tables)]
    fractions = [source.fraction for source in sources]
    probabilities = [share / sum(fractions) for share in fractions] if all(fractions) else None
    strategy = "first_exhausted" if probabilities else "all_exhausted_without_replacement"
    mixture = interleave_datasets(streams, probabilities, seed, stopping_strategy=strategy)
    mixture = mixture.map(lambda columns: json.loads(columns["record"]), remove_columns="record")
    processes = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun and accelerate launch
    if 1 < processes <= mixture.num_shards:  # accelerate's prepare_data_loader gives each process whole shards then
        logger.warning(
            f"Each of the {processes} processes reads whole shards of the stream's {mixture.num_shards}, and if they "
            "are uneven, processes with smaller ones repeat their rows sooner. Write equal shards, as many as a "
            "multiple of the processes."
        )
    return mixture if size is None else mixture.take(size)


def _stream_records(source: Source, table: Sequence[Row] | IterableDataset, seed: int) -> IterableDataset:
    """Return a stream of a source's records, as JSON, and their images."""
    if isinstance(table, IterableDataset):
        columns = table.column_names or list(next(iter(table), {}))  # a CSV file's are not known before
        stream = table.map(_shuffle_rows, True, batched=True, batch_size=256, fn_kwargs={"seed": seed})
        table = None
    else:
        order = np.random.default_rng(seed).permutation(len(table))
        columns, stream = [], Dataset.from_dict({"row_index": order}).to_iterable_dataset()
    build = partial(_build_stream_record, source=source, table=table, seed=seed)
    stream = stream.map(build, remove_columns=[*columns, "row_index"], features=STREAM_FEATURES)
    return stream if source.num_samples is None else stream.repeat(None).take(source.num_samples)


def _shuffle_rows(rows: dict[str, list], indices: list[int], seed: int) -> dict[str, list]:
    """Shuffle a batch of rows. Unlike [`IterableDataset.shuffle`], this resumes from a state without losing rows."""
    order = np.random.default_rng([seed, indices[0]]).permutation(len(indices))
    return {name: [values[index] for index in order] for name, values in {**rows, "row_index": indices}.items()}


def _build_stream_record(row: Row, source: Source, table: Sequence[Row] | None, seed: int) -> dict[str, Any]:
    """Return the record of a row, or of the table's row, as JSON, and its images."""
    index = row.pop("row_index")
    record = source.read({index: row} if table is None else table, index, seed)
    images = record.pop("images") or []
    try:
        return {"record": json.dumps(record), "images": images}
    except (TypeError, ValueError, RecursionError) as error:  # dates and bytes in a Parquet file's messages, say
        bad = {"bad": f"has messages that are not JSON: {error}", "messages": None, "tools": None}
        return {"record": json.dumps(record | bad), "images": []}


def mixture_table(dataset: Dataset | IterableDataset, num_samples: int | None = 1000) -> str:
    """
    Summarize the first `num_samples` of a mixture (None: all) by task and source: samples, images in questions and in
    answers, the share of samples with an image in the answer, and bad samples.
    """
    counts: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for record in islice(dataset, num_samples):
        messages = [message for message in record["messages"] or [] if isinstance(message, Mapping)]
        answered = count_images([message for message in messages if message.get("role") == "assistant"])
        numbers = {"asked": count_images(messages) - answered, "answered": answered, "shown": answered > 0}
        counts[record["task"], record["source"]].update(samples=1, bad=record["bad"] is not None, **numbers)
    read = sum(count["samples"] for count in counts.values())
    lines = [f"{'task':<18}{'samples':>9}{'share':>8}{'images in':>11}{'images out':>12}{'draw':>7}{'bad':>6}  source"]
    for (task, source), count in sorted(counts.items()):
        samples = count["samples"]
        numbers = f"{samples:>9,}{samples / read:>8.1%}{count['asked']:>11,}{count['answered']:>12,}"
        lines.append(f"{task:<18}{numbers}{count['shown'] / samples:>7.0%}{count['bad']:>6}  {source}")
    total = f", the first of {len(dataset):,}" if isinstance(dataset, Dataset) and len(dataset) > read else ""
    return "\n".join([*lines, f"{read:,} samples read{total}"])
