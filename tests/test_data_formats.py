import json
import random
from fractions import Fraction
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import av
import numpy as np
import pytest
from helpers import GOLDEN, ROWS, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metamorph_hf.data.formats import FAMILIES, VIDEO_KINDS, BadSample, resolve_path
from metamorph_hf.data.mixture import load_mixture
from metamorph_hf.data.video import video_frames
from metamorph_hf.vpit.collator import DataCollatorForVPiT


GOLDEN_CHATS = json.loads((GOLDEN / "llama3_chat_golden.json").read_text())["cases"]


class TestFamilies:
    # The labels of each family's answer, word by word. IMAGE stands for four visual targets.
    ANSWERS = {
        "chat": ["Hello.", "<|eot_id|>"],
        "llava": ["A grey.", "<|eot_id|>"],
        "image_to_image": ["<image_start>", "IMAGE", "<image_end>", "<|eot_id|>"],
        "video_qa": ["Light.", "<|eot_id|>"],
    }

    def answer(self, batch, processor, row=0) -> list[str]:
        """Return the targets of a row in reading order, each image as one word."""
        labels, image = batch["labels"][row], processor.image_token_id
        words = labels[labels != -100].tolist()
        while image in words:
            index = words.index(image)
            assert words[index : index + 4] == [image] * 4
            words[index : index + 4] = ["IMAGE"]
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

    @pytest.mark.parametrize("seed", range(3))
    def test_reconstruction(self, llama3_processor, row, seed):
        """The same image is asked about and is the answer."""
        record = FAMILIES["reconstruction"](row("reconstruction"), random.Random(seed))
        image, request = record["messages"][0]["content"]
        assert image == {"type": "image"} and request["text"] and record["images"][0] == record["images"][1]
        batch = DataCollatorForVPiT(llama3_processor)([record])
        expected = ["<image_start>", "IMAGE", "<image_end>", "<|eot_id|>"]
        assert self.answer(batch, llama3_processor) == self.words(llama3_processor, expected)
        assert batch["image_indices"].tolist() == [0, 0]

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

    @pytest.mark.parametrize("seconds", [2, 4])
    def test_short_videos_have_all_frames(self, tmp_path, seconds):
        """The last of three frames is before the end, whatever the interval."""
        with av.open(str(tmp_path / "short.mp4"), "w") as file:
            stream = file.add_stream("mpeg4", rate=12)
            stream.width = stream.height = 16
            for _ in range(12 * seconds):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
            file.mux(stream.encode())
        resolve = {"video": str(tmp_path / "short.mp4")}.get
        for seed in range(60):
            rng = random.Random(seed)
            rng.uniform = lambda low, high, seed=seed: high - (high - low) * (seed % 3) / 50  # nearly the longest
            record = FAMILIES["video_prediction"]({"video": "video"}, rng, resolve)
            assert len(record["images"]) >= 2

    @pytest.mark.parametrize("kind", VIDEO_KINDS)
    @pytest.mark.parametrize("seed", range(3))
    def test_video_prediction(self, llama3_processor, row, kind, seed):
        options = {"kinds": [kind], "min_seconds": 0.5, "max_seconds": 1.5}
        record = FAMILIES["video_prediction"](row("video_prediction"), random.Random(seed), **options)
        question, answer = (message["content"] for message in record["messages"])
        asked = sum(part["type"] == "image" for part in question)
        gray = [np.asarray(image).mean() for image in record["images"]]
        order = np.argsort(np.argsort(gray[:asked])).tolist(), gray[asked:]
        if kind == "time_between":
            assert asked == len(gray) and answer[0]["text"].split()[1].startswith("second")
            seconds = float(answer[0]["text"].split()[0])
            assert np.diff(gray).mean() == pytest.approx(20 * seconds, abs=6)
        elif kind == "reverse":
            assert gray[asked:] == gray[:asked][::-1]
        elif kind == "reorder":
            assert gray[asked:] == sorted(gray[:asked])
        elif kind == "every_other":
            assert sorted(gray) == [
                g for pair in zip(gray[:asked], [*gray[asked:], None]) for g in pair if g is not None
            ]
        else:
            assert gray == sorted(gray) and len(gray) > asked
            assert len(gray) - asked <= 3 or kind != "next_images"
        assert order[0] == sorted(order[0]) or kind == "reorder"
        batch = DataCollatorForVPiT(llama3_processor)([record])
        targets = (batch["labels"] == llama3_processor.image_token_id).sum().item()
        assert targets == 4 * (len(gray) - asked)

    @pytest.mark.parametrize("case", GOLDEN_CHATS)
    def test_llava_is_the_released_form(self, llama3_processor, pictures, case):
        """The released preprocessing gives the same ids for its own data."""
        golden = GOLDEN_CHATS[case]
        count = sum(turn["value"].count("<image>") for turn in golden["conversation"])
        row = {"conversations": golden["conversation"], "image": [str(pictures / "0.png")] * count}
        batch = DataCollatorForVPiT(llama3_processor)([FAMILIES["llava"](row, random.Random(0))])
        expected = [t for token in golden["input_ids"] for t in ([128258] * 4 if token == -200 else [token])]
        assert batch["input_ids"][0].tolist() == expected

    def test_frames_by_their_time_stamps(self, video):
        """The second half of the video has fewer frames per second, so that indices would be wrong."""
        gray = [np.asarray(frame).mean() for frame in video_frames(str(video), 1.0)]
        assert gray == pytest.approx([20 + 20 * second for second in range(10)], abs=6)
        assert len(video_frames(str(video), 0.1, limit=7)) == 7

    @pytest.mark.parametrize("rate", [24, 25, 30])
    def test_intervals_are_exact(self, tmp_path, rate):
        """At every tenth of a second, as by fractions: rounding neither repeats a neighbor nor leaves out a frame."""
        with av.open(str(tmp_path / "clip.mkv"), "w") as file:
            stream = file.add_stream("ffv1", rate=rate)
            stream.width, stream.height, stream.pix_fmt = 16, 16, "gray"
            for index in range(4 * rate):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((16, 16), 2 * index, np.uint8), "gray")))
            file.mux(stream.encode())
        times = [Fraction(round(1000 * Fraction(index, rate)), 1000) for index in range(4 * rate)]  # Matroska's
        for tenths in range(1, 21):
            step, expected, wanted = Fraction(tenths, 10), [], 0
            for index, time in enumerate(times):
                if time >= wanted:
                    expected.append(2 * index)
                    wanted = (time // step + 1) * step
            frames = video_frames(str(tmp_path / "clip.mkv"), tenths / 10)
            assert [np.asarray(frame)[0, 0, 0] for frame in frames] == expected, tenths

    @pytest.mark.parametrize("protocol", ["http:{host}/clip.mp4", "concat:{host}", "subfile,,start,0,end,0,,:{host}"])
    def test_other_protocols_are_names_of_files(self, monkeypatch, protocol):
        """FFmpeg takes more than "://" as an address."""
        requests = []
        with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
            monkeypatch.setattr(server, "finish_request", lambda *args: requests.append(args))
            Thread(target=server.serve_forever, daemon=True).start()
            video = protocol.format(host=f"127.0.0.1:{server.server_port}")
            with pytest.raises(BadSample, match="cannot be read"):
                FAMILIES["video_prediction"]({"video": video}, random.Random(0))
            server.shutdown()
        assert not requests

    @pytest.mark.parametrize("part", [0.3, 0.5, 0.9])
    @pytest.mark.parametrize("form", ["bytes", "path"])
    def test_a_video_that_breaks_off_is_named(self, tmp_path, part, form):
        """A file with its index in front opens without an error, and decodes without one until it breaks off."""
        path = tmp_path / "clip.mp4"
        with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            noise = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), dtype=np.uint8)
            for pixels in noise:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
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
        assert len(video_frames(video, 0.5, limit=1)) == 1  # the part before the break is intact

    @pytest.mark.parametrize("fps", [2.0, 1000.0])
    def test_frames_of_a_question_are_capped(self, row, fps):
        record = FAMILIES["video_qa"](row("video_qa"), random.Random(0), fps=fps, max_frames=4)
        gray = [np.asarray(image).mean() for image in record["images"]]
        assert [(g - 20) / 20 for g in gray] == pytest.approx([0, 2.5, 5, 7.5], abs=0.3)  # their times in seconds

    @pytest.mark.parametrize(
        ("family", "change", "reason"),
        [
            ("chat", {"messages": None}, "has none of the columns messages"),
            ("chat", {"messages": "hello"}, "has messages of type str"),
            ("llava", {"conversations": [{"from": "robot", "value": "hi"}]}, "LLaVA's form does not know"),
            ("llava", {"conversations": 3}, "LLaVA's form does not know: 3"),
            ("text_to_image", {"caption": " "}, "has ' ' as its caption, expected a text"),
            ("text_to_image", {"caption": " ... "}, "has a caption of dots alone"),
            ("image_to_image", {"instruction": None}, "none of the columns instruction"),
            ("visual_thinking", {"boxes": [2, 2, 30, 12]}, "expected pixels .* inside its 20x16 image"),
            ("visual_thinking", {"boxes": [10, 2, 2, 12]}, "inside its"),
            ("visual_thinking", {"boxes": [0.2, 0.2, 0.6, 1.0]}, "expected pixels"),
            ("visual_thinking", {"boxes": ["a", 2, 3, 4]}, "expected pixels \\[left, top, right, bottom\\]"),
            ("visual_thinking", {"image": "/no/such.png"}, "bad image. The image cannot be read \\(/no/such.png\\)"),
            ("video_qa", {"video": "/no/such.mp4"}, "video that cannot be read \\(/no/such.mp4\\)"),
            ("video_qa", {"conversations": [{"from": "human", "value": "What?"}]}, "0 places for its video"),
            ("video_prediction", {"video": b"broken"}, "video that cannot be read"),
        ],
    )
    def test_bad_rows_are_named(self, row, family, change, reason):
        with pytest.raises(BadSample, match=reason):
            FAMILIES[family]({**row(family), **change}, random.Random(0))

    @pytest.mark.parametrize(
        ("family", "options", "reason"),
        [
            ("visual_thinking", {"show": "all"}, "show is 'all', expected 'crop' or 'boxes'"),
            ("video_prediction", {"kinds": ["next"]}, r"kinds has \['next'\], expected some of next_frames"),
            (
                "video_prediction",
                {"min_seconds": 8.0},
                "has a video of unknown length, or too short for two intervals of 8.0 s",
            ),
            ("video_prediction", {"max_frames": 2}, "has 2 frames .* apart, too few to predict any"),
        ],
    )
    def test_options_that_do_not_fit(self, row, family, options, reason):
        with pytest.raises(ValueError, match=reason):
            FAMILIES[family](row(family), random.Random(0), **options)

    def test_a_video_without_images(self, tmp_path):
        with av.open(str(tmp_path / "sound.mp4"), "w") as container:
            stream = container.add_stream("aac", rate=16000, layout="mono")
            for start in range(0, 16000, 1024):
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 16000, start
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        with pytest.raises(BadSample, match=r"has a video without images \(.*sound.mp4\)"):
            video_frames(str(tmp_path / "sound.mp4"), 1.0)

    @pytest.mark.parametrize(
        ("file", "options", "reason"),
        [
            ("../secret.png", {"image_root": "/data"}, "has the path ../secret.png, which leads out of"),
            ("/etc/passwd", {"image_root": "/data"}, "has the path /etc/passwd, which leads out of"),
            ({"bytes": None, "path": "/data2/1.png"}, {"image_root": "/data"}, "which leads out of"),
            ("https://example.com/1.png", {}, "set allow_remote"),
            ({"path": "https://example.com/1.png"}, {"image_root": "/data"}, "set allow_remote"),
            (3, {}, "has int in place of an image"),
        ],
    )
    def test_files_that_are_not_allowed(self, file, options, reason):
        with pytest.raises(BadSample, match=reason):
            resolve_path(file, **options)
        part = {"type": "image_url", "image_url": {"url": file}}
        messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A."}]
        with pytest.raises(BadSample, match=reason):
            FAMILIES["chat"]({"messages": messages}, random.Random(0), partial(resolve_path, **options))

    def test_files_that_are_allowed(self):
        assert resolve_path("a/../1.png", "data") == "data/a/../1.png"
        assert resolve_path("/data/1.png", "/data") == "/data/1.png"
        assert resolve_path("/etc/1.png") == "/etc/1.png"
        for file in (
            "https://example.com/1.png",
            "data:image/png;base64,AAAA",
            b"bytes",
            {"bytes": b"", "path": "/1"},
        ):
            assert resolve_path(file, "/data", allow_remote=True) == file

    def test_chat_keeps_tools_and_finds_images_in_parts(self):
        parts = [{"type": "image", "image": "1.png"}, {"type": "input_image", "image_url": "2.png"}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A."}]
        row = {"messages": messages, "tools": [{"name": "x"}]}
        record = FAMILIES["chat"](row, random.Random(0), partial(resolve_path, image_root="r"))
        assert record["images"] == ["r/1.png", "r/2.png"] and record["tools"] == [{"name": "x"}]
        assert record["messages"][0]["content"] == [{"type": "image"}] * 2

    @settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def test_any_row_is_a_record_or_a_bad_sample(self, data):
        """There is no exception of another kind."""
        odd = [None, 0, 3, float("nan"), True, "", "x", "<image>", "../1.png", b"", [], [None], [[]], [1, 2, 3, 4], {}]
        odd += [{"a": 1}, {"bytes": 3}, {"path": 3}, [["a"]], [{"from": [], "value": "x"}], [{"role": "user"}]]
        odd += [{"bytes": None, "path": None}, [{"role": "user", "content": [{"type": []}]}], "http://127.0.0.1:9/1"]
        family = data.draw(st.sampled_from(list(FAMILIES)))
        columns = [*ROWS[family], "video", "images", "names", "tools"]
        changes = data.draw(st.dictionaries(st.sampled_from(columns), st.sampled_from(odd), max_size=3))
        show = {"show": "boxes"} if family == "visual_thinking" else {}
        try:
            record = FAMILIES[family]({**ROWS[family], **changes}, random.Random(0), **show)
        except BadSample as refusal:
            assert str(refusal)
        else:
            assert isinstance(record["messages"], list) and isinstance(record["images"], list)
