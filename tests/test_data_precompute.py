import io
import json
import os

import pytest
import torch
from datasets import Dataset, List, disable_caching, enable_caching
from datasets import Image as ImageFeature
from helpers import EXAMPLES, arguments, train
from PIL import Image

from metamorph_hf import MetaMorphForConditionalGeneration
from metamorph_hf.data.formats import BadSample
from metamorph_hf.data.mixture import load_mixture
from metamorph_hf.data.precompute import precompute_visual_tokens
from metamorph_hf.vpit.collator import DataCollatorForVPiT


def encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


class TestPrecomputeVisualTokens:
    @pytest.mark.parametrize("decoding", ["autoregressive", "parallel"])
    def test_training_is_the_same(self, tiny_processor, tiny_model, tmp_path, decoding):
        """With precomputed visual tokens the weights end up the same, although no image is read."""
        columns = {key: [example[key] for example in EXAMPLES] for key in ("messages", "images")}
        columns["messages"] = [json.dumps(messages) for messages in columns["messages"]]
        dataset = Dataset.from_dict(columns).cast_column("images", List(ImageFeature()))
        states = []
        for precomputed in (False, True):
            model = tiny_model(visual_decoding=decoding)
            used = precompute_visual_tokens(dataset, model, tiny_processor, batch_size=3) if precomputed else dataset
            rows = [{**row, "messages": json.loads(row["messages"])} for row in used]
            if precomputed:
                assert [row["visual_tokens"].shape for row in rows[:4]] == [
                    (1, 4, 16),
                    (1, 4, 16),
                    (0, 4, 16),
                    (3, 4, 16),
                ]
                assert not any("images" in row or "pixel_values" in row for row in rows)
            train(model, tiny_processor, arguments(tmp_path), rows)
            states.append(model.state_dict())
        for name, weight in states[0].items():
            torch.testing.assert_close(states[1][name], weight, rtol=1e-5, atol=1e-7)

    def test_mixture(self, tiny_processor, tiny_model, tmp_path):
        """Batches are the same and in the same order; the collator skips or refuses unreadable samples."""
        for number in range(5):
            Image.new("RGB", (20, 16), (40 * number,) * 3).save(tmp_path / f"{number}.png")
        (tmp_path / "3.png").write_bytes(b"broken")
        captions = [{"caption": f"gray {n}", "image": str(tmp_path / f"{n}.png")} for n in range(5)]
        chats = [{"messages": EXAMPLES[2]["messages"]}] * 3
        sources = []
        for task, rows in (("text_to_image", captions), ("chat", chats)):
            path = tmp_path / f"{task}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
            sources.append({"task": task, "path": str(path)})
        mixture, model = load_mixture(sources), tiny_model().eval()
        encoded = precompute_visual_tokens(mixture, model, tiny_processor, batch_size=4)
        assert len(encoded) == len(mixture) == 10
        skip, stop = (DataCollatorForVPiT(tiny_processor, on_bad_sample=how) for how in ("skip", "raise"))
        pixels, tokens = skip(list(mixture)), skip(list(encoded.select(range(10))))
        assert [r["sample"] for r in tokens["rejected"]] == [r["sample"] for r in pixels["rejected"]]
        assert len(tokens["rejected"]) == 3 and any("3.png" in r["reason"] for r in tokens["rejected"])
        assert tokens["sample_ids"] == pixels["sample_ids"]
        assert torch.equal(tokens["input_ids"], pixels["input_ids"])
        expected = model.get_visual_tokens(pixels["pixel_values"])
        torch.testing.assert_close(tokens["visual_tokens"], expected)
        with pytest.raises(BadSample, match=r"row 3 of .* has a bad image. The image cannot be read \(.*3.png\)"):
            stop([record for record in encoded if (record["task"], record["id"]) == ("text_to_image", "row 3")])

    def test_a_transform_with_an_index(self, tiny_processor, tiny_model):
        """Columns of the dataset itself may have any name."""
        images, messages = [Image.new("RGB", (20, 16), color) for color in ("red", "blue")], EXAMPLES[0]["messages"]

        def read(columns):
            return {
                "messages": [messages for _ in columns["index"]],
                "images": [[images[i]] for i in columns["index"]],
            }

        dataset = Dataset.from_dict({"index": [1, 0]}).with_transform(read)
        model = tiny_model().eval()
        encoded = precompute_visual_tokens(dataset, model, tiny_processor)
        pixels = tiny_processor.image_processor(images[::-1], return_tensors="pt")["pixel_values"]
        for row, expected in zip(encoded, model.get_visual_tokens(pixels), strict=True):
            assert row["messages"] == messages and "images" not in row
            torch.testing.assert_close(torch.as_tensor(row["visual_tokens"]), expected[None].detach())

    def test_broken_image_of_a_column_of_images(self, tiny_processor, tiny_model):
        """datasets would raise an error that names no row."""
        good = {"bytes": encode_png(Image.new("RGB", (20, 16), "red")), "path": None}
        rows = [[good], [{"bytes": good["bytes"][:60], "path": "broken.png"}]]
        dataset = Dataset.from_dict({"images": rows}).cast_column("images", List(ImageFeature()))
        encoded = precompute_visual_tokens(dataset, tiny_model(), tiny_processor)
        assert encoded[0]["bad"] is None and "broken.png" in encoded[1]["bad"]

    def test_computed_once(self, tiny_processor, tiny_model, tmp_path, monkeypatch):
        """Later calls, as of other processes and runs, read a file, unless data or weights have changed."""
        counts, encode = [], MetaMorphForConditionalGeneration.get_visual_tokens

        def count(model, pixels):
            counts.append(len(pixels))
            return encode(model, pixels)

        monkeypatch.setattr(MetaMorphForConditionalGeneration, "get_visual_tokens", count)
        paths = [tmp_path / f"{number}.png" for number in range(4)]
        for path in paths:
            Image.new("RGB", (20, 16), "red").save(path)
        rows = [{"caption": path.stem, "image": str(path)} for path in paths]
        file, model = tmp_path / "rows.jsonl", tiny_model()
        table = Dataset.from_dict({"images": [[str(path)] for path in paths]})

        def compute() -> list[list[str | None]]:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            os.utime(file, ns=(modified, modified))
            mixture = load_mixture([{"task": "text_to_image", "path": str(file)}])
            computed = [precompute_visual_tokens(data, model, tiny_processor) for data in (mixture, table)]
            counts_of_call.append(sum(counts))
            counts.clear()
            return [[row["bad"] for row in data] for data in computed]

        counts_of_call, modified = [], 10**18
        assert compute() == compute() == [[None] * 4] * 2
        modified += 1  # the mixture's file
        compute()
        model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.data += 1.0
        compute()
        paths[3].write_bytes(b"broken")
        modified += 1
        assert sum(bad is not None for bad in compute()[0]) == 1
        Image.new("RGB", (20, 16), "red").save(paths[3])  # an image that was mended is read
        assert compute()[0] == [None] * 4
        assert counts_of_call == [8, 0, 4, 8, 3, 4]

    def test_relative_paths_mean_other_files_elsewhere(self, tiny_processor, tiny_model, tmp_path, monkeypatch):
        model, table, found = tiny_model(), Dataset.from_dict({"images": [["0.png"]]}), []
        for color in ("red", "blue"):
            (tmp_path / color).mkdir()
            monkeypatch.chdir(tmp_path / color)
            Image.new("RGB", (20, 16), color).save("0.png")
            found.append(precompute_visual_tokens(table, model, tiny_processor)[0]["visual_tokens"])
        Image.new("RGB", (20, 16), "red").save("0.png")
        disable_caching()
        try:
            found.append(precompute_visual_tokens(table, model, tiny_processor)[0]["visual_tokens"])
        finally:
            enable_caching()
        assert (found[0] != found[1]).any() and (found[0] == found[2]).all()

    def test_stream(self, tiny_processor, tiny_model):
        stream = Dataset.from_dict({"images": [[]]}).to_iterable_dataset()
        with pytest.raises(ValueError, match="load it without streaming"):
            precompute_visual_tokens(stream, tiny_model(), tiny_processor)

    def test_half_precision(self, tiny_processor, tiny_model):
        model, images = tiny_model(), [image for example in EXAMPLES[:2] for image in example["images"]]
        dataset = Dataset.from_dict({"images": [images, []]}).cast_column("images", List(ImageFeature()))
        rows = precompute_visual_tokens(dataset, model, tiny_processor, dtype="float16")[:]
        pixels = tiny_processor.image_processor(images, return_tensors="pt")["pixel_values"]
        expected = model.get_visual_tokens(pixels).detach()
        torch.testing.assert_close(torch.tensor(rows["visual_tokens"][0]).float(), expected, rtol=1e-3, atol=1e-3)
        assert rows["visual_tokens"][1].shape == (0, 4, 16)
