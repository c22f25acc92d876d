import copy
import datetime
import io
import json
import math
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path

import datasets
import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets import Image as ImageFeature
from datasets.fingerprint import Hasher
from helpers import LLAVA, ROWS, write_jsonl
from PIL import Image
from torch.utils.data import DataLoader

from metamorph_hf.data import BadSample
from metamorph_hf.data.mixture import JsonLines, JsonList, Source, disable_decoding, load_mixture, mixture_table
from metamorph_hf.image_reading import read_image
from metamorph_hf.vpit.collator import DataCollatorForVPiT


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 seconds per iterator


class TestReading:
    @pytest.mark.parametrize("end", ["\n", ""])
    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_json_lines(self, tmp_path, count, end):
        rows = [{"n": number, "text": "ä\u2028" * number} for number in range(count)]
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + (end if count else ""))
        assert list(JsonLines(path)) == rows

    def test_broken_lines_are_named(self, tmp_path):
        path = write_jsonl(tmp_path / "rows.jsonl", [{"n": 0}, '{"n": '])
        with pytest.raises(BadSample, match="is line 2 of .*rows.jsonl, which is not JSON"):
            JsonLines(path)[1]

    def test_a_million_lines_in_little_memory(self, tmp_path):
        path = tmp_path / "many.jsonl"
        path.write_bytes(b"".join(b'{"n": %d, "text": "%s"}\n' % (n, b"x" * 40) for n in range(1_000_000)))
        tracemalloc.start()
        lines = JsonLines(path)
        assert len(lines) == 1_000_000 and lines[765_432]["n"] == 765_432
        assert tracemalloc.get_traced_memory()[1] < 100e6  # the file has 60 MB, the index 8
        tracemalloc.stop()

    @pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n  \r\n"])
    def test_empty_lines_at_the_end(self, tmp_path, end):
        (tmp_path / "lines.jsonl").write_bytes(b'{"a": 1}\n{"a": 2}' + end.encode())
        assert [row["a"] for row in JsonLines(tmp_path / "lines.jsonl")] == [1, 2]

    LINES = ['{"id": 0}', '{"id": 1}']

    @pytest.mark.parametrize(
        "content",
        [
            "\n".join(LINES).encode(),
            b"\xef\xbb\xbf[" + ", ".join(LINES).encode() + b"]",
            "[{},{}]".format(*LINES).encode(),
        ],
        ids=["JSON lines", "byte-order mark", "list"],
    )
    def test_json_files(self, tmp_path, content):
        (tmp_path / "rows.json").write_bytes(content)
        assert list(Source("chat", str(tmp_path / "rows.json")).load()) == [{"id": 0}, {"id": 1}]

    def test_byte_order_mark_of_json_lines(self, tmp_path):
        (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(self.LINES).encode())
        assert list(JsonLines(tmp_path / "rows.jsonl")) == [{"id": 0}, {"id": 1}]

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b'[{"id": 0}, {"id"', "rows.json is not JSON in UTF-8, or it is cut off: .*line 1 column"),
            ('[{"id": "\xe9"}]'.encode("latin-1"), "rows.json is not JSON in UTF-8"),
            (b'{"a": [1]}', "rows.json holds dict, expected a list"),
            (None, "rows.json"),
        ],
    )
    def test_broken_json_files_are_named(self, tmp_path, content, reason):
        if content is not None:
            (tmp_path / "rows.json").write_bytes(content)
        with pytest.raises((ValueError, FileNotFoundError), match=reason):
            Source("chat", str(tmp_path / "rows.json")).load()

    def test_rows_of_a_json_file_are_neither_copied_nor_hashed(self, tmp_path):
        """datasets does both with the tables of a mixture, for each of its operations."""
        path = tmp_path / "rows.json"
        path.write_text(json.dumps([{"id": number} for number in range(1000)]))
        rows = JsonList(path)
        assert copy.deepcopy(rows) is rows
        pickled = pickle.dumps(rows)
        assert list(pickle.loads(pickled)) == list(rows) and len(pickled) < 500
        same, hashed = Hasher.hash(JsonList(path)), Hasher.hash(rows)
        os.utime(path, ns=(10**18, 10**18))
        assert hashed == same != Hasher.hash(JsonList(path))

    @pytest.mark.parametrize("split", ["train", "train[1:]"])
    def test_tables_of_images_are_not_copied(self, tmp_path, monkeypatch, split):
        """Their images come as bytes, from the one copy that datasets has made."""
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        images = [[Image.new("RGB", (8, 8), (number, 0, 0))] * number for number in range(3)]
        features = Features({"images": List(ImageFeature()), "image": ImageFeature(), "text": Value("string")})
        columns = {"images": images, "image": [Image.new("L", (4, 4))] * 3, "text": ["a", "b", "c"]}
        Dataset.from_dict(columns, features).to_parquet(tmp_path / "rows.parquet")
        table = Source("chat", "parquet", data_files=str(tmp_path / "rows.parquet"), split=split).load()
        assert not list((tmp_path / "cache").rglob("cache-*"))
        assert [row["text"] for row in table] == ["a", "b", "c"][-len(table) :]
        assert len(table[len(table) - 1]["images"]) == 2
        for image in (table[0]["image"], table[len(table) - 1]["images"][0]):
            assert image["bytes"].startswith(b"\x89PNG")
        chosen = disable_decoding(Dataset.from_dict(columns, features).select([2, 0]))
        assert chosen["text"][:] == ["c", "a"] and chosen[0]["images"][0]["bytes"]

    def test_rows_that_are_not_objects_are_named(self, tmp_path):
        (tmp_path / "rows.json").write_text(json.dumps(["a", None, ROWS["chat"]]))
        bad = {record["id"]: record["bad"] for record in load_mixture([Source("chat", str(tmp_path / "rows.json"))])}
        assert bad["row 0"] == "is str, expected an object with columns."
        assert bad["row 1"] == "is NoneType, expected an object with columns." and bad["row 2"] is None


class TestMixture:
    @pytest.fixture
    def sources(self, tmp_path, pictures):
        chats = [{"id": f"chat-{n}", **ROWS["chat"]} for n in range(30)]
        captions = [{"caption": f"gray {n}", "image": f"{n}.png"} for n in range(10)]
        return [
            {"task": "chat", "path": write_jsonl(tmp_path / "chat.jsonl", chats)},
            {
                "task": "text_to_image",
                "path": write_jsonl(tmp_path / "t2i.jsonl", captions),
                "image_root": str(pictures),
            },
        ]

    def count(self, dataset) -> dict[str, int]:
        tasks = [record["task"] for record in dataset]
        return {task: tasks.count(task) for task in sorted(set(tasks))}

    def test_all_once(self, sources):
        mixture = load_mixture(sources)
        assert self.count(mixture) == {"chat": 30, "text_to_image": 10}
        assert len({(record["source"], record["id"]) for record in mixture}) == 40

    @pytest.mark.parametrize("count", [1, 7, 25])
    def test_counts(self, sources, count):
        """The paper's ablation: all understanding samples, and so many generation samples."""
        mixture = load_mixture([sources[0], {**sources[1], "num_samples": count}])
        assert self.count(mixture) == {"chat": 30, "text_to_image": count}
        ids = [record["id"] for record in mixture if record["task"] == "text_to_image"]
        assert max(ids.count(name) for name in ids) == -(-count // 10)

    @pytest.mark.parametrize(("size", "expected"), [(None, (10, 10)), (60, (30, 30))])
    def test_fractions(self, sources, size, expected):
        mixture = load_mixture([{**source, "fraction": 2.0} for source in sources], size=size)
        assert tuple(self.count(mixture).values()) == expected

    @pytest.mark.parametrize(("fractions", "expected"), [((0.7, 0.7), 6), ((0.3, 0.3, 0.3), 9)])
    def test_fractions_use_up_a_source(self, tmp_path, fractions, expected):
        """Rounding of floats loses no sample: 3 / 0.7 * 1.4 is 5.999..."""
        path = write_jsonl(tmp_path / "chat.jsonl", [ROWS["chat"]] * 3)
        assert (
            len(load_mixture([{"task": "chat", "path": path, "fraction": share} for share in fractions])) == expected
        )

    def test_no_rows(self, sources):
        mixture = load_mixture(sources)
        assert mixture[:0] == mixture.select([])[:] == {name: [] for name in mixture[0]}

    def test_seeds(self, sources):
        first, again, other = (list(load_mixture(sources, seed=seed)) for seed in (0, 0, 1))
        assert first == again != other
        assert sorted(r["id"] for r in first) == sorted(r["id"] for r in other)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_workers(self, sources, tiny_processor, workers):
        """Rows that cannot be read are skipped and named, in any process."""
        with open(sources[0]["path"], "a") as file:
            file.write("{broken\n")
        collate = DataCollatorForVPiT(tiny_processor, on_bad_sample="skip")
        batches = list(DataLoader(load_mixture(sources), batch_size=4, num_workers=workers, collate_fn=collate))
        assert sum(len(batch["sample_ids"]) for batch in batches) == 40
        (rejected,) = [sample for batch in batches for sample in batch.get("rejected", [])]
        assert rejected["sample"].startswith("Example row 30 of") and "line 31" in rejected["reason"]

    def test_streaming(self, sources, tmp_path, pictures):
        """A stream has the same samples, and it resumes where its state was saved."""
        rows = [{"caption": f"gray {n}", "image": str(pictures / f"{n}.png")} for n in range(10)]
        Dataset.from_list(rows).cast_column("image", ImageFeature()).to_parquet(tmp_path / "t2i.parquet")
        stream = {"task": "text_to_image", "path": "parquet", "data_files": str(tmp_path / "t2i.parquet")}
        mixture = load_mixture([sources[0], {**stream, "streaming": True}])
        assert isinstance(mixture, IterableDataset)
        assert self.count(mixture) == {"chat": 30, "text_to_image": 10}
        whole = [(record["source"], record["id"]) for record in mixture]
        iterator = iter(mixture)
        begun = [(record["source"], record["id"]) for record in (next(iterator) for _ in range(13))]
        resumed = load_mixture([sources[0], {**stream, "streaming": True}])
        resumed.load_state_dict(mixture.state_dict())
        assert begun + [(record["source"], record["id"]) for record in resumed] == whole
        not_streaming = load_mixture([stream])
        assert read_image(not_streaming[0]["images"][0]).size == (20, 16)

    def test_streams_are_shuffled_and_repeated(self, tmp_path):
        rows = [{"id": str(n), **ROWS["chat"]} for n in range(12)]
        Dataset.from_list(rows).to_parquet(tmp_path / "chat.parquet")
        source = {"task": "chat", "path": "parquet", "data_files": str(tmp_path / "chat.parquet"), "streaming": True}

        def read(seed, **options):
            return [record["id"] for record in load_mixture([{**source, **options}], seed=seed)]

        assert read(0) == read(0) != read(1)
        assert sorted(read(0)) == sorted(read(1)) == sorted(f"{n} (row {n})" for n in range(12))
        drawn = read(0, num_samples=30)
        assert len(drawn) == 30 and {drawn.count(name) for name in drawn} == {2, 3}

    def test_odd_rows_do_not_end_a_stream(self, tmp_path):
        """Lone surrogates, dates and files without types are read, or refused by name."""
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "\ud83d"}]
        lines = {"task": "chat", "path": write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}, "[1]"])}
        (tmp_path / "rows.csv").write_text("caption,image\na cat,1.png\n")
        table = {"task": "text_to_image", "path": "csv", "data_files": str(tmp_path / "rows.csv"), "streaming": True}
        dated = [{"messages": [{"role": "user", "content": "hi", "date": datetime.datetime(2024, 1, 1)}]}]
        Dataset.from_list(dated).to_parquet(tmp_path / "dated.parquet")
        dates = {"task": "chat", "path": "parquet", "data_files": str(tmp_path / "dated.parquet"), "streaming": True}
        records = list(load_mixture([lines, table, dates]))
        bad = [record["bad"] for record in records if record["bad"] is not None]
        assert sorted(bad) == [
            "has messages that are not JSON: Object of type datetime is not JSON serializable",
            "is list, expected an object with columns.",
        ]
        assert messages in [record["messages"] for record in records]
        assert [record["images"] for record in records if record["task"] == "text_to_image"][0] == ["1.png"]

    MEMBERS = {
        "text_to_image": ({"jpg": "2.png", "txt": b"a gray square."}, {}),
        "image_to_image": (
            {"source.png": "3.png", "target.png": "4.png", "json": b'{"instruction": "Make it brighter."}'},
            {"source": "source.png", "target": "target.png"},
        ),
        "llava": (
            {"png": "1.png", "json": json.dumps({"conversations": LLAVA["conversations"]}).encode()},
            {"image": "png"},
        ),
        "reconstruction": ({"webp": "6.png"}, {}),
        "video_prediction": ({"mp4": None}, {}),
        "video_qa": ({"mp4": None, "json": json.dumps(ROWS["video_qa"]).encode()}, {}),
        "visual_thinking": ({"jpg": "5.png", "json": json.dumps(ROWS["visual_thinking"]).encode()}, {"image": "jpg"}),
        "chat": ({"png": "1.png", "json": json.dumps(ROWS["chat"]).encode()}, {"images": "png"}),
    }

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("task", [*MEMBERS, "text_to_image json"])
    def test_webdataset(self, tiny_processor, pictures, video, tmp_path, task, streaming):
        """The members of a tar file are columns, and so are the keys of its .json members."""
        task, _, json_caption = task.partition(" ")
        members, columns = self.MEMBERS[task]
        if json_caption:
            members = {"jpg": "2.png", "json": b'{"caption": "a gray square."}'}
        with tarfile.open(tmp_path / "shard.tar", "w") as tar:
            for number in range(3):
                for ending, content in members.items():
                    data = video.read_bytes() if content is None else content
                    data = (pictures / content).read_bytes() if isinstance(content, str) else data
                    member = tarfile.TarInfo(f"{number:04}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        source = {"task": task, "path": "webdataset", "data_files": str(tmp_path / "shard.tar"), "columns": columns}
        records = list(load_mixture([{**source, "streaming": streaming}]))
        assert sorted(record["id"] for record in records) == [f"{n:04} (row {n})" for n in range(3)]
        batch = DataCollatorForVPiT(tiny_processor)(records)
        assert (batch["labels"] != -100).any(1).all() and "pixel_values" in batch
        if task == "text_to_image":
            assert "a gray square" in tiny_processor.tokenizer.decode(batch["input_ids"][0])

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("resume_after", [0, 3])
    def test_two_processes_share_the_samples(self, sources, tiny_processor, tmp_path, streaming, resume_after):
        """As accelerate distributes them to Trainer's processes, from the start or the middle of an epoch."""
        if streaming:
            for shard in range(2):
                rows = [{"id": f"{shard}-{n}", **ROWS["chat"]} for n in range(20)]
                Dataset.from_list(rows).to_parquet(tmp_path / f"{shard}.parquet")
            files = [str(tmp_path / f"{shard}.parquet") for shard in range(2)]
            sources = [{"task": "chat", "path": "parquet", "data_files": files, "streaming": True}]
        seen = []
        for process in range(2):
            loader = DataLoader(load_mixture(sources), batch_size=4, collate_fn=DataCollatorForVPiT(tiny_processor))
            sharding = {"num_processes": 2, "process_index": process, "put_on_device": False}
            loader = prepare_data_loader(loader, dispatch_batches=False, **sharding)
            batches = [batch["sample_ids"] for batch in skip_first_batches(loader, resume_after)]
            assert len(batches) == 5 - resume_after
            seen += [name for names in batches for name in names]
        assert len(seen) == len(set(seen)) == 40 - 2 * 4 * resume_after

    @pytest.mark.parametrize(
        ("lengths", "batches_of"),
        [((4, 12), [1, 3]), ((8, 4, 4), [3, 1]), ((16,), [2, 2])],
        ids=["uneven", "not divisible", "one shard"],
    )
    def test_uneven_shards_are_named(self, tiny_processor, tmp_path, monkeypatch, caplog, lengths, batches_of):
        """Processes read whole shards: a pass loses no sample and sees none twice, but one process ends early."""
        monkeypatch.setenv("WORLD_SIZE", "2")
        files = [str(tmp_path / f"{shard}.parquet") for shard in range(len(lengths))]
        for file, length in zip(files, lengths):
            Dataset.from_list([{"id": f"{Path(file).stem}-{n}", **ROWS["chat"]} for n in range(length)]).to_parquet(
                file
            )
        sources = [{"task": "chat", "path": "parquet", "data_files": files, "streaming": True}]
        seen, counts = [], []
        for process in range(2):
            loader = DataLoader(load_mixture(sources), batch_size=4, collate_fn=DataCollatorForVPiT(tiny_processor))
            sharding = {"num_processes": 2, "process_index": process, "put_on_device": False}
            loader = prepare_data_loader(loader, dispatch_batches=False, **sharding)
            batches = [batch["sample_ids"] for batch in loader]
            resumed = skip_first_batches(loader, 1)  # as Trainer does
            assert [batch["sample_ids"] for batch in resumed] == batches[1:]
            counts.append(len(batches))
            seen += [name.split()[1] for names in batches for name in names]
        assert len(seen) == len(set(seen)) == 16
        assert counts == batches_of
        assert ("repeat their rows sooner" in caplog.text) == (len(lengths) > 1)

    def test_table(self, sources):
        with open(sources[0]["path"], "a") as file:
            file.write("{broken\n")
        table = [line.split() for line in mixture_table(load_mixture(sources)).splitlines()]
        assert table[1][:7] == ["chat", "31", "75.6%", "0", "0", "0%", "1"]
        assert table[2][:7] == ["text_to_image", "10", "24.4%", "0", "10", "100%", "0"]
        assert mixture_table(load_mixture(sources), 5).endswith("5 samples read, the first of 41")

    @pytest.mark.parametrize(
        ("entries", "reason"),
        [
            ([], "at least one source"),
            ([{"task": "poem", "path": "x"}], "task is 'poem', expected one of chat"),
            (
                [{"task": "chat", "path": "x.jsonl", "split": "test", "streaming": True}],
                "x.jsonl is read line by line, without split, streaming: leave them out",
            ),
            ([{"path": "x"}], "must be a dictionary with `task` and `path`, but is {'path': 'x'}"),
            (["x"], "must be a dictionary with `task` and `path`, but is 'x'"),
            ([{"task": "chat", "path": "x", "fraction": math.nan}], "fraction=nan, expected a number of more than 0"),
            ([{"task": "chat", "path": "x", "num_samples": "5"}], "num_samples='5', expected an integer"),
            ([{"task": "chat", "path": "x", "num_samples": 2.5}], "num_samples=2.5, expected an integer"),
            (
                [{"task": "chat", "path": "x", "colums": {}}],
                "has colums, neither a key of sources nor an option of chat",
            ),
            ([{"task": "chat", "path": "x", "fraction": 1, "num_samples": 2}], "one of the two"),
            ([{"task": "chat", "path": "x", "fraction": 0}], "more than 0"),
            (
                [{"task": "chat", "path": "a", "fraction": 1}, {"task": "chat", "path": "b"}],
                "every one or for none",
            ),
        ],
    )
    def test_refused(self, entries, reason):
        with pytest.raises(ValueError, match=reason):
            load_mixture(entries)

    def test_broken_tables_are_named(self, tmp_path):
        (tmp_path / "table.parquet").write_bytes(b"no table")
        (tmp_path / "chat").mkdir()
        (tmp_path / "chat" / "rows.json").write_text("no rows")
        for name, options in (("parquet", {"data_files": str(tmp_path / "table.parquet")}), (tmp_path / "chat", {})):
            path = options.get("data_files", str(name))
            with pytest.raises(ValueError, match=f"^{path} cannot be loaded: "):
                load_mixture([{"task": "chat", "path": str(name), **options}])

    def test_weight_is_the_old_name_of_fraction(self, sources):
        with pytest.warns(FutureWarning, match="`weight` is now called `fraction`"):
            mixture = load_mixture([{**source, "weight": 1.0} for source in sources])
        assert self.count(mixture) == {"chat": 10, "text_to_image": 10}

    @pytest.mark.parametrize("streaming", [False, True])
    def test_data_files_of_any_form(self, tmp_path, streaming):
        file = str(tmp_path / "chat.parquet")
        Dataset.from_list([ROWS["chat"]]).to_parquet(file)
        for form, label in ((file, file), ([file], file), ({"train": file}, file), ([file, file], f"{file} and more")):
            source = {"task": "chat", "path": "parquet", "data_files": form, "streaming": streaming}
            assert next(iter(load_mixture([source])))["source"] == label

    def test_empty(self, tmp_path):
        (tmp_path / "empty.jsonl").touch()
        with pytest.raises(ValueError, match="empty.jsonl has no samples"):
            load_mixture([Source("chat", str(tmp_path / "empty.jsonl"))])
