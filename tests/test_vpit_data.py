import copy
import io
import json
import random
import re
import tarfile
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset, IterableDataset, List
from datasets import Image as ImageFeature
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from metamorph_hf.data import formats as vpit_families
from metamorph_hf.data.formats import FAMILIES, WORDINGS, video_frames
from metamorph_hf.data.mixture import JsonLines, Source, load_mixture, mixture_table
from metamorph_hf.image_reading import BadSample, read_image
from metamorph_hf.vpit.collator import DataCollatorForVPiT


GOLDEN_CHATS = json.loads((Path(__file__).parent / "golden" / "llama3_chat_golden.json").read_text())["cases"]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Ten pictures, each of its own grey."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(10):
        Image.new("RGB", (20, 16), (25 * number,) * 3).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def video(tmp_path_factory) -> Path:
    """Ten seconds; frame by frame brighter. 10 frames a second in the first half, 2 in the second."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    times = [*np.arange(0, 5, 0.1), *np.arange(5, 10, 0.5)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for time in times:
            grey = np.full((32, 32, 3), round(20 + 20 * time), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


LLAVA = {
    "id": "a",
    "image": "1.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A grey."}],
}
ROWS = {
    "chat": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]},
    "llava": LLAVA,
    "text_to_image": {"caption": "a grey square.", "image": "2.png"},
    "image_to_image": {"source": "3.png", "instruction": "Make it brighter.", "target": "4.png"},
    "visual_thinking": {"image": "5.png", "question": "Which?", "answer": "This.", "boxes": [2, 2, 10, 12]},
    "video_qa": {"conversations": [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "Light."}]},
    "video_prediction": {},
}


@pytest.fixture
def row(pictures, video):
    """Makes a row of a family with all paths in place."""

    def make(family: str) -> dict:
        made = {k: str(pictures / v) if str(v).endswith(".png") else v for k, v in ROWS[family].items()}
        return made | ({"video": str(video)} if family.startswith("video") else {})

    return make


class TestFamilies:
    # What stands in the labels, word by word; IMAGE is four visual targets, _ what is only context.
    ANSWERS = {
        "chat": ["Hello.", "<|eot_id|>"],
        "llava": ["A grey.", "<|eot_id|>"],
        "image_to_image": ["<image_start>", "IMAGE", "<image_end>", "<|eot_id|>"],
        "video_qa": ["Light.", "<|eot_id|>"],
    }

    def answer(self, batch, processor, row=0) -> list[str]:
        """The learned labels of a row, images as one word, in reading order."""
        labels, words = batch["labels"][row], []
        learned = labels[labels != -100].tolist()
        place = 0
        while place < len(learned):
            if learned[place] == processor.image_token_id:
                assert learned[place : place + 4] == [processor.image_token_id] * 4
                words.append("IMAGE")
                place += 4
                continue
            words.append(learned[place])
            place += 1
        return words

    def words(self, processor, expected: list[str]) -> list:
        ids = []
        for word in expected:
            if word == "IMAGE":
                ids.append(word)
            elif word.startswith("<"):
                ids.append(processor.tokenizer.convert_tokens_to_ids(word))
            else:
                ids += processor.tokenizer(word, add_special_tokens=False).input_ids
        return ids

    @pytest.mark.parametrize("family", ANSWERS)
    def test_answers_are_targets(self, llama3_processor, row, family):
        record = FAMILIES[family](row(family), random.Random(0))
        batch = DataCollatorForVPiT(llama3_processor)([record])
        assert self.answer(batch, llama3_processor) == self.words(llama3_processor, self.ANSWERS[family])
        is_image = batch["input_ids"][0] == llama3_processor.image_token_id
        assert is_image.sum() == 4 * len(record["images"])

    @pytest.mark.parametrize("seed", range(4))
    def test_text_to_image(self, llama3_processor, row, seed):
        record = FAMILIES["text_to_image"](row("text_to_image"), random.Random(seed))
        question, answer = record["messages"][0]["content"], record["messages"][1]["content"]
        assert "a grey square" in question[0]["text"] and "square.." not in question[0]["text"]
        lead = [part["text"] for part in answer if part["type"] == "text"]
        expected = [*lead, "<image_start>", "IMAGE", "<image_end>", "<|eot_id|>"]
        batch = DataCollatorForVPiT(llama3_processor)([record])
        assert self.answer(batch, llama3_processor) == self.words(llama3_processor, expected)

    @pytest.mark.parametrize("show", ["crop", "boxes"])
    @pytest.mark.parametrize("seed", range(4))
    def test_visual_thinking(self, llama3_processor, row, show, seed):
        record = FAMILIES["visual_thinking"](row("visual_thinking"), random.Random(seed), show=show)
        whole, shown = record["images"]
        assert shown.size == ((8, 10) if show == "crop" else whole.size)
        if show == "boxes":
            assert shown.getpixel((2, 2)) == (255, 0, 0) and whole.getpixel((2, 2)) == (125, 125, 125)
        thought = [part["text"] for part in record["messages"][1]["content"] if part["type"] == "text"][:-1]
        expected = [*thought, "<image_start>", "IMAGE", "<image_end>", "This.", "<|eot_id|>"]
        batch = DataCollatorForVPiT(llama3_processor)([record])
        assert self.answer(batch, llama3_processor) == self.words(llama3_processor, expected)

    @pytest.mark.parametrize("kind", WORDINGS)
    @pytest.mark.parametrize("seed", range(3))
    def test_video_prediction(self, llama3_processor, row, kind, seed):
        options = {"kinds": [kind], "min_seconds": 0.5, "max_seconds": 1.5}
        record = FAMILIES["video_prediction"](row("video_prediction"), random.Random(seed), **options)
        question, answer = (message["content"] for message in record["messages"])
        asked = sum(part["type"] == "image" for part in question)
        grey = [np.asarray(image).mean() for image in record["images"]]
        order = np.argsort(np.argsort(grey[:asked])).tolist(), grey[asked:]
        if kind == "time_between":
            assert asked == len(grey) and answer[0]["text"].split()[1].startswith("second")
            seconds = float(answer[0]["text"].split()[0])
            assert np.diff(grey).mean() == pytest.approx(20 * seconds, abs=6)
        elif kind == "reverse":
            assert grey[asked:] == grey[:asked][::-1]
        elif kind == "reorder":
            assert grey[asked:] == sorted(grey[:asked])
        elif kind == "every_other":
            assert sorted(grey) == [
                g for pair in zip(grey[:asked], [*grey[asked:], None]) for g in pair if g is not None
            ]
        else:
            assert grey == sorted(grey) and len(grey) > asked
            assert len(grey) - asked <= 3 or kind != "next_images"
        assert order[0] == sorted(order[0]) or kind == "reorder"
        batch = DataCollatorForVPiT(llama3_processor)([record])
        drawn = (batch["labels"] == llama3_processor.image_token_id).sum().item()
        assert drawn == 4 * (len(grey) - asked)

    @pytest.mark.parametrize("case", GOLDEN_CHATS)
    def test_llava_is_the_released_form(self, llama3_processor, pictures, case):
        """The released preprocessing's ids for its own data."""
        golden = GOLDEN_CHATS[case]
        count = sum(turn["value"].count("<image>") for turn in golden["conversation"])
        row = {"conversations": golden["conversation"], "image": [str(pictures / "0.png")] * count}
        batch = DataCollatorForVPiT(llama3_processor)([FAMILIES["llava"](row, random.Random(0))])
        expected = [t for token in golden["input_ids"] for t in ([128258] * 4 if token == -200 else [token])]
        assert batch["input_ids"][0].tolist() == expected

    def test_frames_by_their_time_stamps(self, video):
        """The second half has fewer frames: counted by index it would be over too soon."""
        grey = [np.asarray(frame).mean() for frame in video_frames(str(video), 1.0)]
        assert grey == pytest.approx([20 + 20 * second for second in range(10)], abs=6)
        assert len(video_frames(str(video), 0.1, limit=7)) == 7

    @pytest.mark.parametrize("part", [0.3, 0.5, 0.9])
    @pytest.mark.parametrize("form", ["bytes", "path"])
    def test_a_video_that_breaks_off_is_named(self, tmp_path, part, form):
        """A file whose index stands first opens and decodes without an error as far as it goes."""
        path = tmp_path / "clip.mp4"
        with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            noise = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), dtype=np.uint8)
            for picture in noise:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        whole = path.read_bytes()
        assert len(video_frames(str(path), 0.5)) == 8
        path.write_bytes(whole[: int(part * len(whole))])
        video = str(path) if form == "path" else {"bytes": path.read_bytes(), "path": "clip.mp4"}
        mixture = load_mixture(
            [
                {
                    "task": "video_qa",
                    "path": write_jsonl(tmp_path / "rows.jsonl", [{**ROWS["video_qa"], "video": str(path)}]),
                }
            ]
        )
        assert mixture[0]["id"] == "row 0" and "breaks off after" in mixture[0]["bad"]
        with pytest.raises(BadSample, match=r"breaks off after [0-3]\.\d of 4\.0 s \(.*clip\.mp4\)"):
            video_frames(video, 0.5)
        assert len(video_frames(video, 0.5, limit=1)) == 1  # what comes before the break is whole

    def test_frames_of_a_question_are_capped(self, row):
        record = FAMILIES["video_qa"](row("video_qa"), random.Random(0), fps=2.0, max_frames=4)
        grey = [np.asarray(image).mean() for image in record["images"]]
        assert [(g - 20) / 20 for g in grey] == pytest.approx([0, 2.5, 5, 7.5], abs=0.3)  # the times they are of

    def test_frames_of_a_long_video_are_not_all_held(self, row, monkeypatch):
        wanted = []
        monkeypatch.setattr(
            vpit_families, "video_frames", lambda video, seconds: wanted.append(seconds) or [Image.new("RGB", (8, 8))]
        )
        FAMILIES["video_qa"](row("video_qa"), random.Random(0), fps=1000.0, max_frames=4)
        assert wanted == [pytest.approx(2.5, abs=0.2)]

    @pytest.mark.parametrize(
        ("family", "change", "reason"),
        [
            ("chat", {"messages": None}, "has none of the columns messages"),
            ("chat", {"messages": "hello"}, "has messages of type str"),
            ("llava", {"conversations": [{"from": "robot", "value": "hi"}]}, "LLaVA's form does not know"),
            ("llava", {"conversations": 3}, "no list of turns"),
            ("text_to_image", {"caption": " "}, "has the caption ' '"),
            ("image_to_image", {"instruction": None}, "none of the columns instruction"),
            ("visual_thinking", {"boxes": [2, 2, 30, 12]}, "not inside its 20x16 picture"),
            ("visual_thinking", {"boxes": [10, 2, 2, 12]}, "not inside"),
            ("visual_thinking", {"boxes": ["a", 2, 3, 4]}, "expected \\[left, top, right, bottom\\]"),
            ("visual_thinking", {"image": "/no/such.png"}, "cannot be read \\(/no/such.png\\)"),
            ("video_qa", {"video": "/no/such.mp4"}, "video that cannot be read \\(/no/such.mp4\\)"),
            ("video_qa", {"conversations": [{"from": "human", "value": "What?"}]}, "0 places for its video"),
            ("video_prediction", {"video": b"broken"}, "video that cannot be read"),
        ],
    )
    def test_bad_rows_are_named(self, row, family, change, reason):
        with pytest.raises(BadSample, match=reason):
            FAMILIES[family]({**row(family), **change}, random.Random(0))


class TestReadImage:
    def bytes_of(self, image, kind="PNG", **options):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    def test_depths_and_modes(self):
        deep = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
        assert np.asarray(read_image(self.bytes_of(deep)))[0, :, 0].tolist() == [0, 128, 255]
        red = Image.new("RGB", (4, 4), "red")
        for image, kind in ((red.convert("CMYK"), "JPEG"), (red.convert("P"), "PNG"), (red.convert("P"), "GIF")):
            found = read_image(self.bytes_of(image, kind))
            assert found.mode == "RGB" and np.allclose(np.asarray(found)[0, 0], [255, 0, 0], atol=6)
        two = self.bytes_of(red, "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), "blue")])
        assert np.allclose(np.asarray(read_image(two))[0, 0], [255, 0, 0], atol=6)  # an animation's first frame

    def test_transparent_is_white(self):
        clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
        for kind in ("PNG", "WEBP"):
            assert read_image(self.bytes_of(clear, kind, lossless=True)).getpixel((0, 0)) == (255, 255, 255)
        palette = clear.convert("P")
        palette.info["transparency"] = palette.getpixel((0, 0))
        assert read_image(palette).getpixel((0, 0)) == (255, 255, 255)
        half = Image.new("LA", (4, 4), (0, 128))
        assert read_image(half).getpixel((0, 0)) == (127, 127, 127)

    def test_exif_turns(self):
        image = Image.new("RGB", (8, 4), "white")
        exif = Image.Exif()
        exif[0x0112] = 6
        assert read_image(self.bytes_of(image, "JPEG", exif=exif)).size == (4, 8)

    @pytest.mark.parametrize("kind", ["path", "bytes", "pil", "datasets", "Path"])
    def test_forms(self, pictures, kind):
        path = pictures / "4.png"
        image = {
            "path": str(path),
            "Path": path,
            "bytes": path.read_bytes(),
            "pil": Image.open(path),
            "datasets": {"bytes": path.read_bytes(), "path": None},
        }[kind]
        assert read_image(image).getpixel((0, 0)) == (100, 100, 100)

    @pytest.mark.parametrize(
        ("image", "reason"),
        [
            ("/no/such.png", "cannot be read"),
            (b"", "cannot be read"),
            (b"no picture", "cannot be read"),
            (None, "cannot be read"),
            ({"bytes": None, "path": None}, "cannot be read"),
            (17, "cannot be read"),
        ],
    )
    def test_unreadable(self, image, reason):
        with pytest.raises(BadSample, match=reason):
            read_image(image)

    def test_truncated(self):
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
        for kind in ("JPEG", "PNG"):
            with pytest.raises(BadSample, match="cannot be read"):
                read_image(self.bytes_of(noise, kind)[:2000])

    def test_bomb(self, tmp_path):
        Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
        with pytest.raises(BadSample, match="too large to be safe .*bomb.png"):
            read_image(str(tmp_path / "bomb.png"))


class TestCollator:
    def example(self, *turns, images=()):
        messages = []
        for number, turn in enumerate(turns):
            content = [{"type": "image"} if part == "*" else {"type": "text", "text": part} for part in turn]
            messages.append({"role": ("user", "assistant")[number % 2], "content": content})
        return {"messages": messages, "images": list(images)}

    def test_where_images_stand(self, tiny_processor, pictures):
        """A list, a single one, or within the parts as the standard chat form has them."""
        example, path = self.example(["*", "a"], ["b"]), str(pictures / "4.png")
        listed = {**example, "images": [path]}
        del example["images"]
        single = {**example, "image": path}
        within = copy.deepcopy(example)
        within["messages"][0]["content"][0]["image"] = Image.open(path)
        expected, *others = (DataCollatorForVPiT(tiny_processor)([each]) for each in (listed, single, within))
        for found in others:
            assert torch.equal(found["pixel_values"], expected["pixel_values"])
        with pytest.raises(BadSample, match="has `images` of type str, expected a list"):
            DataCollatorForVPiT(tiny_processor)([{**example, "images": path}])
        with pytest.raises(BadSample, match="has 0 image parts in its messages, but 1 images"):
            DataCollatorForVPiT(tiny_processor)([{**self.example(["a"], ["b"]), "images": None, "image": path}])

    def test_template_without_marks(self, tiny_processor):
        processor = copy.copy(tiny_processor)
        processor.chat_template = re.sub(r"\{%- (end)?generation -%\}", "", tiny_processor.chat_template)
        with pytest.raises(ValueError, match="has no {% generation %} marks, so nothing would be learned"):
            DataCollatorForVPiT(processor)

    def test_an_image_is_encoded_once(self, tiny_processor, tiny_model, pictures):
        paths = [str(pictures / f"{number}.png") for number in (1, 2, 1)]
        examples = [
            self.example(["*", "*", "same?"], ["no"], images=paths[:2]),
            self.example(["draw"], ["*"], images=paths[2:]),
        ]
        batch = DataCollatorForVPiT(tiny_processor)(examples)
        assert len(batch["pixel_values"]) == 2 and batch["image_indices"].tolist() == [0, 1, 0]
        model = tiny_model().train()
        whole = {**batch, "pixel_values": batch["pixel_values"][batch["image_indices"]], "image_indices": None}
        torch.testing.assert_close(model(**batch).loss, model(**whole).loss)

    def test_arrow_makes_all_parts_alike(self, tiny_processor, pictures):
        rows = [self.example(["*", "what?"], ["grey"], images=[str(pictures / "1.png")]), self.example(["hi"], ["ho"])]
        table = Dataset.from_list(rows).cast_column("images", List(ImageFeature(decode=False)))
        plain, arrow = (DataCollatorForVPiT(tiny_processor)(list(source)) for source in (rows, table))
        for name in ("input_ids", "labels", "pixel_values"):
            assert torch.equal(plain[name], arrow[name])

    @pytest.mark.parametrize("turns", [1, 2])
    def test_long_ones_lose_whole_turns(self, tiny_processor, pictures, turns):
        """Never cut through an image, never a dangling <image_start>."""
        images = [str(pictures / f"{number}.png") for number in range(3)]
        example = self.example(["draw"], ["*"], ["again", "*"], ["*"], ["and now?"], ["words"], images=images)
        kept = {**example, "messages": example["messages"][: 2 * turns], "images": images[: 2 * turns - 1]}
        collate = DataCollatorForVPiT(tiny_processor)
        expected = collate([kept])
        limit = expected["input_ids"].shape[1] + 3
        batch = DataCollatorForVPiT(tiny_processor, max_length=limit, on_too_long="drop_turns")([example])
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        (shortened,) = batch["rejected"]
        assert shortened["kind"] == "shortened" and f"{6 - 2 * turns} messages dropped" in shortened["reason"]

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"messages": []}, "has no messages"),
            (
                {"messages": [{"role": "robot", "content": "hi"}]},
                "has a message of role 'robot', expected one of system, user",
            ),
            ({"messages": [{"role": "user", "content": "hi"}]}, "has no answer"),
            ({"messages": [{"role": "assistant", "content": "  "}]}, "has an empty answer"),
            ({"messages": [{"role": "assistant", "content": 7}]}, "has a message whose content is int"),
            (
                {"messages": [{"role": "assistant", "content": [{"type": "audio"}]}]},
                "has a content part that is neither text",
            ),
            ({"messages": [{"role": "assistant", "content": "<image_start>"}]}, "has <image_start> in a text"),
            ({"bad": "has no caption."}, "has no caption"),
            ({"messages": [{"role": "assistant", "content": "\ud83d"}]}, "has a text that is no valid Unicode"),
            ({"images": ["1.png"]}, "has 0 image parts in its messages, but 1 images"),
        ],
    )
    @pytest.mark.parametrize("skip", [False, True])
    def test_bad_samples(self, tiny_processor, change, reason, skip):
        good = {**self.example(["hi"], ["ho"]), "id": "good"}
        bad = {**good, "id": "bad", "source": "here.jsonl", "task": "chat", **change}
        collate = DataCollatorForVPiT(tiny_processor, on_bad_sample="skip" if skip else "raise")
        if not skip:
            with pytest.raises(BadSample, match=f"Example bad of here.jsonl {reason}"):
                collate([good, bad])
            return
        batch = collate([good, bad])
        assert torch.equal(batch["input_ids"], collate([good])["input_ids"])
        (rejected,) = batch["rejected"]
        assert (rejected["kind"], rejected["task"]) == ("skipped", "chat") and reason.split(",")[0] in rejected[
            "reason"
        ]
        alone = collate([bad])
        assert alone["labels"].tolist() == [[-100]] and alone["sample_ids"] == []

    @settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def test_any_record_is_a_batch_or_a_refusal(self, tiny_processor, data):
        """Never an exception of another kind."""
        text = st.sampled_from(
            ["", " ", "hi", "<image>", "<image_start>", "\x00", "a" * 50, "{{ x }}", "\u263a", "\ud83d"]
        )
        odd = st.sampled_from([None, 3, "x", [], {}, [None], b"x", 1.5])
        part = st.one_of(
            st.fixed_dictionaries({"type": st.just("text"), "text": st.one_of(text, odd)}),
            st.fixed_dictionaries({"type": st.just("image"), "text": st.none()}),
            st.fixed_dictionaries({"type": text}),
            odd,
        )
        role = st.sampled_from(["user", "assistant", "assistant", "system", "tool", "robot", None])
        content = st.one_of(text, st.lists(part, max_size=3), odd)
        message = st.one_of(st.fixed_dictionaries({"role": role, "content": content}), odd)
        image = st.one_of(st.just(Image.new("RGB", (4, 4))), st.just(Image.new("L", (1, 3))), odd)
        record = st.fixed_dictionaries(
            {"messages": st.one_of(st.lists(message, max_size=4), odd)},
            optional={"images": st.one_of(st.lists(image, max_size=3), st.none()), "id": odd, "bad": st.none()},
        )
        options = {
            "max_length": data.draw(st.sampled_from([None, 8, 40])),
            "on_bad_sample": data.draw(st.sampled_from(["raise", "skip"])),
            "on_too_long": data.draw(st.sampled_from(["refuse", "drop_turns"])),
        }
        records = data.draw(st.lists(record, min_size=1, max_size=2))
        try:
            batch = DataCollatorForVPiT(tiny_processor, **options)(records)
        except BadSample as refusal:
            assert options["on_bad_sample"] == "raise" and str(refusal).startswith("Example ")
            return
        ids, labels, image = batch["input_ids"], batch["labels"], tiny_processor.image_token_id
        assert ids.shape == labels.shape == batch["attention_mask"].shape
        assert ((labels == -100) | (labels == ids)).all()
        assert options["max_length"] is None or ids.shape[1] <= options["max_length"]
        count = len(batch.get("image_indices", batch.get("pixel_values", [])))
        assert (ids == image).sum() == 4 * count == 4 * (ids == tiny_processor.image_start_token_id).sum()
        assert (ids == tiny_processor.image_end_token_id).sum() == count
        skipped = sum(sample["kind"] == "skipped" for sample in batch.get("rejected", []))
        assert len(batch["sample_ids"]) == len(records) - skipped


class TestReading:
    @pytest.mark.parametrize("end", ["\n", ""])
    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_json_lines(self, tmp_path, count, end):
        rows = [{"n": number, "text": "ä\u2028" * number} for number in range(count)]
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + (end if count else ""))
        assert list(JsonLines(path)) == rows

    def test_broken_lines_are_named(self, tmp_path):
        path = write_jsonl(tmp_path / "rows.jsonl", [{"n": 0}, '{"n": ', [1]])
        lines = JsonLines(path)
        with pytest.raises(BadSample, match="is line 2 of .*rows.jsonl, which is not JSON"):
            lines[1]
        with pytest.raises(BadSample, match="is line 3 of .*rows.jsonl, which holds list"):
            lines[2]

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


class TestMixture:
    @pytest.fixture
    def sources(self, tmp_path, pictures):
        chats = [{"id": f"chat-{n}", **ROWS["chat"]} for n in range(30)]
        drawings = [{"caption": f"grey {n}", "image": f"{n}.png"} for n in range(10)]
        return [
            {"task": "chat", "path": write_jsonl(tmp_path / "chat.jsonl", chats)},
            {
                "task": "text_to_image",
                "path": write_jsonl(tmp_path / "t2i.jsonl", drawings),
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
        """The ablation's switch: understanding as it is, so many generation samples."""
        mixture = load_mixture([sources[0], {**sources[1], "num_samples": count}])
        assert self.count(mixture) == {"chat": 30, "text_to_image": count}
        ids = [record["id"] for record in mixture if record["task"] == "text_to_image"]
        assert max(ids.count(name) for name in ids) == -(-count // 10)

    @pytest.mark.parametrize(("size", "expected"), [(None, (10, 10)), (60, (30, 30))])
    def test_weights(self, sources, size, expected):
        mixture = load_mixture([{**source, "weight": 2.0} for source in sources], size=size)
        assert tuple(self.count(mixture).values()) == expected

    def test_seeds(self, sources):
        first, again, other = (list(load_mixture(sources, seed=seed)) for seed in (0, 0, 1))
        assert first == again != other
        assert sorted(r["id"] for r in first) == sorted(r["id"] for r in other)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_workers(self, sources, tiny_processor, workers):
        """Rows that cannot be read are skipped and named, in whichever process."""
        with open(sources[0]["path"], "a") as file:
            file.write("{broken\n")
        collate = DataCollatorForVPiT(tiny_processor, on_bad_sample="skip")
        batches = list(DataLoader(load_mixture(sources), batch_size=4, num_workers=workers, collate_fn=collate))
        assert sum(len(batch["sample_ids"]) for batch in batches) == 40
        (rejected,) = [sample for batch in batches for sample in batch.get("rejected", [])]
        assert rejected["sample"].startswith("Example row 30 of") and "line 31" in rejected["reason"]

    def test_streaming(self, sources, tmp_path, pictures, monkeypatch):
        """The same samples as without; they go on where a state was taken."""
        monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 seconds an iterator
        rows = [{"caption": f"grey {n}", "image": str(pictures / f"{n}.png")} for n in range(10)]
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

    MEMBERS = {
        "text_to_image": ({"jpg": "2.png", "txt": b"a grey square."}, {}),
        "image_to_image": (
            {"source.png": "3.png", "target.png": "4.png", "json": b'{"instruction": "Make it brighter."}'},
            {"source": "source.png", "target": "target.png"},
        ),
        "llava": (
            {"png": "1.png", "json": json.dumps({"conversations": LLAVA["conversations"]}).encode()},
            {"image": "png"},
        ),
        "video_prediction": ({"mp4": None}, {}),
        "video_qa": ({"mp4": None, "json": json.dumps(ROWS["video_qa"]).encode()}, {}),
        "visual_thinking": ({"jpg": "5.png", "json": json.dumps(ROWS["visual_thinking"]).encode()}, {"image": "jpg"}),
        "chat": ({"png": "1.png", "json": json.dumps(ROWS["chat"]).encode()}, {"images": "png"}),
    }

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("task", [*MEMBERS, "text_to_image json"])
    def test_webdataset(self, tiny_processor, pictures, video, tmp_path, monkeypatch, task, streaming):
        """Members of a tar are columns, and so are the keys of its .json members."""
        monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
        task, _, json_caption = task.partition(" ")
        members, columns = self.MEMBERS[task]
        if json_caption:
            members = {"jpg": "2.png", "json": b'{"caption": "a grey square."}'}
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
            assert "a grey square" in tiny_processor.tokenizer.decode(batch["input_ids"][0])

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("resume_after", [0, 3])
    def test_two_processes_share_the_samples(
        self, sources, tiny_processor, tmp_path, monkeypatch, streaming, resume_after
    ):
        """As accelerate deals them out to Trainer's processes, from the start and from the middle of an epoch."""
        monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
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
        """Whole shards go to a process: no sample is lost or seen twice, but one process ends earlier."""
        monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
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
        assert ("ends earlier than the others" in caplog.text) == (len(lengths) > 1)

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
            ([{"path": "x"}], "lacks task"),
            ([{"task": "chat", "path": "x", "weight": 1, "num_samples": 2}], "one of the two"),
            ([{"task": "chat", "path": "x", "weight": 0}], "more than 0"),
            ([{"task": "chat", "path": "a", "weight": 1}, {"task": "chat", "path": "b"}], "for every one or for none"),
        ],
    )
    def test_refused(self, entries, reason):
        with pytest.raises(ValueError, match=reason):
            load_mixture(entries)

    def test_empty(self, tmp_path):
        (tmp_path / "empty.jsonl").touch()
        with pytest.raises(ValueError, match="empty.jsonl has no samples"):
            load_mixture([Source("chat", str(tmp_path / "empty.jsonl"))])
