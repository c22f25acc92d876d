import copy
import json
import shutil
from itertools import chain

import pytest
import torch
from datasets import Dataset, List, disable_caching, enable_caching
from datasets import Image as ImageFeature
from helpers import EXAMPLES, ROWS, arguments, build_trainer, dataset_of, losses, train, write_jsonl
from PIL import Image
from transformers import LlamaConfig, MambaConfig, OPTConfig, Qwen3NextConfig, TrainerCallback
from transformers.models.auto.modeling_auto import AutoModel

from metamorph_hf import VPiTTrainer, image_reading
from metamorph_hf.data.formats import BadSample
from metamorph_hf.data.mixture import load_mixture
from metamorph_hf.vpit.collator import DataCollatorForVPiT
from metamorph_hf.vpit.packing import check_packable, pack_dataset, pack_lengths


MAX_LENGTH = 60


def pack(processor, examples=EXAMPLES, strategy="bfd", **kwargs):
    collate = DataCollatorForVPiT(processor, kwargs.pop("max_length", MAX_LENGTH), **kwargs)
    return collate, pack_dataset(dataset_of(examples), collate, strategy)


def with_visual_tokens(examples, model) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    shape = (model.config.num_image_tokens, model.config.visual_token_dim)
    return [
        {"messages": e["messages"], "visual_tokens": [torch.randn(shape, generator=generator) for _ in e["images"]]}
        for e in examples
    ]


def backward(model, batch) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = copy.deepcopy(model).train()
    outputs = model(**batch, use_cache=False)
    outputs.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [outputs.loss.item(), outputs.text_loss.item(), outputs.visual_loss.item()], gradients


class TestRows:
    @pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
    def test_every_conversation_is_in_one_row(self, strategy):
        lengths = torch.randint(0, 101, (500,), generator=torch.Generator().manual_seed(0)).tolist()
        rows = pack_lengths(lengths, 100, strategy)
        assert sorted(chain(*rows)) == list(range(500))
        assert all(sum(lengths[index] for index in row) <= 100 for row in rows)
        if strategy == "wrapped":
            assert list(chain(*rows)) == list(range(500))

    def test_best_fit_wastes_little(self):
        """The lower bound of the number of rows is that of the tokens."""
        lengths = torch.randint(60, 601, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
        assert len(pack_lengths(lengths, 2048)) <= 1.01 * sum(lengths) / 2048 + 1

    def test_lengths_are_those_of_batches(self, tiny_processor):
        collate = DataCollatorForVPiT(tiny_processor)
        assert collate.measure(EXAMPLES) == [collate([example])["input_ids"].shape[1] for example in EXAMPLES]

    def test_no_image_is_decoded_for_lengths(self, tiny_processor, pictures, monkeypatch):
        """Neither paths nor an image column."""
        rows = [{"messages": EXAMPLES[1]["messages"], "images": [str(pictures / f"{n}.png")]} for n in range(6)]
        table = Dataset.from_list(rows)
        decoded = table.cast_column("images", List(ImageFeature()))
        collate = DataCollatorForVPiT(tiny_processor, MAX_LENGTH)
        with monkeypatch.context() as patch:
            patch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("an image was decoded"))
            patch.setattr(image_reading, "_open", lambda image: pytest.fail("an image was decoded"))
            packed = [pack_dataset(each, collate) for each in (table, decoded)]
        first, second = (collate([dataset[0]]) for dataset in packed)
        assert len(first["pixel_values"]) == len(packed[0][0]["conversations"]) > 1
        assert torch.equal(first["pixel_values"], second["pixel_values"])

    def test_lengths_are_cached(self, tiny_processor, pictures, tmp_path, monkeypatch):
        rows = [{"messages": EXAMPLES[1]["messages"], "images": [str(pictures / "1.png")]}] * 4
        Dataset.from_list(rows).to_json(tmp_path / "data.jsonl")
        table = Dataset.from_json(str(tmp_path / "data.jsonl"), cache_dir=str(tmp_path / "cache"))
        tables = [table, load_mixture([{"task": "chat", "path": str(tmp_path / "data.jsonl")}])]
        collate = DataCollatorForVPiT(tiny_processor, MAX_LENGTH)
        expected = [pack_dataset(each, collate)[:] for each in tables]
        monkeypatch.setattr(DataCollatorForVPiT, "measure", lambda *args: pytest.fail("lengths were measured again"))
        assert [pack_dataset(each, collate)[:] for each in tables] == expected
        disable_caching()
        try:
            with pytest.raises(pytest.fail.Exception, match="measured again"):
                pack_dataset(table, collate)
        finally:
            enable_caching()

    def test_rows_that_were_corrected_are_measured_again(self, tiny_processor, video, tmp_path):
        """A conversation without its video has no length, which must not be kept."""
        rows = [{**ROWS["video_qa"], "video": str(tmp_path / "late.mp4")}] * 3
        source = {"task": "video_qa", "path": write_jsonl(tmp_path / "rows.jsonl", rows)}
        collate, lengths = DataCollatorForVPiT(tiny_processor), []
        collate.max_length = 10_000
        for _ in range(2):
            mixture = load_mixture([{**source, "num_samples": 3}])
            lengths.append([collate.measure(row["conversations"]) for row in pack_dataset(mixture, collate)])
            packed = pack_dataset(mixture, collate)
            if not (tmp_path / "late.mp4").exists():
                shutil.copy(video, tmp_path / "late.mp4")
        (whole,) = lengths[1]
        collate.max_length = max(whole) + 1  # one conversation in a row
        assert len(packed) == 1 and len(pack_dataset(mixture, collate)) == 3


class TestBatches:
    @pytest.mark.parametrize("decoding", ["autoregressive", "parallel"])
    @pytest.mark.parametrize("images", ["pixels", "visual tokens"])
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("padding_free", [False, True])
    def test_losses_and_gradients_are_those_of_padded_batches(
        self, tiny_processor, tiny_model, decoding, images, attention, padding_free
    ):
        """In two rows of several conversations, or in a single one."""
        model = tiny_model(visual_decoding=decoding)
        model.set_attn_implementation(attention)
        examples = EXAMPLES if images == "pixels" else with_visual_tokens(EXAMPLES, model)
        collate, packed = pack(tiny_processor, examples, max_length=115)
        collate.padding_free = padding_free
        rows = packed[:]["conversations"]
        assert len(rows) == 2 and min(map(len, rows)) > 1
        batch = collate([{"conversations": row} for row in rows])
        assert batch["input_ids"].shape[0] == (1 if padding_free else 2) and "attention_mask" not in batch
        padded = DataCollatorForVPiT(tiny_processor)(list(chain(*rows)))
        (found, gradients), (expected, expected_gradients) = (backward(model, each) for each in (batch, padded))
        assert found == pytest.approx(expected, rel=1e-5)
        assert gradients.keys() == expected_gradients.keys()
        total = torch.cat([gradient.flatten() for gradient in expected_gradients.values()]).norm()
        for name, gradient in gradients.items():
            difference = (gradient - expected_gradients[name]).norm()
            # Biases of keys have no gradient but rounding errors.
            assert difference < 1e-5 * expected_gradients[name].norm() + 1e-7 * total, name

    def test_load_balancing_loss_is_that_of_padded_batches(self, tiny_processor, tiny_model, mixtral_config):
        """Padding of packed rows does not count either."""
        model, collate = tiny_model(text_config=mixtral_config).eval(), DataCollatorForVPiT(tiny_processor, 200)
        short, long = EXAMPLES[4], EXAMPLES[2]
        packed = collate([{"conversations": [long, short, long]}, {"conversations": [short]}])
        padded = collate([long, short, long, short])
        options = {"output_router_logits": True, "use_cache": False}
        found, expected = (model(**batch, **options).aux_loss for batch in (packed, padded))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        one, first = collate([{"conversations": [short]}]), packed["position_ids"][:1]
        two = {
            **packed,
            "input_ids": packed["input_ids"][:1].repeat(2, 1),
            "labels": packed["labels"][:1].repeat(2, 1),
        }
        shared, whole = (
            model(**{**two, "position_ids": ids}, **options).aux_loss for ids in (first, first.repeat(2, 1))
        )
        assert shared == whole and model(**one, **options).aux_loss.isfinite()

    def test_mixture_of_experts_survives_a_batch_without_samples(
        self, tiny_processor, tiny_model, mixtral_config, tmp_path
    ):
        bad = [{**EXAMPLES[1], "images": ["/no/such.png"]}] * 2
        options = {"packing": True, "max_length": 60, "on_bad_sample": "skip", "max_bad_share": 1.0, "max_steps": 2}
        args = arguments(tmp_path, per_device_train_batch_size=1, **options)
        trainer = train(tiny_model(text_config=mixtral_config), tiny_processor, args, bad)
        assert all(weight.isfinite().all() for weight in trainer.model.state_dict().values())

    @pytest.mark.parametrize("padding_free", [False, True])
    def test_conversations_do_not_see_each_other(self, tiny_processor, tiny_model, padding_free):
        model, collate = tiny_model(), DataCollatorForVPiT(tiny_processor, padding_free=padding_free)
        changed = copy.deepcopy(EXAMPLES[1])
        changed["messages"][0]["content"][1]["text"] = "what is THAT?"
        changed["images"] = EXAMPLES[0]["images"]
        rows = [[EXAMPLES[3], EXAMPLES[1], EXAMPLES[5], EXAMPLES[2]], [EXAMPLES[3], changed, EXAMPLES[5], EXAMPLES[2]]]
        batches = [collate([{"conversations": row}]) for row in rows]
        logits = [model(**batch, use_cache=False).logits[0] for batch in batches]
        starts = (batches[0]["position_ids"][0] == 0).nonzero().flatten().tolist()
        is_other = torch.ones(len(logits[0]), dtype=torch.bool)
        is_other[starts[1] : starts[2]] = False
        assert torch.equal(logits[0][is_other], logits[1][is_other])
        assert not torch.allclose(logits[0][~is_other], logits[1][~is_other])

    def test_what_a_batch_holds(self, tiny_processor):
        """Padding is a row of conversations of one token, and nothing predicts a conversation's first token."""
        rows = [{"conversations": EXAMPLES[:3]}, {"conversations": [EXAMPLES[4]]}]
        lengths = DataCollatorForVPiT(tiny_processor).measure([*EXAMPLES[:3], EXAMPLES[4]])
        batch = DataCollatorForVPiT(tiny_processor)(rows)
        expected = [*range(lengths[0]), *range(lengths[1]), *range(lengths[2])]
        assert batch["position_ids"][0].tolist() == expected
        assert batch["position_ids"][1].tolist() == [*range(lengths[3]), *[0] * (len(expected) - lengths[3])]
        assert (batch["labels"][batch["position_ids"] == 0] == -100).all()
        free = DataCollatorForVPiT(tiny_processor, padding_free=True)(rows)
        assert free["position_ids"][0].tolist() == [*expected, *range(lengths[3])]
        assert free["cu_seq_lens_q"].tolist() == torch.tensor([0, *lengths]).cumsum(0).tolist()
        assert free["cu_seq_lens_q"].dtype == torch.int32 and free["max_length_k"] == max(lengths)

    def test_bad_samples(self, tiny_processor):
        bad = {**EXAMPLES[1], "id": "bad", "images": ["/no/such.png"]}
        rows = [{"conversations": [EXAMPLES[0], bad]}, {"conversations": [bad]}]
        with pytest.raises(BadSample, match="Example bad has a bad image"):
            DataCollatorForVPiT(tiny_processor)(rows)
        skipping = DataCollatorForVPiT(tiny_processor, on_bad_sample="skip")
        batch = skipping(rows)
        assert batch["sample_ids"] == ["Example 0 of the batch"] and len(batch["rejected"]) == 2
        assert torch.equal(batch["input_ids"], skipping([EXAMPLES[0]])["input_ids"])
        assert skipping(rows[1:])["labels"].tolist() == [[-100]]

    @pytest.mark.parametrize("on_too_long", ["refuse", "drop_turns"])
    def test_long_conversations(self, tiny_processor, on_too_long):
        long = {"messages": EXAMPLES[2]["messages"] * 3, "images": []}
        collate, packed = pack(tiny_processor, [long, *EXAMPLES[:2]], on_too_long=on_too_long, on_bad_sample="skip")
        batch = collate(list(packed))
        assert [sample["kind"] for sample in batch["rejected"]] == [
            "skipped" if on_too_long == "refuse" else "shortened"
        ]
        assert batch["input_ids"].shape[1] <= MAX_LENGTH


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class TestTrainer:
    OPTIONS = {"packing": True, "max_length": MAX_LENGTH, "num_train_epochs": 1, "max_steps": -1}

    def test_an_epoch_is_that_of_padded_batches(self, tiny_processor, tiny_model, tmp_path, capsys):
        """One step over all conversations changes the weights alike, and everything is counted alike."""
        trained = []
        for options in ({"packing": True, "max_length": MAX_LENGTH}, {}, {"padding_free": True}):
            model = tiny_model()
            args = arguments(tmp_path, per_device_train_batch_size=8, **options)
            trained.append((train(model, tiny_processor, args).state.log_history[0], model.state_dict()))
        assert "8 conversations are packed in 4 rows of at most 60 tokens" in capsys.readouterr().out
        logs, weights = trained.pop(1)
        for other_logs, other_weights in trained:
            for name in ("text_loss", "visual_loss", "num_tokens", "num_images", "num_text_labels", "entropy"):
                assert other_logs[name] == pytest.approx(logs[name], rel=1e-5), name
            for name, weight in weights.items():
                torch.testing.assert_close(other_weights[name], weight, rtol=1e-5, atol=1e-6)

    def test_mean_over_accumulated_rows(self, tiny_processor, tiny_model, tmp_path):
        weights = []
        for options in (
            {"packing": True, "max_length": MAX_LENGTH, "gradient_accumulation_steps": 4},
            {"gradient_accumulation_steps": 8},
        ):
            model = tiny_model()
            train(model, tiny_processor, arguments(tmp_path, per_device_train_batch_size=1, **options))
            weights.append(model.state_dict())
        for name, weight in weights[1].items():
            torch.testing.assert_close(weights[0][name], weight, rtol=1e-4, atol=1e-6)

    def test_resumed_in_an_epoch(self, tiny_processor, tiny_model, tmp_path):
        options = {"train_sampling_strategy": "random", "save_strategy": "steps", "save_steps": 1}
        options |= {**self.OPTIONS, "per_device_train_batch_size": 1, "num_train_epochs": 2}
        whole = train(tiny_model(), tiny_processor, arguments(tmp_path / "whole", **options))
        assert whole.state.global_step == 8
        args = arguments(tmp_path / "cut", **options)
        train(tiny_model(), tiny_processor, args, callbacks=[StopAt(3)])
        resumed = build_trainer(tiny_model(), tiny_processor, args)
        resumed.train(resume_from_checkpoint=True)
        assert losses(resumed) == losses(whole)
        for name, weight in resumed.model.state_dict().items():
            assert torch.equal(weight, whole.model.state_dict()[name]), name

    def test_streams(self, tiny_processor, tiny_model, pictures, tmp_path):
        """They have the rows of the stored dataset, with the images of a column."""
        rows = [{"messages": EXAMPLES[1]["messages"], "images": [str(pictures / f"{n}.png")]} for n in range(6)]
        rows = [*rows, {"messages": EXAMPLES[2]["messages"], "images": []}]
        table = Dataset.from_list(rows).cast_column("images", List(ImageFeature()))
        args = arguments(tmp_path, per_device_train_batch_size=1, packing=True, max_length=MAX_LENGTH, max_steps=3)
        trained = []
        for dataset in (table, table.to_iterable_dataset(num_shards=1)):
            trainer = VPiTTrainer(tiny_model(), args, processing_class=tiny_processor, train_dataset=dataset)
            trainer.train()
            trained.append(losses(trainer))
        assert trained[0] == pytest.approx(trained[1], rel=1e-6)

    @pytest.mark.slow
    def test_compiled_and_checkpointed(self, tiny_processor, tiny_model, tmp_path):
        """Traced as for compilation, but run without generated code, which would need a compiler."""
        options = {"packing": True, "max_length": MAX_LENGTH, "max_steps": 2}
        expected = losses(train(tiny_model(), tiny_processor, arguments(tmp_path, **options)))
        options |= {"torch_compile": True, "torch_compile_backend": "eager", "gradient_checkpointing": True}
        found = losses(train(tiny_model(), tiny_processor, arguments(tmp_path, **options)))
        assert found == pytest.approx(expected, rel=1e-5)

    def test_bad_samples_are_listed(self, tiny_processor, tiny_model, tmp_path):
        bad = {**EXAMPLES[1], "images": ["/no/such.png"]}
        args = arguments(
            tmp_path, per_device_train_batch_size=8, on_bad_sample="skip", max_bad_share=0.2, **self.OPTIONS
        )
        trainer = train(tiny_model(), tiny_processor, args, [bad, *EXAMPLES[1:]])
        assert trainer.totals["samples"] == 7 and trainer.totals["skipped_samples"] == 1
        (line,) = (tmp_path / "rejected_samples-0.jsonl").read_text().splitlines()
        assert "/no/such.png" in json.loads(line)["reason"]

    @pytest.mark.parametrize(
        "options", [{"packing": True}, {"padding_free": True}, {"packing": True, "padding_free": True}]
    )
    def test_evaluation(self, tiny_processor, tiny_model, tmp_path, options):
        expected = build_trainer(tiny_model(), tiny_processor, arguments(tmp_path)).evaluate(dataset_of(EXAMPLES))
        args = arguments(tmp_path, max_length=MAX_LENGTH, per_device_eval_batch_size=3, **options)
        found = build_trainer(tiny_model(), tiny_processor, args).evaluate(dataset_of(EXAMPLES))
        assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)

    def test_refused(self, tiny_processor, tiny_model, tmp_path):
        args = arguments(tmp_path, packing=True)
        for collator, reason in (
            (list, "need a DataCollatorForVPiT"),
            (DataCollatorForVPiT(tiny_processor), "needs the length of a row"),
        ):
            with pytest.raises(ValueError, match=reason):
                build_trainer(tiny_model(), tiny_processor, args, data_collator=collator)


class TestLanguageModels:
    SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}

    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            (MambaConfig(**SIZES), r"type mamba cannot .* \(linear_attention\) carry a state"),
            (Qwen3NextConfig(**SIZES, num_experts=4, moe_intermediate_size=8), "type qwen3_next cannot"),
            (
                OPTConfig(vocab_size=40, hidden_size=36, ffn_dim=32, num_hidden_layers=2, word_embed_proj_dim=36),
                "type opt cannot keep the conversations of a row apart, as its attention does not stop",
            ),
        ],
        ids=["mamba", "qwen3_next", "opt"],
    )
    def test_refused_by_name(self, config, reason):
        with pytest.raises(ValueError, match=reason):
            check_packable(AutoModel.from_config(config))

    def test_accepted(self):
        model = AutoModel.from_config(LlamaConfig(**self.SIZES)).train()
        check_packable(model)
        assert model.training

    def test_the_trainer_refuses(self, tiny_processor, tiny_config, tiny_model, tmp_path):
        model = tiny_model(text_config=MambaConfig(**{**self.SIZES, "vocab_size": 263}))
        with pytest.raises(ValueError, match="type mamba cannot"):
            build_trainer(model, tiny_processor, arguments(tmp_path, packing=True))
