"""The libraries around a transformers model: accelerate, bitsandbytes, torchao, PEFT, the Hub."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    SiglipVisionConfig,
    Trainer,
    TrainingArguments,
)
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

from metamorph_hf import MetaMorphConfig, MetaMorphModel
from metamorph_hf.model_cards import create_model_card


IMAGE_IDS = [5, 4, 4, 4, 4, 6]  # ids of the tiny tokenizer
IMAGE_START = 5
OPTIONAL = pytest.mark.optional


@pytest.fixture
def inputs():
    """Return a prompt with an image, answered by an image."""
    ids = torch.tensor([[40, *IMAGE_IDS, 41, IMAGE_START]])
    pixel_values = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixel_values}


@pytest.fixture
def wide_model(tiny_config, tiny_model):
    """Return a model that is wide enough for 4 bits, which come in blocks of 64 values."""
    text_config = tiny_config().text_config
    text_config.update({"hidden_size": 64, "head_dim": 16})
    vision_config = SiglipVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
    )
    model = tiny_model(text_config=text_config, vision_config=vision_config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 0.3
    return model


def answer(model, inputs):
    return model.generate(**inputs, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)


def assert_same_answer(model, expected, inputs, atol=1e-4):
    found = answer(model, inputs)
    assert found.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(found.visual_tokens[0], expected.visual_tokens[0], rtol=0, atol=atol)


class TestPlacement:
    """Parts of the model may be on another device or on the disk."""

    @pytest.mark.parametrize("where", ["cpu", "disk"])
    def test_offload(self, tiny_model, inputs, tmp_path, where):
        model = tiny_model()
        expected, tokens = answer(model, inputs), model.get_visual_tokens(inputs["pixel_values"])
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        if where == "cpu":
            cpu_offload(model, execution_device="cpu")
        else:
            disk_offload(model, tmp_path, execution_device="cpu")
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert_same_answer(model, expected, inputs)
        assert_same_answer(model, expected, {"input_ids": inputs["input_ids"], "visual_tokens": tokens})
        assert torch.equal(model.get_visual_tokens(inputs["pixel_values"]), tokens)
        assert model(**inputs, labels=inputs["input_ids"]).loss == loss

    @pytest.mark.parametrize("share", [1.0, 0.9, 0.5])
    def test_auto(self, tiny_model, inputs, tmp_path, share):
        """Layers that do not fit into memory are on the disk, and no layer is split."""
        model = tiny_model()
        model.save_pretrained(tmp_path)
        size = sum(parameter.nbytes for parameter in model.parameters())
        loaded = AutoModel.from_pretrained(
            tmp_path, device_map="auto", max_memory={"cpu": int(size * share)}, offload_folder=tmp_path / "offload"
        )
        if share < 1:
            assert "disk" in loaded.hf_device_map.values()
            for layer in loaded.model.language_model.layers:
                assert len({parameter.device for parameter in layer.parameters()}) == 1
        assert_same_answer(loaded, answer(model, inputs), inputs)

    def test_no_part_is_split_in_a_layer(self, tiny_model):
        model = tiny_model()
        assert {"LlamaDecoderLayer", "SiglipEncoderLayer"} <= set(model._no_split_modules)


class TestPrecision:
    def test_float16(self, tiny_model, inputs, tmp_path):
        """In float16, vision tower, projector and vision head stay in float32."""
        model = tiny_model()
        for parameter in model.parameters():
            parameter.data *= 0.5
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float16)
        assert loaded.dtype == loaded.model.language_model.dtype == torch.float16
        for name, parameter in loaded.named_parameters():
            is_kept = name.startswith(("model.vision_tower.", "model.projector.", "vision_head."))
            assert parameter.dtype == (torch.float32 if is_kept else torch.float16), name
        assert_same_answer(loaded, answer(model, inputs), inputs, atol=0.02)
        outputs = loaded.train()(**inputs, labels=inputs["input_ids"])
        outputs.loss.backward()
        assert outputs.loss.isfinite()
        assert loaded.model.language_model.layers[0].mlp.up_proj.weight.grad.isfinite().all()
        base = MetaMorphModel.from_pretrained(tmp_path, dtype=torch.float16)
        assert base.projector[0].weight.dtype == torch.float32

    @pytest.mark.parametrize(
        "library", ["bitsandbytes, 8 bits", "bitsandbytes, 4 bits", pytest.param("torchao, 8 bits", marks=OPTIONAL)]
    )
    def test_quantized(self, wide_model, inputs, tmp_path, library):
        """Only the language model is quantized, without the rows of the image tokens."""
        pytest.importorskip(library.split(",")[0])
        if library.startswith("torchao"):
            from torchao.quantization import Int8WeightOnlyConfig
            from transformers import TorchAoConfig

            config = TorchAoConfig(Int8WeightOnlyConfig())
        else:
            config = BitsAndBytesConfig(load_in_8bit="8" in library, load_in_4bit="4" in library)
        wide_model.save_pretrained(tmp_path / "whole")
        model = AutoModel.from_pretrained(
            tmp_path / "whole", quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
        )
        kept = ("model.vision_tower.", "model.projector.", "vision_head.", "lm_head")
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                plain = type(module) is torch.nn.Linear and type(module.weight.data) is torch.Tensor
                assert plain is name.startswith(kept), name
        assert type(model.get_input_embeddings()) is torch.nn.Embedding
        pixels = inputs["pixel_values"]
        assert torch.equal(model.get_visual_tokens(pixels), wide_model.get_visual_tokens(pixels))
        found, expected = answer(model, inputs), answer(wide_model, inputs)
        assert len(found.visual_tokens[0]) == 1
        first = 0  # errors of earlier tokens reach the later ones
        error = (found.visual_tokens[0][0, first] - expected.visual_tokens[0][0, first]).norm()
        assert 0 < error < (0.5 if "4" in library else 0.1)
        model.save_pretrained(tmp_path / "quantized")
        assert_same_answer(AutoModel.from_pretrained(tmp_path / "quantized"), found, inputs)

    @pytest.mark.optional
    @pytest.mark.parametrize("backend", ["quanto", "hqq"])
    def test_quantized_cache(self, tiny_model, inputs, backend):
        pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend])
        options = {"quanto": {"nbits": 4}, "hqq": {"nbits": 8, "axis_key": 1, "axis_value": 1}}[backend]
        options = {"backend": backend, "q_group_size": 16, **options}
        cache = {"cache_implementation": "quantized", "cache_config": options}
        model = tiny_model()
        found = model.generate(**inputs, **cache, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
        second = found.visual_tokens[0][0, 1] - answer(model, inputs).visual_tokens[0][0, 1]  # the first one to see it
        assert 0 < second.norm() < (0.05 if options["nbits"] == 8 else 0.8)  # sqrt(2) if unrelated


class TestAttention:
    def test_both_towers(self, tiny_model, inputs, tmp_path):
        model = tiny_model()
        expected = answer(model, inputs)
        model.save_pretrained(tmp_path)
        eager = AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
        mixed = AutoModel.from_pretrained(
            tmp_path, attn_implementation={"text_config": "eager", "vision_config": "sdpa"}
        )
        flex = AutoModel.from_pretrained(tmp_path, attn_implementation="flex_attention")
        for loaded, llm, tower in (
            (eager, "eager", "eager"),
            (mixed, "eager", "sdpa"),
            (flex, "flex_attention", "flex_attention"),
        ):
            assert loaded.model.language_model.config._attn_implementation == llm
            assert loaded.model.vision_tower.config._attn_implementation == tower
        for loaded in (eager, mixed):
            assert_same_answer(loaded, expected, inputs)

    def test_outputs_of_both_towers(self, tiny_model, inputs):
        model = tiny_model()
        model.set_attn_implementation("eager")
        outputs = model(**inputs, output_attentions=True, output_hidden_states=True)
        assert len(outputs.attentions) == 2 and len(outputs.hidden_states) == 3
        features = model.get_image_features(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
        for tower in (features, outputs.image_outputs):
            assert len(tower.attentions) == 1 and len(tower.hidden_states) == 2
        plain = model.get_image_features(inputs["pixel_values"])
        assert plain.attentions is None and torch.equal(plain.pooler_output, features.pooler_output)

    @pytest.mark.parametrize("dynamic", [False, True], ids=["fixed shapes", "any shapes"])
    def test_export(self, tiny_model, dynamic):
        """transformers' exporter gives one graph of both towers."""

        def inputs(rows, words):
            ids = torch.tensor([[40, *IMAGE_IDS, *range(41, 41 + words)]] * rows)
            pixel_values = torch.randn(rows, 3, 16, 16)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixel_values}

        model = tiny_model()
        program, _ = DynamoExporter().export_program(model, inputs(2, 3), DynamoConfig(dynamic=dynamic))
        seen = inputs(3, 9) if dynamic else inputs(2, 3)
        found, expected = program.module()(**seen), model(**seen)
        for name in ("logits", "next_visual_token"):
            torch.testing.assert_close(found[name], expected[name])

    def test_gradient_checkpointing_of_both_towers(self, tiny_model):
        model = tiny_model()
        model.gradient_checkpointing_enable()
        assert model.model.language_model.layers[0].gradient_checkpointing
        assert model.model.vision_tower.encoder.layers[0].gradient_checkpointing


class TestTrainer:
    """transformers' own Trainer works, too."""

    def test_evaluate(self, tiny_model, inputs, tmp_path):
        """Evaluation gathers logits but not the tower's outputs."""
        model = tiny_model()
        rows = [{**{name: value[0] for name, value in inputs.items()}, "labels": inputs["input_ids"][0]}] * 3
        seen = []
        trainer = Trainer(
            model,
            TrainingArguments(tmp_path, per_device_eval_batch_size=2, report_to="none", use_cpu=True),
            eval_dataset=rows,
            compute_metrics=lambda prediction: seen.append(prediction.predictions) or {},
        )
        loss = model(**inputs, labels=inputs["input_ids"]).loss.item()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
        logits = next(part for part in seen[0] if part is not None and part.ndim == 3)
        assert logits.shape == (3, inputs["input_ids"].shape[1], model.config.text_config.vocab_size)


class TestAdapters:
    @pytest.fixture
    def adapter(self, tiny_model, inputs, tmp_path):
        """Return the folder and the answer of a LoRA of language model, projector and vision head."""
        peft = pytest.importorskip("peft")
        model = tiny_model()
        model.save_pretrained(tmp_path / "base")
        targets = r".*language_model.*(q_proj|v_proj)|.*projector\.[02]|vision_head\.[02]"
        adapted = peft.get_peft_model(
            AutoModel.from_pretrained(tmp_path / "base"), peft.LoraConfig(r=4, target_modules=targets)
        )
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        adapted.save_pretrained(tmp_path / "adapter")
        expected = answer(adapted, inputs)
        assert not torch.allclose(expected.visual_tokens[0], answer(model, inputs).visual_tokens[0], atol=1e-3)
        return tmp_path / "adapter", expected

    @pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText])
    def test_load(self, adapter, inputs, auto_class):
        peft = pytest.importorskip("peft")
        folder, expected = adapter
        model = auto_class.from_pretrained(folder.parent / "base")
        model.load_adapter(folder)
        assert_same_answer(model, expected, inputs)
        for module in model.modules():
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.enable_adapters(False)
        assert not torch.allclose(answer(model, inputs).visual_tokens[0], expected.visual_tokens[0], atol=1e-3)
        assert_same_answer(auto_class.from_pretrained(folder), expected, inputs)  # the base is named in the adapter


class TestSaving:
    def test_shards(self, tiny_model, inputs, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
        assert_same_answer(AutoModel.from_pretrained(tmp_path), answer(model, inputs), inputs)

    def test_pooling_head_of_older_checkpoints(self, tiny_model, tmp_path, caplog):
        """SigLIP's pooling head is not built, and older checkpoints that have it load without a warning."""
        model = tiny_model()
        assert not model.model.vision_tower.use_head
        state = {**model.state_dict(), "model.vision_tower.head.probe": torch.zeros(1, 1, 16)}
        model.save_pretrained(tmp_path, state_dict=state)
        _, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["unexpected_keys"] and not info["missing_keys"]


class Hub:
    """A repository of the Hub that keeps the files it is sent; `card` is its README."""

    def __init__(self, monkeypatch, folder: Path, card: str | None = None):
        self.folder, self.files, self.commits = folder, {}, []  # the branches of commits
        if card is not None:
            self.files["README.md"] = card.encode()
        monkeypatch.setattr(HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(HfApi, "file_exists", self.file_exists)
        monkeypatch.setattr(HfApi, "create_commit", self.create_commit)
        monkeypatch.setattr("huggingface_hub.repocard.hf_hub_download", self.download)

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def file_exists(self, repo_id, name, **kwargs):
        return "/" in repo_id and name in self.files

    def create_commit(self, repo_id, operations, **kwargs):
        self.commits.append(kwargs.get("revision"))
        for operation in operations:
            content = operation.path_or_fileobj
            self.files[operation.path_in_repo] = content if isinstance(content, bytes) else Path(content).read_bytes()

    def download(self, *args, **kwargs):
        if "README.md" not in self.files:
            raise EntryNotFoundError("no README.md")
        path = self.folder / "card.md"
        path.write_bytes(self.files["README.md"])
        return path


class TestModelCard:
    @pytest.fixture
    def model(self, tiny_model):
        model = tiny_model()
        model.config.text_config.name_or_path = "someone/tiny-llama"
        model.config.vision_config.name_or_path = "someone/tiny-siglip"
        return model

    def test_push(self, model, monkeypatch, tmp_path):
        hub = Hub(monkeypatch, tmp_path)
        model.push_to_hub("me/tiny-metamorph", tags=["mine"])
        assert {"config.json", "model.safetensors", "modeling_metamorph.py", "README.md"} <= hub.files.keys()
        card = ModelCard(hub.files["README.md"].decode())
        assert card.data.base_model == ["someone/tiny-llama", "someone/tiny-siglip"]
        assert {"metamorph", "mine"} <= set(card.data.tags)
        assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "any-to-any")
        assert "| language model | [someone/tiny-llama](https://huggingface.co/someone/tiny-llama) | llama | 32 |" in (
            card.text
        )
        assert 'from_pretrained("me/tiny-metamorph")' in card.text

    @pytest.mark.parametrize("name", ["me/tiny-metamorph", "tiny-metamorph"])
    def test_card_on_the_hub_is_kept(self, model, monkeypatch, tmp_path, name):
        hub = Hub(monkeypatch, tmp_path, card="---\nlicense: mit\n---\n# Mine\n")
        model.push_to_hub(name)
        card = ModelCard(hub.files["README.md"].decode())
        assert card.data.license == "mit" and "# Mine" in card.text

    def test_push_to_a_branch_leaves_main_alone(self, model, monkeypatch, tmp_path):
        hub = Hub(monkeypatch, tmp_path)
        monkeypatch.setattr(HfApi, "create_branch", lambda *args, **kwargs: None)
        model.push_to_hub("me/tiny-metamorph", revision="trial")
        assert hub.commits == ["trial"]

    def test_sources_outlive_training(self, model, tmp_path):
        model.save_pretrained(tmp_path / "first")
        AutoModel.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
        config = MetaMorphConfig.from_pretrained(tmp_path / "second")
        assert create_model_card(config, "x").data.base_model == ["someone/tiny-llama", "someone/tiny-siglip"]

    def test_folders_are_not_told(self, tiny_config, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "models" / "llm").mkdir(parents=True)
        config = tiny_config()
        config.text_config.name_or_path = "models/llm"
        config.vision_config.name_or_path = "/home/me/towers/siglip"
        card = create_model_card(config, "me/x")
        assert card.data.base_model is None
        assert "| llm | llama |" in card.text and "| siglip | siglip_vision_model |" in card.text
        assert "/home/me" not in str(card)

    def test_its_code_runs(self, tiny_model, tiny_processor, tmp_path, capsys):
        model = tiny_model()
        model.generation_config.force_image = True
        model.save_pretrained(tmp_path)
        tiny_processor.save_pretrained(tmp_path)
        code = create_model_card(model.config, str(tmp_path)).text.split("```python\n")[1].split("```")[0]
        found = {}
        exec(code, found)
        assert found["output"].visual_tokens[0].shape[1:] == (4, 16)
        assert "<image>" in capsys.readouterr().out
        assert type(found["processor"]) is type(AutoProcessor.from_pretrained(tmp_path))
