"""`examples/evaluate_generation.py`: its numbers against other computations of them, its runs, and its refusals."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, StableDiffusionPipeline, UNet2DModel
from helpers import EMOJI_CHECKPOINT, import_example, run_example_in_two_processes
from PIL import Image
from torchmetrics.multimodal import CLIPScore
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from metamorph_hf import MetaMorphPipeline


evaluate_generation = import_example("evaluate_generation.py")
load_clip, load_features = evaluate_generation.load_clip, evaluate_generation.load_features
draw_contact_sheet, rank_references = evaluate_generation.draw_contact_sheet, evaluate_generation.rank_references


def read_rows(captions: str, coco: Path | None = None, limit: int | None = None) -> list:
    return evaluate_generation.read_rows(captions, "text-to-image", coco, limit)


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Run the script in this process, with two denoising steps by default, and return its result."""

    def run(*flags, output: str = "out", steps: int | None = 2) -> dict:
        steps = [] if steps is None else ["--steps", steps]
        command = ["evaluate_generation.py", "--output", tmp_path / output, *steps, *flags]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        evaluate_generation.main()
        return json.loads((tmp_path / output / "result.json").read_text())

    return run


@pytest.fixture
def captions(tmp_path):
    """Write a JSONL file of dictionaries, or of lines as they are."""

    def write(*lines: dict | str) -> Path:
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (tmp_path / "captions.jsonl").write_text(text, encoding="latin-1")
        return tmp_path / "captions.jsonl"

    return write


@pytest.fixture
def real_images(tmp_path) -> list[str]:
    """Four files of noise, none square."""
    rng = np.random.default_rng(0)
    names = [f"{number}.png" for number in range(4)]
    for name in names:
        Image.fromarray(rng.integers(256, size=(40, 60, 3), dtype=np.uint8)).save(tmp_path / name)
    return names


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("images/*.png"))}


def assert_same_images(one: Path, other: Path) -> None:
    (ours, theirs) = pixels(one), pixels(other)
    assert ours.keys() == theirs.keys() and ours
    for name in ours:  # the rest of a batch changes the last bits
        assert np.abs(ours[name] - theirs[name]).max() <= 1, name


class TestNumbers:
    def test_ranks_follow_plain_cosines(self):
        generator = torch.Generator().manual_seed(0)
        references = torch.randn(1100, 2, 3, generator=generator)  # more than one block
        references[1050] = references[7]
        targets = torch.tensor([0, 7, 1050, 1099, 500])
        encoded = references[targets] + 0.8 * torch.randn(5, 2, 3, generator=generator)
        encoded[1] = references[7]
        expected = []
        for image, target in zip(encoded.double(), targets.tolist(), strict=True):
            cosines = [torch.cosine_similarity(image.flatten(), one.double().flatten(), dim=0) for one in references]
            expected.append(sum(cosine > cosines[target] + 1e-5 for cosine in cosines).item())
        assert rank_references(encoded, references, targets).tolist() == expected
        assert expected[1] == 0 and max(expected) > 0  # its twin does not count
        encoded[1] = 0  # a missing image
        assert rank_references(encoded, references, targets)[1] == 1100

    def test_fid_is_the_distance_of_two_gaussians(self):
        rng = np.random.default_rng(0)
        real, generated = rng.normal(size=(300, 5)), rng.normal(0.3, 1.5, size=(200, 5))
        one, other = np.cov(real.T), np.cov(generated.T)
        values, vectors = np.linalg.eigh(one)
        root = vectors * np.sqrt(values) @ vectors.T
        mixed = np.sqrt(np.linalg.eigvalsh(root @ other @ root)).sum()
        expected = ((real.mean(0) - generated.mean(0)) ** 2).sum() + np.trace(one) + np.trace(other) - 2 * mixed
        found = evaluate_generation.frechet_distance(torch.tensor(real).float(), torch.tensor(generated).float())
        assert found == pytest.approx(expected, rel=1e-4)

    def test_clip_score_is_that_of_torchmetrics(self, clip_folder, real_images, tmp_path):
        images = [Image.open(tmp_path / name) for name in real_images]
        texts = ["a cat", "a red apple on the table", "x", "two dogs"]

        class Clip(CLIPModel):  # torchmetrics expects the tensors of transformers 4
            def get_image_features(self, *args):
                return super().get_image_features(*args).pooler_output

            def get_text_features(self, *args):
                return super().get_text_features(*args).pooler_output

        metric = CLIPScore(lambda: (Clip.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)))
        expected = [metric(torch.tensor(np.array(i)).permute(2, 0, 1), t) for i, t in zip(images, texts, strict=True)]
        with torch.no_grad():
            found = load_clip(str(clip_folder), torch.device("cpu"))(images, texts)
        torch.testing.assert_close(found.clamp(min=0), torch.stack(expected), rtol=1e-4, atol=1e-3)
        assert found.std() > 0.1

    def test_clip_score_of_a_siglip(self, siglip_folder, real_images, tmp_path):
        images, texts = [Image.open(tmp_path / name) for name in real_images], ["a cat", "b", "cc", "two dogs"]
        model, processor = SiglipModel.from_pretrained(siglip_folder), SiglipProcessor.from_pretrained(siglip_folder)
        inputs = processor(images=images, text=texts, padding="max_length", return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits_per_image.diagonal()
            found = load_clip(str(siglip_folder), torch.device("cpu"))(images, texts)
        torch.testing.assert_close(found, 100 * (logits - model.logit_bias) / model.logit_scale.exp())

    @pytest.mark.parametrize("kind", ["clip", "siglip"])
    def test_features_are_the_towers(self, kind, request, real_images, tmp_path):
        folder, image = request.getfixturevalue(f"{kind}_folder"), Image.open(tmp_path / real_images[0])
        name, features = load_features(str(folder), None, torch.device("cpu"))
        model = {"clip": CLIPModel, "siglip": SiglipModel}[kind].from_pretrained(folder)
        processor = {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}[kind].from_pretrained(folder)
        with torch.no_grad():
            tower = model.vision_model(processor(image, return_tensors="pt")["pixel_values"])
            torch.testing.assert_close(features([image]), tower.pooler_output)
        assert str(folder) in name and type(model.vision_model).__name__ in name


@pytest.fixture
def clip_folder(tmp_path, tiny_tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": tiny_tokenizer.eos_token_id, "pad_token_id": tiny_tokenizer.pad_token_id}
    text = {**sizes, **ids, "vocab_size": len(tiny_tokenizer), "max_position_embeddings": 40}
    vision = {**sizes, "image_size": 16, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    size = {"shortest_edge": 16}
    images = CLIPImageProcessorPil(size=size, crop_size={"height": 16, "width": 16})
    return save_with_processor(model, CLIPProcessor, images, tiny_tokenizer, tmp_path / "clip")


@pytest.fixture
def siglip_folder(tmp_path, tiny_tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tiny_tokenizer), "max_position_embeddings": 40, "projection_size": 16}
    vision = {**sizes, "image_size": 16, "patch_size": 4}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    return save_with_processor(model, SiglipProcessor, images, tiny_tokenizer, tmp_path / "siglip")


def save_with_processor(model, processor_class, images, tokenizer, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=40)
    model.save_pretrained(folder)
    processor_class(images, tokenizer).save_pretrained(folder)
    return folder


class TestRuns:
    def test_emoji_and_resume(self, evaluate, tmp_path, capsys):
        flags = ("--limit", 7, "--batch-size", 4)
        whole = evaluate(*flags)
        out = tmp_path / "out"
        names = {path.stem for path in (out / "images").iterdir()}
        assert len(names) == 7 and all(name.startswith(("google-", "twitter-", "microsoft-")) for name in names)
        assert whole["generated_in_this_run"] == 7 and whole["without_image"] == []
        assert whole["metrics"]["retrieval_top1"] >= 500 / 7 and 0 < whole["metrics"]["fid"] < 1
        scale = MetaMorphPipeline.load_config(EMOJI_CHECKPOINT)["default_guidance_scale"]
        assert (whole["settings"]["num_inference_steps"], whole["settings"]["guidance_scale"]) == (2, scale)
        assert whole["settings"]["scheduler"]["class"] == "DDIMScheduler"
        assert whole["versions"]["torch"] == torch.__version__
        assert Image.open(out / "contact_sheet.png").width == 900
        assert re.search(r"The FID of 7 images in \d+ dimensions is too high", capsys.readouterr().out)

        shutil.copytree(out, tmp_path / "cut")
        for name in sorted(names)[:3]:
            (tmp_path / "cut" / "images" / f"{name}.png").unlink()
        (tmp_path / "cut" / "images" / f"{sorted(names)[0]}.part").write_bytes(b"killed while it was written")
        resumed = evaluate("--limit", 7, "--batch-size", 3, output="cut")
        assert resumed["generated_in_this_run"] == 3
        assert_same_images(out, tmp_path / "cut")
        assert resumed["metrics"] == pytest.approx(whole["metrics"], rel=1e-2)

    def test_reconstruct(self, evaluate, tmp_path):
        result = evaluate("--task", "reconstruct", "--limit", 6, steps=None)
        steps = MetaMorphPipeline.load_config(EMOJI_CHECKPOINT)["default_num_inference_steps"]
        assert result["settings"]["num_inference_steps"] == steps
        assert result["metrics"]["retrieval_top1"] == 100
        errors = []
        for row in read_rows("emoji-held-out", limit=6):
            decoded = Image.open(tmp_path / "out" / "images" / f"{row.id}.png")
            real, decoded = np.asarray(row.reference(decoded.size)).astype(float), np.asarray(decoded)
            errors.append(10 * np.log10(255**2 / ((decoded - real) ** 2).mean()))
            assert row.id.startswith("twitter-")
        assert result["metrics"]["psnr"] == pytest.approx(np.mean(errors), rel=1e-5)

    def test_own_captions(self, evaluate, captions, real_images, siglip_folder):
        path = captions(*({"caption": f"emoji {name}", "image": name, "id": name} for name in real_images))
        networks = ("--clip-network", siglip_folder, "--fid-network", siglip_folder)
        result = evaluate("--captions", path, *networks)
        assert result["metrics"].keys() == {"fid", "retrieval_top1", "clip_score"}
        assert "siglip" in result["fid_network"]
        # one image and no real one: there is nothing to compare it with
        alone = evaluate("--captions", captions({"caption": "a cat"}), output="alone")
        assert alone["metrics"] == {} and "neither FID nor retrieval" in alone["notes"][0]

    def test_answers_without_an_image_are_counted(self, evaluate, captions, real_images, tmp_path, siglip_folder):
        """The model answers captions that end in "cat" with "no"."""
        shutil.copytree(EMOJI_CHECKPOINT, tmp_path / "shy")
        tokenizer = AutoTokenizer.from_pretrained(EMOJI_CHECKPOINT / "processor")
        answers = (" cat.<|end|><|assistant|> no", " no<|end|>")
        bias = [[tokenizer(answer, add_special_tokens=False).input_ids, 1000.0] for answer in answers]
        path = tmp_path / "shy" / "model" / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "sequence_bias": bias}))
        lines = [{"caption": text, "id": text} for text in ("dog", "cat", "apple", "bus")]
        for line, image in zip(lines, real_images, strict=True):
            line["image"] = image
        flags = ("--pipeline", tmp_path / "shy", "--captions", captions(*lines), "--max-new-tokens", 80)
        flags += ("--clip-network", siglip_folder)
        result = evaluate(*flags)
        (missing,) = result["without_image"]
        assert missing == {"id": "cat", "caption": "cat", "answer": "no"}
        assert result["notes"][0].startswith("1 of the 4 answers have no image")
        again = evaluate(*flags)  # the model is not asked again
        assert again["generated_in_this_run"] == 0 and again["metrics"] == result["metrics"]
        images = [Image.open(tmp_path / "out" / "images" / f"{name}.png") for name in ("dog", "apple", "bus")]
        with torch.no_grad():
            scores = load_clip(str(siglip_folder), torch.device("cpu"))(images, ["dog", "apple", "bus"])
        assert result["metrics"]["clip_score"] == pytest.approx(max(0, scores.sum().item() / 4), abs=1e-4)
        assert result["metrics"]["retrieval_top1"] in (0, 25, 50, 75)
        with pytest.raises(SystemExit, match="None of the 1 answers has an image"):
            evaluate(*flags[:2], "--captions", captions(lines[1]), "--max-new-tokens", 80, output="none")

    def test_another_pipeline(self, evaluate, captions, real_images, components, tiny_tokenizer, tmp_path):
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = CLIPTextConfig(**sizes, vocab_size=len(tiny_tokenizer), max_position_embeddings=16)
        tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
        stable = StableDiffusionPipeline(
            **{name: components[name] for name in ("unet", "vae", "scheduler")},
            text_encoder=CLIPTextModel(config).eval(),
            tokenizer=AutoTokenizer.from_pretrained(tmp_path / "tokenizer", model_max_length=16),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        stable.save_pretrained(tmp_path / "stable")
        path = captions(*({"caption": "a cat", "image": name} for name in real_images))
        flags = ("--pipeline", tmp_path / "stable", "--captions", path)
        result = evaluate(*flags, "--judge", EMOJI_CHECKPOINT)
        assert result["metrics"].keys() == {"fid", "retrieval_top1"}
        assert result["settings"]["guidance_scale"] == 7.5
        assert len({value.tobytes() for value in pixels(tmp_path / "out").values()}) == 4  # each id has its own noise
        with pytest.raises(SystemExit, match="--judge"):
            evaluate(*flags, output="other")
        with pytest.raises(SystemExit, match="only a MetaMorphPipeline can reconstruct"):
            evaluate(*flags, "--task", "reconstruct", output="other")

    @pytest.mark.slow
    def test_two_processes_are_one(self, evaluate, tmp_path):
        flags = ["--task", "reconstruct", "--limit", 5, "--batch-size", 2]  # shares of three and two
        whole = evaluate(*flags)
        common = ["--output", "two", "--steps", 2, "--cpu"]
        done = run_example_in_two_processes("evaluate_generation.py", *common, *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        two = json.loads((tmp_path / "two" / "result.json").read_text())
        assert (two["processes"], two["generated_in_this_run"]) == (2, 5)
        assert_same_images(tmp_path / "out", tmp_path / "two")
        assert two["metrics"] == pytest.approx(whole["metrics"], rel=1e-3)


class TestCoco:
    @pytest.fixture
    def coco(self, tmp_path) -> Path:
        folder = tmp_path / "coco"
        (folder / "annotations").mkdir(parents=True)
        (folder / "val2014").mkdir()
        images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(1, 6)]
        for image in images:
            Image.new("L", (30, 20), image["id"]).save(folder / "val2014" / image["file_name"])
        captions = [{"id": 9 * n, "image_id": 1 + n % 5, "caption": f"{1 + n % 5} seen\n{n}"} for n in range(15)]
        (folder / "annotations" / "captions_val2014.json").write_text(
            json.dumps({"images": images, "annotations": captions[::-1]})
        )
        return folder

    def test_one_caption_per_image_always_the_same(self, coco, monkeypatch):
        rows = read_rows("coco-30k", coco=coco)
        assert sorted(row.id for row in rows) == ["1", "2", "3", "4", "5"]
        assert all(row.caption.startswith(f"{row.id} seen ") for row in rows)
        assert rows[0].reference((8, 8)).size == (8, 8) and rows[0].reference().size == (20, 20)
        assert rows == read_rows("coco-30k", coco=coco)
        monkeypatch.setattr("evaluation_captions.COCO_COUNT", 3)
        assert len(read_rows("coco-30k", coco=coco)) == 3

    def test_missing_files_are_named(self, coco, tmp_path):
        with pytest.raises(SystemExit, match="captions_val2014.json.*annotations_trainval2014.zip"):
            read_rows("coco-30k", coco=tmp_path)
        (coco / "val2014" / "3.jpg").unlink()
        with pytest.raises(SystemExit, match="1 of the 5 COCO images do not exist, the first is .*3.jpg"):
            read_rows("coco-30k", coco=coco)


class TestBadInput:
    @pytest.mark.parametrize(
        ("lines", "sentence"),
        [
            (['{"caption": "a"}', "a cat"], "line 2, is not JSON"),
            (['{"caption": "a"}', "", '{"text": "a cat"}'], 'line 3: --task text-to-image needs {"caption": "..."}'),
            (['["a cat"]'], "line 1: --task text-to-image needs"),
            (['{"caption": "a café"}'], "line 1, is not JSON: 'utf-8' codec"),
            (['{"caption": "  "}'], "line 1: --task text-to-image needs"),
            (['{"caption": "a", "image": 3}'], "line 1: .* caption and image must be strings"),
            (['{"caption": "a", "image": "no.png"}'], "line 1: the image .*no.png does not exist"),
            (['{"caption": "a", "id": "../b"}'], "the id '../b' names a file"),
            (['{"caption": "a", "id": 2}', '{"caption": "b"}'], "has the id '2' 2 times"),
            (['{"caption": "a", "image": "0.png"}', '{"caption": "b"}'], "images in some lines only"),
            (["", " "], "holds no captions"),
        ],
    )
    def test_captions(self, evaluate, captions, real_images, lines, sentence):
        with pytest.raises(SystemExit, match=sentence):
            evaluate("--captions", captions(*lines))

    def test_no_file(self, evaluate, tmp_path):
        with pytest.raises(SystemExit, match="nowhere.jsonl does not exist"):
            evaluate("--captions", tmp_path / "nowhere.jsonl")

    def test_empty_batches(self, evaluate, capsys):
        with pytest.raises(SystemExit, match="2"):
            evaluate("--batch-size", 0)
        assert "--batch-size is 0, but must be at least 1" in capsys.readouterr().err

    def test_empty_limit(self, evaluate):
        with pytest.raises(SystemExit, match=r"holds no captions \(--limit 0\)"):
            evaluate("--limit", 0)

    def test_reconstruct_needs_images(self, evaluate, captions):
        with pytest.raises(SystemExit, match='line 1: --task reconstruct needs {"image": "..."}'):
            evaluate("--task", "reconstruct", "--captions", captions({"caption": "a"}))

    def test_broken_image(self, tmp_path):
        (tmp_path / "broken.png").write_bytes(b"not an image")
        with pytest.raises(ValueError, match="cannot be read .*broken.png"):
            evaluate_generation.Row("7", "a cat", tmp_path / "broken.png").reference()

    def test_pipeline_without_text(self, evaluate, captions, tmp_path):
        unet = UNet2DModel(
            sample_size=8,
            block_out_channels=(8,),
            norm_num_groups=2,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        )
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
        with pytest.raises(SystemExit, match="is a DDPMPipeline, which takes no text"):
            evaluate("--captions", captions({"caption": "a"}), "--pipeline", tmp_path / "ddpm")

    def test_pipeline_that_can_only_decode(self, evaluate, captions, tmp_path):
        MetaMorphPipeline.from_pretrained(EMOJI_CHECKPOINT, model=None, processor=None).save_pretrained(
            tmp_path / "decoder"
        )
        with pytest.raises(SystemExit, match="saved without its model or processor"):
            evaluate("--captions", captions({"caption": "a"}), "--pipeline", tmp_path / "decoder")

    def test_folder_of_another_run(self, evaluate, captions, tmp_path):
        path = captions({"caption": "a cat"})
        evaluate("--captions", path)
        with pytest.raises(SystemExit, match=r"differs in seed \(0 before, 1 now\)"):
            evaluate("--captions", path, "--seed", 1)
        with pytest.raises(SystemExit, match="differs in captions_sha256"):
            evaluate("--captions", captions({"caption": "a dog"}))
        (tmp_path / "out" / "settings.json").unlink()
        with pytest.raises(SystemExit, match="no settings.json"):
            evaluate("--captions", path)

    @pytest.mark.parametrize("flag", ["--fid-network", "--clip-network"])
    def test_missing_networks(self, evaluate, captions, real_images, tmp_path, flag):
        path = captions({"caption": "a", "image": "0.png"})
        with pytest.raises(SystemExit, match="nothing"):
            evaluate("--captions", path, flag, tmp_path / "nothing")

    def test_network_that_reads_no_text(self, evaluate, captions):
        with pytest.raises(SystemExit, match="which reads no text: --clip-network takes a CLIP or SigLIP"):
            config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
            folder = captions("").parent / "dino"
            Dinov2Model(config).save_pretrained(folder)
            load_clip(str(folder), torch.device("cpu"))


def test_contact_sheet_leaves_missing_images_white():
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    sheet = draw_contact_sheet([("a" * 90, red, blue), ("b", None, blue), ("c", red, None), ("d", red, blue)], size=76)
    assert sheet.size == (900, 200)
    colors = [sheet.getpixel((x, 60)) for x in (40, 130, 340, 430, 640, 730)]
    white, red, blue = (255, 255, 255), (255, 0, 0), (0, 0, 255)
    assert colors == [red, blue, white, blue, red, white]
