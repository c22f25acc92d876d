import copy
import json
import math
import resource
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset, List
from datasets import Image as ImageFeature
from helpers import (
    EXAMPLES,
    arguments,
    build_trainer,
    dataset_of,
    examples_with_nan,
    losses,
    train,
)
from PIL import Image
from safetensors import SafetensorError
from transformers import TrainerCallback

from metamorph_hf import (
    modeling_metamorph,
)
from metamorph_hf.data.formats import BadSample
from metamorph_hf.data.mixture import load_mixture
from metamorph_hf.data.precompute import precompute_visual_tokens
from metamorph_hf.vpit.collator import DataCollatorForVPiT
from metamorph_hf.vpit.trainer import last_complete_checkpoint


EMOJI = Path(__file__).parents[1] / "examples" / "emoji" / "checkpoint"


@pytest.fixture
def model(tiny_model):
    return tiny_model()


class TestTrainer:
    def test_accumulation_changes_nothing(self, tiny_processor, model, tmp_path):
        """8x1, 2x4 and 1x8: batches without text, or without any image, among them."""
        trained = []
        for batch_size in (8, 2, 1):
            copied = copy.deepcopy(model)
            args = arguments(
                tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=8 // batch_size
            )
            trainer = train(copied, tiny_processor, args)
            logs = next(log for log in trainer.state.log_history if "text_loss" in log)
            trained.append((copied.state_dict(), logs))
        (whole, whole_logs), *others = trained
        batch = DataCollatorForVPiT(tiny_processor)(EXAMPLES)
        expected = model.train()(**batch)
        assert whole_logs["text_loss"] == pytest.approx(expected.text_loss.item(), rel=1e-4)
        assert whole_logs["visual_loss"] == pytest.approx(expected.visual_loss.item(), rel=1e-4)
        for state, logs in others:
            assert logs["text_loss"] == pytest.approx(whole_logs["text_loss"], rel=1e-4)
            assert logs["visual_loss"] == pytest.approx(whole_logs["visual_loss"], rel=1e-4)
            for name, weight in whole.items():
                torch.testing.assert_close(
                    state[name], weight, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
                )

    def test_visual_loss_does_not_vanish(self, tiny_processor, model, tmp_path):
        """TRL's fused head bypasses the model's own forward, and with it the visual loss."""
        before = copy.deepcopy(model.vision_head.state_dict())
        drawing = [EXAMPLES[0], EXAMPLES[7]]
        trainer = train(model, tiny_processor, arguments(tmp_path), drawing)
        assert any(log.get("visual_loss", 0.0) != 0.0 for log in trainer.state.log_history)
        assert all(not torch.equal(w, before[name]) for name, w in model.vision_head.state_dict().items())

    def test_text_only_batches(self, tiny_processor, model, tmp_path):
        trainer = train(model, tiny_processor, arguments(tmp_path), [EXAMPLES[2], EXAMPLES[4]])
        logs = trainer.state.log_history[0]
        assert torch.isfinite(torch.tensor(logs["loss"]))
        assert "visual_loss" not in logs

    def test_unknown_stage(self, tmp_path):
        with pytest.raises(ValueError, match="stage is 'both'"):
            arguments(tmp_path, stage="both")

    def test_evaluation_logs_both_losses(self, tiny_processor, model, tmp_path):
        trainer = train(model, tiny_processor, arguments(tmp_path))
        metrics = trainer.evaluate(trainer.train_dataset)
        batches = [DataCollatorForVPiT(tiny_processor)(EXAMPLES)]
        expected = model.eval()(**batches[0])
        logged = trainer.state.log_history[-1]
        assert metrics["eval_loss"] > 0
        assert logged["eval_text_loss"] == pytest.approx(expected.text_loss.item(), rel=1e-4)
        assert logged["eval_visual_loss"] == pytest.approx(expected.visual_loss.item(), rel=1e-4)

    def test_evaluation_is_a_mean_over_labels(self, tiny_processor, model, tmp_path):
        """Batches of 3, 3 and 2 rows with different counts; Trainer's own eval_loss would be a mean over batches."""
        trainer = build_trainer(model, tiny_processor, arguments(tmp_path, per_device_eval_batch_size=3))
        metrics = trainer.evaluate(trainer.train_dataset)
        expected = model.eval()(**DataCollatorForVPiT(tiny_processor)(EXAMPLES))
        assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
        assert metrics["eval_visual_cosine"] == pytest.approx(-expected.visual_loss.item(), rel=1e-5)
        assert metrics["eval_num_images"] == 10

    def test_counts_and_rates_are_logged(self, tiny_processor, model, tmp_path):
        logs = train(model, tiny_processor, arguments(tmp_path, per_device_train_batch_size=8)).state.log_history[0]
        batch = DataCollatorForVPiT(tiny_processor)(EXAMPLES)
        visual = (batch["labels"] == tiny_processor.image_token_id).sum().item()
        assert (logs["num_images"], logs["num_visual_labels"]) == (10, visual)
        assert logs["num_text_labels"] == (batch["labels"] != -100).sum().item() - visual
        assert logs["images_per_second"] > 0
        assert logs["visual_cosine"] == pytest.approx(-logs["visual_loss"], rel=1e-5)

    @pytest.mark.parametrize("loss_type", ["cosine", "l1", "mse"])
    @pytest.mark.parametrize("weight", [None, 0.25])
    def test_loss_is_the_weighted_sum(self, tiny_processor, tiny_model, tmp_path, loss_type, weight):
        model = tiny_model(visual_loss_type=loss_type, visual_loss_weight=3.0)
        logs = train(model, tiny_processor, arguments(tmp_path, visual_loss_weight=weight)).state.log_history[0]
        expected = logs["text_loss"] + (3.0 if weight is None else weight) * logs["visual_loss"]
        assert logs["loss"] == pytest.approx(expected, rel=1e-5)

    def test_text_loss_in_chunks(self, tiny_processor, tiny_model, monkeypatch):
        batch = DataCollatorForVPiT(tiny_processor)(EXAMPLES)
        gradients = []
        for limit in (modeling_metamorph.MAX_LOGITS, 7 * 263):
            monkeypatch.setattr(modeling_metamorph, "MAX_LOGITS", limit)
            model = tiny_model().train()
            model(**batch).loss.backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)

    def test_no_logits_where_nobody_needs_them(self, tiny_processor, model, tmp_path):
        """lm_head runs at text labels and the vision head at visual ones, in training and in evaluation."""
        rows = {"lm_head": 0, "vision_head": 0}

        def count(name):
            return lambda module, args: rows.update({name: rows[name] + args[0].shape[0]})

        trainer = build_trainer(model, tiny_processor, arguments(tmp_path, per_device_train_batch_size=8))
        model.lm_head.register_forward_pre_hook(count("lm_head"))
        model.vision_head.register_forward_pre_hook(count("vision_head"))
        trainer.train()
        logs = trainer.state.log_history[0]
        expected = {"lm_head": logs["num_text_labels"], "vision_head": logs["num_visual_labels"]}
        assert rows == expected
        trainer.evaluate(trainer.train_dataset)
        assert rows == {name: 2 * count for name, count in expected.items()}

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing_changes_nothing(self, tiny_processor, tiny_model, tmp_path, use_reentrant):
        states = []
        for kwargs in (
            {},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}},
        ):
            model = tiny_model()
            train(model, tiny_processor, arguments(tmp_path, per_device_train_batch_size=8, **kwargs))
            states.append(model.state_dict())
        for name, weight in states[0].items():
            torch.testing.assert_close(states[1][name], weight, rtol=1e-5, atol=1e-7)

    def test_lengths_group_samples(self, tiny_processor, model, tmp_path):
        collate = DataCollatorForVPiT(tiny_processor)
        lengths = [collate([example])["input_ids"].shape[1] for example in EXAMPLES]
        args = arguments(tmp_path, train_sampling_strategy="group_by_length", per_device_train_batch_size=8)
        trainer = build_trainer(model, tiny_processor, args)
        trainer.train_dataset = Dataset.from_dict({"length": lengths})
        order = [lengths[place] for place in trainer._get_train_sampler()]
        assert order == sorted(lengths, reverse=True)

    def test_precomputed_visual_tokens(self, tiny_processor, tiny_model, tmp_path):
        """The tower is left out, and nothing else changes."""
        columns = {key: [example[key] for example in EXAMPLES] for key in ("messages", "images")}
        columns["messages"] = [json.dumps(messages) for messages in columns["messages"]]
        dataset = Dataset.from_dict(columns).cast_column("images", List(ImageFeature()))
        states = []
        for precomputed in (False, True):
            model = tiny_model()
            used = precompute_visual_tokens(dataset, model, tiny_processor, batch_size=3) if precomputed else dataset
            rows = [{**row, "messages": json.loads(row["messages"])} for row in used]
            if precomputed:
                assert [row["visual_tokens"].shape for row in rows[:4]] == [
                    (1, 4, 16),
                    (1, 4, 16),
                    (0, 4, 16),
                    (3, 4, 16),
                ]
                model.model.vision_tower.forward = None  # calling it would fail
            train(model, tiny_processor, arguments(tmp_path), rows)
            states.append(model.state_dict())
        for name, weight in states[0].items():
            torch.testing.assert_close(states[1][name], weight, rtol=1e-5, atol=1e-7)

    def test_precomputed_visual_tokens_of_a_mixture(self, tiny_processor, tiny_model, tmp_path):
        """The same batches, in the mixture's order; what cannot be read is the collator's to refuse or skip."""
        for number in range(5):
            Image.new("RGB", (20, 16), (40 * number,) * 3).save(tmp_path / f"{number}.png")
        (tmp_path / "3.png").write_bytes(b"broken")
        captions = [{"caption": f"grey {n}", "image": str(tmp_path / f"{n}.png")} for n in range(5)]
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

    def test_a_stream_has_no_precomputed_visual_tokens(self, tiny_processor, tiny_model):
        stream = Dataset.from_dict({"images": [[]]}).to_iterable_dataset()
        with pytest.raises(ValueError, match="load it without streaming"):
            precompute_visual_tokens(stream, tiny_model(), tiny_processor)

    @pytest.mark.parametrize(
        ("option", "reason"),
        [
            ({"packing": True}, "packing=True is not supported by VPiT: TRL cannot pack"),
            ({"padding_free": True}, "padding_free=True is not supported"),
            ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not supported"),
            ({"loss_type": "dft"}, "loss_type='dft' is not supported"),
            ({"average_tokens_across_devices": False}, "average_tokens_across_devices=False is not supported"),
            ({"on_nonfinite_loss": "ignore"}, "expected 'raise' or 'skip'"),
            ({"stage": "projector", "vision_head_learning_rate": 1e-3}, "stage 'projector' freezes"),
        ],
    )
    def test_refused_options(self, tmp_path, option, reason):
        with pytest.raises(ValueError, match=reason):
            arguments(tmp_path, **option)


class _StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class TestFaults:
    def arguments(self, tmp_path, **kwargs):
        defaults = {
            "max_steps": 6,
            "optim": "adamw_torch",
            "train_sampling_strategy": "random",
            "save_strategy": "steps",
            "save_steps": 2,
            "lr_scheduler_type": "cosine",
        }
        return arguments(tmp_path, **{**defaults, **kwargs})

    @pytest.mark.parametrize("stage", ["projector", "full"])
    def test_resumed_is_uninterrupted(self, tiny_processor, tiny_model, tmp_path, stage):
        """Same data order and same noise: the loss curve goes on as if nothing had happened."""
        options = {"stage": stage, "gradient_accumulation_steps": 2}
        noise = {"visual_token_noise": 1.0}
        whole = train(tiny_model(**noise), tiny_processor, self.arguments(tmp_path / "whole", **options))
        args = self.arguments(tmp_path / "cut", **options)
        cut = train(tiny_model(**noise), tiny_processor, args, callbacks=[_StopAt(5)])
        # The save of step 4 was interrupted: all but what Trainer writes last.
        (tmp_path / "cut" / "checkpoint-4" / "trainer_state.json").write_text('{"epoch": 1')
        assert last_complete_checkpoint(tmp_path / "cut") == str(tmp_path / "cut" / "checkpoint-2")
        resumed = build_trainer(tiny_model(**noise), tiny_processor, args)
        resumed.train(resume_from_checkpoint=True)
        assert losses(cut) == losses(whole)[:5]
        assert losses(resumed) == losses(whole)
        for name, weight in resumed.model.state_dict().items():
            assert torch.equal(weight, whole.model.state_dict()[name]), name

    def test_nothing_to_resume_from(self, tiny_processor, model, tmp_path):
        trainer = build_trainer(model, tiny_processor, self.arguments(tmp_path))
        with pytest.raises(ValueError, match="no complete checkpoint"):
            trainer.train(resume_from_checkpoint=True)

    def test_full_disk_keeps_the_last_checkpoint(self, tiny_processor, model, tmp_path):
        """Files may grow to less than the optimizer's: the operating system refuses the rest, as a full disk would."""

        class Fill(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 4:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))

        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        trainer = build_trainer(
            model, tiny_processor, self.arguments(tmp_path, save_total_limit=1), callbacks=[Fill()]
        )
        try:
            with pytest.raises((OSError, RuntimeError, SafetensorError), match="[Ff]ile too large|write failed"):
                trainer.train()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        assert (tmp_path / "checkpoint-4").exists()
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
        resumed = build_trainer(model, tiny_processor, self.arguments(tmp_path, save_total_limit=1))
        resumed.train(resume_from_checkpoint=True)
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")

    def test_bad_samples_are_skipped_and_listed(self, tiny_processor, tiny_model, tmp_path, capsys):
        """The run is the one of the others: counted, listed and told apart by task."""
        options = {"max_steps": 2, "per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}
        bad = {**EXAMPLES[1], "images": ["/no/such.png"]}
        examples = [*EXAMPLES[:2], bad, EXAMPLES[2], *EXAMPLES[3:7]]
        tagged = [{**example, "id": str(n), "task": "edit"} for n, example in enumerate(examples)]
        args = self.arguments(tmp_path / "bad", on_bad_sample="skip", max_bad_share=0.5, **options)
        trainer = train(tiny_model(), tiny_processor, args, tagged)
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert [log["skipped_samples"] for log in logs] == [1, 1]
        (line,) = (tmp_path / "bad" / "rejected_samples-0.jsonl").read_text().splitlines()
        rejected = json.loads(line)
        assert (rejected["sample"], rejected["task"]) == ("Example 2", "edit") and "/no/such.png" in rejected["reason"]
        assert ["edit", "1", "0"] in [row.split() for row in capsys.readouterr().out.splitlines()]
        batches = [[examples[n] for n in (0, 1, 3)], examples[4:]]
        twin = tiny_model().train()
        expected = [twin(**DataCollatorForVPiT(tiny_processor)(batch)).loss.item() for batch in batches[:1]]
        assert logs[0]["loss"] == pytest.approx(expected[0], rel=1e-5)

    def test_too_many_bad_samples_stop_the_run(self, tiny_processor, model, tmp_path):
        bad = {**EXAMPLES[1], "images": ["/no/such.png"]}
        args = self.arguments(tmp_path, on_bad_sample="skip", per_device_train_batch_size=4)
        with pytest.raises(ValueError, match="1 of 4 samples were skipped, a larger share than max_bad_share=0.01"):
            train(model, tiny_processor, args, [bad, *EXAMPLES[:3]])

    def test_one_bad_sample_early_on_is_no_large_share(self, tiny_processor, model, tmp_path):
        bad = {**EXAMPLES[1], "images": ["/no/such.png"]}
        args = self.arguments(tmp_path, on_bad_sample="skip", max_bad_share=0.15, max_steps=2, logging_steps=1)
        trainer = train(model, tiny_processor, args, [bad, *EXAMPLES[:7]])  # 1 of 2 in the first step, 1 of 8 in all
        assert trainer.totals["skipped_samples"] == 1
        for _ in range(2):
            assert trainer.evaluate(dataset_of([bad, EXAMPLES[0]]))["eval_skipped_samples"] == 1
        assert trainer.totals["skipped_samples"] == 1  # the share is training's

    def test_bad_samples_are_counted_after_the_last_log(self, tiny_processor, model, tmp_path):
        bad = {**EXAMPLES[1], "images": ["/no/such.png"]}
        args = self.arguments(tmp_path, on_bad_sample="skip", max_steps=2, logging_steps=10)
        with pytest.raises(ValueError, match="4 of 4 samples were skipped"):
            train(model, tiny_processor, args, [bad] * 4)

    def test_evaluation_after_prediction(self, tiny_processor, model, tmp_path):
        trainer = build_trainer(model, tiny_processor, arguments(tmp_path))
        few, more = dataset_of(EXAMPLES[:2]), dataset_of(EXAMPLES[:4])
        first = trainer.evaluate(few)
        trainer.predict(more)
        again = trainer.evaluate(few)
        for name in ("eval_loss", "eval_num_text_labels", "eval_num_images"):
            assert again[name] == first[name]

    def test_nan_in_evaluation(self, tiny_processor, model, tmp_path, caplog):
        """The means are those of the other batches."""
        examples, options = examples_with_nan(), {"on_nonfinite_loss": "skip", "per_device_eval_batch_size": 1}
        trainer = build_trainer(model, tiny_processor, self.arguments(tmp_path, **options), examples)
        found = trainer.evaluate(dataset_of(examples))
        expected = trainer.evaluate(dataset_of([*examples[:5], *examples[6:]]))
        for name in ("eval_loss", "eval_num_text_labels", "eval_visual_cosine"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5)
        assert "sample-5. This batch is left out of the evaluation" in caplog.text

    def test_nan_is_named(self, tiny_processor, model, tmp_path):
        with pytest.raises(ValueError, match=r"Step 3, process 0: text_loss is nan") as error:
            train(
                model,
                tiny_processor,
                self.arguments(tmp_path, train_sampling_strategy="sequential"),
                examples_with_nan(),
            )
        assert "sample-4" in str(error.value) and "sample-5" in str(error.value)

    def test_nan_is_skipped_and_counted(self, tiny_processor, tiny_model, tmp_path, caplog):
        """The run is the one that never saw the step, and its logs are finite."""
        options = {
            "train_sampling_strategy": "sequential",
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_steps": 4,
        }
        model = tiny_model()
        trainer = train(
            model, tiny_processor, self.arguments(tmp_path, on_nonfinite_loss="skip", **options), examples_with_nan()
        )
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert all(math.isfinite(log["loss"]) for log in logs)
        assert [log.get("skipped_steps", 0) for log in logs] == [0, 0, 1, 1]
        assert "sample-5" in caplog.text
        twin = tiny_model()
        examples = examples_with_nan()
        train(
            twin, tiny_processor, self.arguments(tmp_path, **{**options, "max_steps": 3}), examples[:4] + examples[6:]
        )
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, twin.state_dict()[name]), name
