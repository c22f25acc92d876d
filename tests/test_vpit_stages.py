import copy
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from helpers import (
    EXAMPLES,
    arguments,
    build_trainer,
    train,
)
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from metamorph_hf import (
    MetaMorphForConditionalGeneration,
)
from metamorph_hf.vpit import stages
from metamorph_hf.vpit.collator import DataCollatorForVPiT
from metamorph_hf.vpit.stages import complete_peft_config, format_trainable_table


@pytest.fixture
def model(tiny_model):
    return tiny_model()


class TestStages:
    """Which parameters change, and at which learning rate."""

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize(("stage", "tower"), [("projector", False), ("full", False), ("full", True)])
    def test_trained_parameters(self, tiny_processor, tiny_model, tmp_path, stage, tied, tower):
        model = tiny_model(tie_word_embeddings=tied)
        before = copy.deepcopy(model.state_dict())
        rates = {"vision_tower_learning_rate": 1e-2} if tower else {}
        args = arguments(
            tmp_path, stage=stage, per_device_train_batch_size=8, weight_decay=0.1, optim="adamw_torch", **rates
        )
        train(model, tiny_processor, args)
        after = model.state_dict()
        changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
        embeddings = "model.language_model.embed_tokens.weight"
        if stage == "projector":
            rows = (after[embeddings] != before[embeddings]).any(1).nonzero().flatten().tolist()
            assert rows == sorted([tiny_processor.image_start_token_id, tiny_processor.image_end_token_id])
            changed -= {"lm_head.weight"} if tied else set()
            assert changed == {embeddings} | {name for name in before if name.startswith("model.projector.")}
        else:
            # Visual tokens do not pass through the tower's final norm and pooling head.
            unused = ("post_layernorm", "vision_tower.head")
            frozen = {n for n in before if "vision_tower" in n and (not tower or any(part in n for part in unused))}
            assert changed == before.keys() - frozen

    @pytest.mark.parametrize("tied", [False, True])
    def test_image_token_rows_get_the_input_gradient(self, tiny_processor, tiny_model, tmp_path, tied):
        """Compare with a model whose whole input embedding is trained by the text loss, as in the released stage 1."""
        model, twin = tiny_model(tie_word_embeddings=tied), tiny_model()
        if tied:
            twin.lm_head.weight.data = twin.model.language_model.embed_tokens.weight.data.clone()
            model.model.language_model.embed_tokens.weight.data = twin.lm_head.weight.data.clone()
            model.tie_weights()
        start = model.get_input_embeddings().weight.detach().clone()
        train(model, tiny_processor, arguments(tmp_path, stage="projector", per_device_train_batch_size=8))
        twin.train()(**DataCollatorForVPiT(tiny_processor)(EXAMPLES)).text_loss.backward()
        rows = [tiny_processor.image_start_token_id, tiny_processor.image_end_token_id]
        expected = start - 1e-2 * twin.get_input_embeddings().weight.grad
        torch.testing.assert_close(model.get_input_embeddings().weight[rows], expected[rows])
        # After training, gradients reach all rows again, as stage 2 needs.
        model.train()(**DataCollatorForVPiT(tiny_processor)(EXAMPLES[:3])).loss.backward()
        gradient = model.get_input_embeddings().weight.grad
        assert gradient.abs().sum(1).count_nonzero() > 2

    def test_stage_1_keeps_the_loss_weight_of_the_model(self, tiny_processor, tiny_model, tmp_path):
        model = tiny_model(visual_loss_weight=2.0)
        logs = train(model, tiny_processor, arguments(tmp_path, stage="projector")).state.log_history[0]
        assert logs["loss"] == pytest.approx(logs["text_loss"])
        assert model.config.visual_loss_weight == 2.0

    def test_learning_rates_of_modules(self, tiny_processor, model, tmp_path):
        rates = {
            "projector_learning_rate": 3e-3,
            "vision_head_learning_rate": 5e-3,
            "vision_tower_learning_rate": 1e-4,
        }
        trainer = build_trainer(
            model, tiny_processor, arguments(tmp_path, learning_rate=1e-3, weight_decay=0.1, **rates)
        )
        optimizer = trainer.create_optimizer()
        by_parameter = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
        for name, parameter in model.named_parameters():
            key = next((m for m in ("projector", "vision_head", "vision_tower") if m in name), None)
            expected = rates.get(f"{key}_learning_rate", 1e-3)
            assert by_parameter[id(parameter)]["lr"] == pytest.approx(expected), name
            decayed = not ("norm" in name or name.endswith("bias"))
            assert by_parameter[id(parameter)]["weight_decay"] == (0.1 if decayed else 0.0), name

    def test_table(self, tiny_processor, model, tmp_path, capsys):
        build_trainer(model, tiny_processor, arguments(tmp_path, stage="projector", projector_learning_rate=2e-3))
        table = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
        size = sum(p.numel() for p in model.model.projector.parameters())
        assert table["projector"] == [f"{size:,}", f"{size:,}", "0.002"]
        assert table["embeddings"][1:] == ["64", "0.01"]  # two rows of 32
        for module in ("vision_tower", "vision_head", "language_model", "lm_head"):
            assert table[module][1:] == ["0", "frozen"]

    @pytest.mark.parametrize("stage", ["projector", "full"])
    def test_trained_weights_are_float32(self, tiny_processor, tiny_model, tmp_path, stage):
        """In bfloat16, most weights are too coarse for an update of this size."""
        options = {"bf16": True, "optim": "adamw_torch", "learning_rate": 2.5e-6}
        model = tiny_model().bfloat16()
        before = model.model.projector[0].weight.detach().float()
        train(model, tiny_processor, arguments(tmp_path, stage=stage, max_steps=2, **options))
        assert model.model.projector[0].weight.dtype == torch.float32
        assert (model.model.projector[0].weight != before).float().mean() > 0.9
        assert model.model.vision_tower.dtype == torch.bfloat16

    def test_bfloat16_without_autocast(self, tiny_processor, tiny_model, tmp_path):
        with pytest.raises(ValueError, match="set bf16=True, .* or load the model with dtype='float32'"):
            build_trainer(tiny_model().bfloat16(), tiny_processor, arguments(tmp_path))

    def test_frozen_tower_stays_in_eval_mode(self, model):
        model.model.vision_tower.requires_grad_(False)
        assert model.train().training and not model.model.vision_tower.training
        model.model.vision_tower.requires_grad_(True)
        assert model.train().model.vision_tower.training


class TestPeft:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("use_dora", [False, True])
    def test_train_save_load_merge(self, tiny_processor, tiny_model, tmp_path, tied, use_dora):
        model = tiny_model(tie_word_embeddings=tied)
        model.save_pretrained(tmp_path / "base")
        tiny_processor.save_pretrained(tmp_path / "base")
        before = copy.deepcopy(model.state_dict())
        args = arguments(tmp_path / "run", max_steps=3, learning_rate=1e-1)
        peft_config = LoraConfig(r=4, use_dora=use_dora)
        trainer = train(str(tmp_path / "base"), None, args, peft_config=peft_config)
        trained = trainer.model
        assert peft_config.target_modules is None, "the caller's configuration must stay as it was"
        for name, parameter in trained.named_parameters():
            expected = "lora_" in name or "trainable_tokens_delta" in name or "modules_to_save" in name
            assert parameter.requires_grad == expected, name
            assert not (expected and "vision_tower" in name)
        assert sum("lora_A" in name for name, _ in trained.named_parameters()) == 2 * 7  # all linear layers, 2 blocks
        logs = trainer.state.log_history[0]
        assert logs["visual_loss"] != 0

        trainer.save_model(tmp_path / "adapter")
        batch = DataCollatorForVPiT(tiny_processor)(EXAMPLES)
        with torch.no_grad():
            expected = trained.eval()(**batch)
            assert not torch.allclose(expected.logits, tiny_model(tie_word_embeddings=tied)(**batch).logits, atol=1e-3)
            base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
            loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
            torch.testing.assert_close(loaded(**batch).logits, expected.logits, rtol=1e-4, atol=1e-4)
            merged = loaded.merge_and_unload()
            torch.testing.assert_close(merged(**batch).logits, expected.logits, rtol=1e-4, atol=1e-4)
            merged.save_pretrained(tmp_path / "merged")
            plain = MetaMorphForConditionalGeneration.from_pretrained(tmp_path / "merged")
            torch.testing.assert_close(plain(**batch).logits, expected.logits, rtol=1e-4, atol=1e-4)
        assert plain.state_dict().keys() == before.keys()
        changed = {name for name, weight in plain.state_dict().items() if not torch.equal(weight, before[name])}
        rows = (plain.get_input_embeddings().weight != before["model.language_model.embed_tokens.weight"]).any(1)
        image_tokens = sorted([tiny_processor.image_start_token_id, tiny_processor.image_end_token_id])
        assert rows.nonzero().flatten().tolist() == image_tokens
        assert {"lm_head.weight", "vision_head.0.weight", "model.projector.0.weight"} <= changed
        assert not any("vision_tower" in name for name in changed)

    def test_experts_are_adapted(self, tiny_processor, tiny_model, mixtral_config, tmp_path):
        tiny_model(text_config=mixtral_config).save_pretrained(tmp_path / "base")
        tiny_processor.save_pretrained(tmp_path / "base")
        args = arguments(tmp_path / "run", max_steps=3, learning_rate=1e-1)
        trainer = train(str(tmp_path / "base"), None, args, peft_config=LoraConfig(r=4))
        adapted = [n for n, p in trainer.model.named_parameters() if "experts" in n and "lora_B" in n and p.any()]
        assert len(adapted) == 2 * 2  # both matrices of two layers
        trainer.save_model(tmp_path / "adapter")
        batch = DataCollatorForVPiT(tiny_processor)(EXAMPLES)
        with torch.no_grad():
            expected = trainer.model.eval()(**batch).logits
            base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
            assert not torch.allclose(base(**batch).logits, expected, atol=1e-3)
            loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
            torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(loaded.merge_and_unload()(**batch).logits, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}])
    def test_experts_that_cannot_be_adapted(self, tiny_model, mixtral_config, caplog, options):
        completed = complete_peft_config(LoraConfig(**options), tiny_model(text_config=mixtral_config))
        assert completed.target_parameters is None
        assert "The experts are left out: PEFT cannot adapt them" in caplog.text

    @pytest.mark.parametrize("kind, expected", [("NO", "auto"), ("MULTI_GPU", None), ("DEEPSPEED", None)])
    def test_base_of_an_adapter_is_whole_on_each_device(self, tmp_path, monkeypatch, kind, expected):
        LoraConfig(base_model_name_or_path="base").save_pretrained(tmp_path)
        given = {}

        def load(path, device_map="auto", **kwargs):  # TRL's default
            given["device_map"] = device_map
            raise InterruptedError

        monkeypatch.setattr(stages, "create_model_from_path", load)
        monkeypatch.setattr(stages, "PartialState", lambda: SimpleNamespace(distributed_type=kind))
        with pytest.raises(InterruptedError):
            stages.load_adapter(str(tmp_path))
        assert given == {"device_map": expected}

    def test_load_adapter(self, tiny_processor, tiny_model, tmp_path):
        """`load_adapter` of transformers gives the same model as PEFT."""
        args = arguments(tmp_path, max_steps=2, learning_rate=1e-1)
        trainer = train(tiny_model(), tiny_processor, args, peft_config=LoraConfig(r=4))
        trainer.save_model(tmp_path / "adapter")
        batch = DataCollatorForVPiT(tiny_processor)(EXAMPLES)
        tiny_model().save_pretrained(tmp_path / "base")
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
        model.load_adapter(str(tmp_path / "adapter"))
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(**batch).logits, trainer.model.eval()(**batch).logits)

    def test_qlora(self, tiny_processor, tiny_model, tmp_path):
        """The language model is in 4 bits with adapters, projector and vision head are trained whole in float32."""
        tiny_model().save_pretrained(tmp_path / "base")
        tiny_processor.save_pretrained(tmp_path / "base")
        args = arguments(tmp_path / "run", max_steps=2, learning_rate=1e-1)
        options = {"peft_config": LoraConfig(r=4), "quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
        trainer = build_trainer(str(tmp_path / "base"), None, args, **options)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert all(p.dtype == torch.float32 for name, p in before.items() if "lora_" not in name)
        assert any("vision_head" in name for name in before) and any("projector" in name for name in before)
        assert any(isinstance(module, Linear4bit) for module in trainer.model.modules())
        trainer.train()
        for name, parameter in trainer.model.named_parameters():
            assert (name in before and not torch.equal(parameter, before[name])) == parameter.requires_grad, name

    def test_adapters_are_small(self, tiny_config, tiny_processor, tmp_path):
        """An adapter holds two rows of the embedding matrix."""
        config = tiny_config()
        config.text_config.vocab_size = 20_000
        model = MetaMorphForConditionalGeneration(config)
        train(model, tiny_processor, arguments(tmp_path), peft_config=LoraConfig(r=4)).save_model(tmp_path / "adapter")
        assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 100_000

    def test_given_settings_are_kept(self, model):
        given = LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"], trainable_token_indices=[1])
        completed = complete_peft_config(given, model)
        assert completed.target_modules == {"q_proj"}
        assert completed.modules_to_save == ["norm", "projector", "vision_head"]
        assert completed.trainable_token_indices == [1]

    @pytest.mark.parametrize(
        ("given", "tied"),
        [
            *(({"modules_to_save": ["embed_tokens"]}, tied) for tied in (False, True)),
            *(({"modules_to_save": ["lm_head"]}, tied) for tied in (False, True)),
            *(({"modules_to_save": ["embed_tokens", "lm_head", "vision_head"]}, tied) for tied in (False, True)),
            ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ],
    )
    def test_embeddings_and_lm_head(self, tiny_processor, tiny_model, tmp_path, given, tied):
        """They may be trained whole or adapted; all else is trained as ever, and the saved adapter is the model."""
        tiny_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
        tiny_processor.save_pretrained(tmp_path / "base")
        args = arguments(tmp_path / "run", max_steps=2, learning_rate=1e-1)
        trainer = train(str(tmp_path / "base"), None, args, peft_config=LoraConfig(r=4, **given))
        table = format_trainable_table(trainer.metamorph, trainer.args)
        frozen = {line.split()[0] for line in table.splitlines() if line.endswith("frozen")}
        assert frozen == {"vision_tower"}
        trainer.save_model(tmp_path / "adapter")
        batch = DataCollatorForVPiT(tiny_processor)(EXAMPLES)
        with torch.no_grad():
            expected = trainer.model.eval()(**batch).logits
            base = MetaMorphForConditionalGeneration.from_pretrained(tmp_path / "base")
            loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
            torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(loaded.merge_and_unload()(**batch).logits, expected, rtol=1e-4, atol=1e-4)

    def test_adapted_embeddings_of_a_tied_model(self, tiny_model):
        given = LoraConfig(target_modules=["q_proj", "embed_tokens"])
        with pytest.raises(ValueError, match="lm_head, which shares its weights, cannot be adapted"):
            complete_peft_config(given, tiny_model(tie_word_embeddings=True))

    def test_adapter_is_trained_further(self, tiny_processor, tiny_model, tmp_path, monkeypatch):
        """Its folder as the trainer's model continues it, from wherever that happens."""
        tiny_model().save_pretrained(tmp_path / "base")
        tiny_processor.save_pretrained(tmp_path / "base")
        args = arguments(tmp_path / "run", max_steps=2, learning_rate=1e-1)
        monkeypatch.chdir(tmp_path)
        first = train("base", None, args, peft_config=LoraConfig(r=4))
        first.save_model(tmp_path / "adapter")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        second = build_trainer("../adapter", None, args)
        tables = [format_trainable_table(trainer.metamorph, trainer.args) for trainer in (first, second)]
        assert tables[0] == tables[1]
        batch = DataCollatorForVPiT(tiny_processor)(EXAMPLES)
        with torch.no_grad():
            expected = first.model.eval()(**batch).logits
            torch.testing.assert_close(second.model.eval()(**batch).logits, expected)
        second.train()
        with torch.no_grad():
            assert not torch.allclose(second.model.eval()(**batch).logits, expected)
        with pytest.raises(ValueError, match="holds an adapter, which is trained further: leave out peft_config"):
            build_trainer("../adapter", None, args, peft_config=LoraConfig(r=4))

    @pytest.mark.parametrize("parallel", [False, True])
    def test_visual_queries_are_trained_whole(self, tiny_processor, tiny_model, tmp_path, parallel):
        """A model that generates an image in one pass has them."""
        model = tiny_model(visual_decoding="parallel" if parallel else "autoregressive")
        trainer = build_trainer(model, tiny_processor, arguments(tmp_path), peft_config=LoraConfig(r=4))
        trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        assert any("visual_queries.modules_to_save" in name for name in trained) == parallel
        assert sum(len(group["params"]) for group in trainer.create_optimizer().param_groups) == len(trained)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "visual_queries" in name}
        trainer.train()
        for name, parameter in trainer.model.named_parameters():
            if name in before:
                assert torch.equal(parameter, before[name]) == ("original_module" in name), name

    @pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "v_proj"]])
    def test_tower_is_not_adapted(self, tiny_processor, model, tmp_path, target_modules):
        """Its layers have the same names as those of the language model."""
        config = LoraConfig(r=4, target_modules=target_modules)
        trainer = build_trainer(model, tiny_processor, arguments(tmp_path), peft_config=config)
        trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        assert any("language_model" in name and "lora_" in name for name in trained)
        assert not any("vision_tower" in name for name in trained)

    def test_learning_rate_of_a_frozen_module(self, tiny_processor, model, tmp_path):
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["vision_head"]))
        args = arguments(tmp_path, projector_learning_rate=1e-4)
        with pytest.raises(ValueError, match="projector_learning_rate is set, but nothing of that module is trained"):
            build_trainer(adapted, tiny_processor, args)

    def test_not_in_stage_1(self, tiny_processor, model, tmp_path):
        with pytest.raises(ValueError, match="leave out peft_config"):
            build_trainer(model, tiny_processor, arguments(tmp_path, stage="projector"), peft_config=LoraConfig())

    def test_whole_modules_are_trained_in_float32(self, tiny_processor, tiny_model, tmp_path):
        trainer = build_trainer(
            tiny_model().bfloat16(), tiny_processor, arguments(tmp_path), peft_config=LoraConfig(r=4)
        )
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                assert parameter.dtype == torch.float32, name
