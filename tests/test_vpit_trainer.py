import copy
import dataclasses
import io
import json
import math
import resource
import shutil
import signal
import time

import pytest
import torch
from datasets import Dataset, IterableDataset, List
from datasets import Image as ImageFeature
from helpers import (
    EXAMPLES,
    arguments,
    build_trainer,
    dataset_of,
    examples_with_nan,
    losses,
    picture,
    train,
)
from safetensors import SafetensorError
from transformers import MixtralForCausalLM, TrainerCallback, TrainingArguments
from trl import SFTConfig

from metamorph_hf import MetaMorphForConditionalGeneration, VPiTTrainer, modeling_metamorph
from metamorph_hf.data import BadSample
from metamorph_hf.modeling_metamorph import MetaMorphCausalLMOutputWithPast
from metamorph_hf.vpit.collator import DataCollatorForVPiT
from metamorph_hf.vpit.metrics import sum_by_sample
from metamorph_hf.vpit.trainer import _WatchSteps, last_complete_checkpoint


@pytest.fixture
def model(tiny_model):
    return tiny_model()


class TestTrainer:
    def test_accumulation_changes_nothing(self, tiny_processor, model, tmp_path):
        """Batches of 8, 2 and 1, some of them without text labels or without images, give the same update."""
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
        """TRL's fused head would bypass the model's own forward and with it the visual loss."""
        before = copy.deepcopy(model.vision_head.state_dict())
        examples = [EXAMPLES[0], EXAMPLES[7]]
        trainer = train(model, tiny_processor, arguments(tmp_path), examples)
        assert any(log.get("visual_loss", 0.0) != 0.0 for log in trainer.state.log_history)
        assert all(not torch.equal(w, before[name]) for name, w in model.vision_head.state_dict().items())

    def test_batches_without_images(self, tiny_processor, model, tmp_path):
        trainer = train(model, tiny_processor, arguments(tmp_path), [EXAMPLES[2], EXAMPLES[4]])
        logs = trainer.state.log_history[0]
        assert torch.isfinite(torch.tensor(logs["loss"]))
        assert "visual_loss" not in logs

    def test_evaluation_is_a_mean_over_labels(self, tiny_processor, model, tmp_path):
        """Batches of 3, 3 and 2 rows differ in their counts; Trainer's own eval_loss would be a mean over batches."""
        trainer = build_trainer(model, tiny_processor, arguments(tmp_path, per_device_eval_batch_size=3))
        metrics = trainer.evaluate(trainer.train_dataset)
        expected = model.eval()(**DataCollatorForVPiT(tiny_processor)(EXAMPLES))
        assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
        assert metrics["eval_text_loss"] == pytest.approx(expected.text_loss.item(), rel=1e-5)
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

    def test_rate_leaves_out_evaluation_and_callbacks(self, tiny_processor, model, tmp_path):
        class Wait(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                time.sleep(1)

            on_evaluate = on_step_end

        args = arguments(tmp_path, per_device_train_batch_size=8, max_steps=3, eval_strategy="steps", eval_steps=1)
        trainer = build_trainer(model, tiny_processor, args, eval_dataset=dataset_of(EXAMPLES[:1]))
        trainer.add_callback(Wait())
        trainer.train()
        rates = [log["images_per_second"] for log in trainer.state.log_history if "loss" in log]
        assert max(rates) > 10  # of 10 images in two seconds of waiting and the time of a step

    def test_metrics_of_trl(self, tiny_processor, model, tmp_path):
        """Under TRL's names, over text labels: training sees what the batch's logits say, evaluation the same."""
        batch = DataCollatorForVPiT(tiny_processor)(EXAMPLES)
        labels = batch["labels"][:, 1:]
        is_text = (labels != -100) & (labels != tiny_processor.image_token_id)
        logits = model.eval()(**batch).logits[:, :-1][is_text].float()
        logits[:, tiny_processor.image_token_id] = -torch.inf  # is never predicted as text
        accuracy = (logits.argmax(-1) == labels[is_text]).float().mean().item()
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2}
        trainer = build_trainer(model, tiny_processor, arguments(tmp_path, per_device_eval_batch_size=3, **options))
        evaluated = trainer.evaluate({"emoji": trainer.train_dataset})
        trainer.train()
        first, second = [log for log in trainer.state.log_history if "loss" in log]
        assert first["mean_token_accuracy"] == pytest.approx(accuracy)
        assert evaluated["eval_emoji_mean_token_accuracy"] == pytest.approx(accuracy)
        assert first["entropy"] == pytest.approx(entropy, rel=1e-4)
        assert evaluated["eval_emoji_entropy"] == pytest.approx(entropy, rel=1e-4)
        tokens = batch["attention_mask"].sum().item()
        assert [log["num_tokens"] for log in (first, second)] == [tokens, 2 * tokens]
        assert trainer.evaluate(trainer.train_dataset)["eval_num_tokens"] == 2 * tokens

    def test_losses_of_tasks(self, tiny_processor, model, tmp_path):
        """Over accumulated batches that mix them, the losses of a task and source are those of its samples alone."""
        places = [("chat", "a"), ("chat", "b"), ("draw", "a"), ("chat", "a"), ("draw", "a"), *[("draw", "b")] * 3]
        examples = [{**example, "task": t, "source": s} for example, (t, s) in zip(EXAMPLES, places)]
        expected, collator = {}, DataCollatorForVPiT(tiny_processor)
        for task, source in set(places):
            outputs = model(**collator([e for e, place in zip(EXAMPLES, places) if place == (task, source)]))
            for name in ("text", "visual"):
                if outputs[f"num_{name}_labels"]:
                    expected[f"{name}_loss/{task}/{source}"] = outputs[f"{name}_loss"].item()
        assert len(expected) == 6  # two of the four have no visual label
        args = arguments(tmp_path, gradient_accumulation_steps=4, per_device_eval_batch_size=3)
        trainer = build_trainer(model, tiny_processor, args, examples)
        evaluated = trainer.evaluate(trainer.train_dataset)
        trainer.train()
        logs = next(log for log in trainer.state.log_history if "loss" in log)
        assert {name: value for name, value in logs.items() if "/" in name} == pytest.approx(expected, rel=1e-4)
        assert all(evaluated[f"eval_{name}"] == pytest.approx(value, rel=1e-4) for name, value in expected.items())

    def test_one_task_is_not_logged_twice(self, tiny_processor, model, tmp_path):
        examples = [{**example, "task": "chat", "source": "a"} for example in EXAMPLES]
        logs = train(model, tiny_processor, arguments(tmp_path), examples).state.log_history[0]
        assert not any("/" in name for name in logs)

    def test_tasks_of_packed_conversations(self, tiny_processor):
        alone = [DataCollatorForVPiT(tiny_processor)([example]) for example in EXAMPLES[2:5:2]]
        rows = [[alone[0], alone[1]], [alone[1]]]
        length = sum(batch["labels"].shape[1] for batch in alone)
        labels, positions = torch.full((2, length), -100), torch.zeros(2, length, dtype=torch.long)
        for row, batches in enumerate(rows):
            start = 0
            for batch in batches:
                end = start + batch["labels"].shape[1]
                labels[row, start:end], positions[row, start:end] = batch["labels"][0], torch.arange(end - start)
                start = end
        losses = torch.arange(1.0, (labels[:, 1:] != -100).sum() + 1)
        outputs = MetaMorphCausalLMOutputWithPast(text_losses=losses, visual_losses=losses[:0])
        inputs, image_token_id = {"labels": labels, "position_ids": positions}, tiny_processor.image_token_id
        found = sum_by_sample(inputs, outputs, 3, image_token_id)
        counts = [(batch["labels"][:, 1:] != -100).sum().item() for batch in (alone[0], alone[1], alone[1])]
        expected = [part.sum().item() for part in losses.split(counts)]
        assert found.tolist() == [expected, counts, [0.0] * 3, [0.0] * 3]

    def test_load_balancing_loss(self, tiny_processor, tiny_model, mixtral_config, tmp_path):
        """Mixtures of experts have transformers' loss, a mean over batches, with the coefficient of their own."""
        model, batches = tiny_model(text_config=mixtral_config), [EXAMPLES[2:5:2], [EXAMPLES[4]] * 2]
        reference, collator = MixtralForCausalLM(mixtral_config).eval(), DataCollatorForVPiT(tiny_processor)
        reference.model.load_state_dict(model.model.language_model.state_dict())
        expected = []
        for examples in batches:
            batch = collator(examples)
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            expected.append(reference(**inputs, output_router_logits=True).aux_loss.item())
            found = model(**batch, output_router_logits=True)
            assert found.aux_loss.item() == pytest.approx(expected[-1], rel=1e-5)
            difference = found.loss - model(**batch).loss
            assert difference.item() == pytest.approx(mixtral_config.router_aux_loss_coef * expected[-1], abs=1e-5)
        for coefficient, used in ((None, mixtral_config.router_aux_loss_coef), (10.0, 10.0)):
            options = {"gradient_accumulation_steps": 2, "per_device_eval_batch_size": 2}
            args = arguments(tmp_path, router_aux_loss_coef=coefficient, **options)
            trainer = build_trainer(tiny_model(text_config=mixtral_config), tiny_processor, args, sum(batches, []))
            evaluated = trainer.evaluate(trainer.train_dataset)
            trainer.train()
            trained = next(log for log in trainer.state.log_history if "loss" in log)
            for logs, prefix in ((trained, ""), (evaluated, "eval_")):
                assert logs[f"{prefix}aux_loss"] == pytest.approx(sum(expected) / 2, rel=1e-5)
                total = logs[f"{prefix}text_loss"] + used * sum(expected) / 2
                assert logs[f"{prefix}loss"] == pytest.approx(total, rel=1e-5)

    def test_load_balancing_loss_can_be_left_out(self, tiny_processor, tiny_model, mixtral_config, tmp_path):
        args = arguments(tmp_path, router_aux_loss_coef=0.0)
        logs = train(tiny_model(text_config=mixtral_config), tiny_processor, args).state.log_history[0]
        assert "aux_loss" not in logs

    def test_best_model_by_token_accuracy(self, tiny_processor, model, tmp_path):
        options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "max_steps": 2}
        args = arguments(tmp_path, metric_for_best_model="mean_token_accuracy", **options)
        trainer = train(model, tiny_processor, args, eval_dataset=dataset_of(EXAMPLES))
        logged = [log["eval_mean_token_accuracy"] for log in trainer.state.log_history if "eval_loss" in log]
        assert trainer.state.best_metric == max(logged)

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

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing_changes_nothing(self, tiny_processor, tiny_model, tmp_path, use_reentrant):
        states = []
        for kwargs in (
            {},
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": use_reentrant}},
        ):
            model = tiny_model()
            train(model, tiny_processor, arguments(tmp_path, per_device_train_batch_size=8, **kwargs))
            states.append(model.state_dict())
        for name, weight in states[0].items():
            torch.testing.assert_close(states[1][name], weight, rtol=1e-5, atol=1e-7)

    def test_model_card(self, tiny_processor, model, tmp_path):
        """It is the package's card, with the facts of training, in every checkpoint's run folder."""
        args = arguments(tmp_path / "run", save_strategy="steps", save_steps=1, hub_model_id="user/model")
        trainer = train(model, tiny_processor, args)
        card = (tmp_path / "run" / "README.md").read_text()
        assert 'AutoModel.from_pretrained("user/model")' in card and "library_name: transformers" in card
        assert "| steps | 1 |" in card and "| stage | full |" in card and "| data | not recorded |" in card
        trainer.create_model_card(dataset_name="my-data", tags="mine")
        card = (tmp_path / "run" / "README.md").read_text()
        assert "| data | my-data |" in card and "- vpit\n" in card and "- mine\n" in card

    @pytest.mark.parametrize("max_length", [None, 1000, 12])
    def test_context_limits_the_length(self, tiny_processor, tiny_config, tmp_path, max_length):
        """A sample longer than the language model's context is treated like one longer than `max_length`."""
        config = tiny_config()
        config.text_config.max_position_embeddings = 20
        model = MetaMorphForConditionalGeneration(config)
        args = arguments(tmp_path, max_length=max_length, on_bad_sample="skip", max_bad_share=1.0)
        trainer = build_trainer(model, tiny_processor, args)
        lengths = [DataCollatorForVPiT(tiny_processor)([example])["input_ids"].shape[1] for example in EXAMPLES]
        limit = min(max_length or 20, 20)
        assert min(lengths) <= 20 < max(lengths)
        rejected = trainer.data_collator(EXAMPLES).get("rejected", [])
        assert [r["sample"] for r in rejected] == [
            f"Example {index} of the batch" for index, length in enumerate(lengths) if length > limit
        ]

    def test_lengths_group_samples(self, tiny_processor, model, tmp_path):
        collate = DataCollatorForVPiT(tiny_processor)
        lengths = [collate([example])["input_ids"].shape[1] for example in EXAMPLES]
        args = arguments(tmp_path, train_sampling_strategy="group_by_length", per_device_train_batch_size=8)
        dataset = Dataset.from_dict({"length": lengths, "messages": [EXAMPLES[2]["messages"]] * len(lengths)})
        trainer = VPiTTrainer(model, args, processing_class=tiny_processor, train_dataset=dataset)
        order = [lengths[index] for index in trainer._get_train_sampler()]
        assert order == sorted(lengths, reverse=True)


class TestRefused:
    def test_other_losses(self, tiny_processor, model, tmp_path):
        with pytest.raises(ValueError, match="compute_loss_func cannot replace"):
            build_trainer(model, tiny_processor, arguments(tmp_path), compute_loss_func=lambda *args, **kwargs: None)

    @pytest.mark.parametrize("other", [SFTConfig, TrainingArguments])
    def test_other_configurations(self, tiny_processor, model, tmp_path, other):
        args = other(str(tmp_path), report_to="none", use_cpu=True)
        with pytest.raises(TypeError, match=f"args is a {other.__name__}, expected a VPiTConfig"):
            build_trainer(model, tiny_processor, args)

    def test_formatting_functions(self, tiny_processor, model, tmp_path):
        with pytest.raises(ValueError, match="formatting_func has no effect"):
            build_trainer(model, tiny_processor, arguments(tmp_path), formatting_func=str)

    def test_tokenizer_larger_than_the_vocabulary(self, tiny_processor, tiny_config, tmp_path):
        config = tiny_config()
        config.text_config.vocab_size -= 1
        with pytest.raises(ValueError, match="resize_token_embeddings"):
            build_trainer(MetaMorphForConditionalGeneration(config), tiny_processor, arguments(tmp_path))

    def test_processor_of_another_model(self, tiny_processor, tiny_model, tmp_path):
        with pytest.raises(ValueError, match="model's num_image_tokens is 9, but the processor's is 4"):
            build_trainer(tiny_model(num_image_tokens=9), tiny_processor, arguments(tmp_path))

    def test_no_samples(self, tiny_processor, model, tmp_path):
        for empty in (Dataset.from_list([]), IterableDataset.from_generator(lambda: iter(()))):
            with pytest.raises(ValueError, match="train_dataset has no samples"):
                VPiTTrainer(model, arguments(tmp_path), processing_class=tiny_processor, train_dataset=empty)

    def test_a_tokenizer_alone(self, tiny_processor, model, tmp_path):
        with pytest.raises(TypeError, match="processing_class is a .*, expected a MetaMorphProcessor"):
            build_trainer(model, tiny_processor.tokenizer, arguments(tmp_path))

    def test_trained_tower_with_visual_tokens(self, tiny_processor, model, tmp_path):
        args = arguments(tmp_path, vision_tower_learning_rate=1e-3)
        with pytest.raises(ValueError, match="the tower does not run on `visual_tokens`"):
            build_trainer(model, tiny_processor, args, examples_with_nan())


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

    @pytest.mark.parametrize(
        ("stage", "decoding"), [("projector", "autoregressive"), ("full", "autoregressive"), ("full", "parallel")]
    )
    def test_resumed_is_uninterrupted(self, tiny_processor, tiny_model, tmp_path, stage, decoding):
        """Data order and noise are the same, so the loss curve continues as if nothing had happened."""
        options = {"stage": stage, "gradient_accumulation_steps": 2}
        config = {"visual_token_noise": 1.0, "visual_decoding": decoding}
        whole = train(tiny_model(**config), tiny_processor, self.arguments(tmp_path / "whole", **options))
        args = self.arguments(tmp_path / "cut", **options)
        cut = train(tiny_model(**config), tiny_processor, args, callbacks=[_StopAt(5)])
        # The save of step 4 was interrupted in the file that Trainer writes last.
        (tmp_path / "cut" / "checkpoint-4" / "trainer_state.json").write_text('{"epoch": 1')
        assert last_complete_checkpoint(tmp_path / "cut") == str(tmp_path / "cut" / "checkpoint-2")
        resumed = build_trainer(tiny_model(**config), tiny_processor, args)
        resumed.train(resume_from_checkpoint=True)
        assert losses(cut) == losses(whole)[:5]
        assert losses(resumed) == losses(whole)
        for name, weight in resumed.model.state_dict().items():
            assert torch.equal(weight, whole.model.state_dict()[name]), name

    @pytest.mark.parametrize(
        "damaged", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
    )
    @pytest.mark.parametrize("damage", ["missing", "truncated"])
    def test_damaged_checkpoints_are_passed_over(self, tiny_processor, model, tmp_path, caplog, damaged, damage):
        train(model, tiny_processor, self.arguments(tmp_path, max_steps=4))
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
        path = tmp_path / "checkpoint-4" / damaged
        content = path.read_bytes()
        path.unlink()
        if damage == "truncated":
            path.write_bytes(content[: len(content) // 2])
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
        assert "checkpoint-4 was not saved completely and is passed over" in caplog.text
        assert damage in caplog.text

    @pytest.mark.parametrize("rubbish", [b"[]", b'{"steps": 4}', b"\xff\xfe"])
    def test_rubbish_is_passed_over(self, tiny_processor, model, tmp_path, caplog, rubbish):
        train(model, tiny_processor, self.arguments(tmp_path, max_steps=4))
        (tmp_path / "checkpoint-4" / "trainer_state.json").write_bytes(rubbish)
        (tmp_path / "checkpoint-9").write_text("a file")
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-8.bak")
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
        assert "trainer_state.json is" in caplog.text
        trainer = build_trainer(model, tiny_processor, self.arguments(tmp_path))
        with pytest.raises(ValueError, match="checkpoint-4 is not a complete checkpoint: trainer_state.json"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))

    def test_finished_run_is_not_trained_on(self, tiny_processor, tiny_model, tmp_path, capsys):
        finished = train(tiny_model(), tiny_processor, self.arguments(tmp_path))
        again = build_trainer(tiny_model(), tiny_processor, self.arguments(tmp_path))
        result = again.train(resume_from_checkpoint=True)
        assert "checkpoint-6 has all 6 steps: this run is already finished" in capsys.readouterr().out
        assert result.global_step == again.state.global_step == 6
        for name, weight in again.model.state_dict().items():
            assert torch.equal(weight, finished.model.state_dict()[name]), name
        longer = build_trainer(tiny_model(), tiny_processor, self.arguments(tmp_path, max_steps=8))
        assert longer.train(resume_from_checkpoint=True).global_step == 8
        assert "Resuming from" in capsys.readouterr().out

    def test_skipped_samples_go_on_after_a_resume(self, tiny_processor, tiny_model, tmp_path):
        """Those since the last log, too; a torn line in their list does not matter."""
        bad = {**EXAMPLES[1], "images": ["/no/such.png"]}
        examples = [bad, *EXAMPLES[2:5]]
        options = {"on_bad_sample": "skip", "train_sampling_strategy": "sequential", "logging_steps": 4}
        args = self.arguments(tmp_path, max_bad_share=0.9, max_steps=4, **options)
        train(tiny_model(), tiny_processor, args, examples, callbacks=[_StopAt(2)])
        with (tmp_path / "rejected_samples-0.jsonl").open("a") as file:
            file.write('{"sample": "torn')
        resumed = build_trainer(tiny_model(), tiny_processor, args, examples)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert (resumed.totals["samples"], resumed.totals["skipped_samples"]) == (6, 2)
        strict = build_trainer(tiny_model(), tiny_processor, dataclasses.replace(args, max_bad_share=0.24), examples)
        with pytest.raises(ValueError, match="2 of 8 samples were skipped"):
            strict.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    def test_nothing_to_resume_from(self, tiny_processor, model, tmp_path):
        trainer = build_trainer(model, tiny_processor, self.arguments(tmp_path))
        with pytest.raises(ValueError, match="no complete checkpoint"):
            trainer.train(resume_from_checkpoint=True)

    def test_full_disk_keeps_the_last_checkpoint(self, tiny_processor, model, tmp_path):
        """The operating system refuses files as large as the optimizer's, as a full disk would."""

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

    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_streams_begin_again(self, tiny_processor, tiny_model, tmp_path, accumulation):
        """A step's batches may be of two passes, and a resumed run reads on, also after the first pass."""
        examples = [{**example, "id": str(number)} for number, example in enumerate(EXAMPLES[:3])]
        options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation}
        args = self.arguments(tmp_path, **options, max_steps=6, save_steps=4, lr_scheduler_type="constant")

        def run(**kwargs) -> tuple[VPiTTrainer, list[str]]:
            stream, seen = IterableDataset.from_generator(lambda: iter(examples)), []
            trainer = VPiTTrainer(tiny_model(), args, processing_class=tiny_processor, train_dataset=stream)
            compute_loss = trainer.compute_loss

            def record(model, inputs, **kwargs):
                seen.extend(name.split()[-1] for name in inputs["sample_ids"])
                return compute_loss(model, inputs, **kwargs)

            trainer.compute_loss = record
            trainer.train(**kwargs)
            return trainer, seen

        whole, seen = run()
        assert seen == [str(number % 3) for number in range(6 * accumulation)]
        shutil.rmtree(tmp_path / "checkpoint-6")
        resumed, seen_again = run(resume_from_checkpoint=True)
        assert seen_again == seen[4 * accumulation :]
        for name, weight in whole.model.state_dict().items():
            assert torch.equal(weight, resumed.model.state_dict()[name]), name

    def test_a_stream_stays_as_it_was_given(self, tiny_processor, model, tmp_path):
        """It ends outside of training, and strategies by epochs are refused, since it has none in training."""
        stream = IterableDataset.from_generator(lambda: iter(EXAMPLES[:3]))
        args = self.arguments(tmp_path, max_steps=2)
        trainer = VPiTTrainer(model, args, processing_class=tiny_processor, train_dataset=stream)
        trainer.train()
        assert trainer.train_dataset is stream
        assert trainer.evaluate(trainer.train_dataset)["eval_num_images"] == sum(
            len(e["images"]) for e in EXAMPLES[:3]
        )
        args = self.arguments(tmp_path, max_steps=2, save_strategy="epoch")
        with pytest.raises(ValueError, match="save_strategy='epoch' is set, but a stream has no epochs"):
            VPiTTrainer(model, args, processing_class=tiny_processor, train_dataset=stream)

    def test_bad_samples_are_skipped_and_listed(self, tiny_processor, tiny_model, tmp_path):
        """They are counted and listed by task, and the losses are those of the other samples."""
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
        batches = [[examples[n] for n in (0, 1, 3)], examples[4:]]
        twin = tiny_model().train()
        expected = [twin(**DataCollatorForVPiT(tiny_processor)(batch)).loss.item() for batch in batches[:1]]
        assert logs[0]["loss"] == pytest.approx(expected[0], rel=1e-5)

    def test_too_many_bad_samples_stop_the_run(self, tiny_processor, model, tmp_path):
        bad = {**EXAMPLES[1], "images": ["/no/such.png"]}
        args = self.arguments(tmp_path, on_bad_sample="skip", per_device_train_batch_size=4)
        with pytest.raises(ValueError, match="1 of 4 samples were skipped, a larger share than max_bad_share=0.01"):
            train(model, tiny_processor, args, [bad, *EXAMPLES[:3]])

    def test_one_bad_sample_early_on_does_not_stop_the_run(self, tiny_processor, model, tmp_path):
        bad = {**EXAMPLES[1], "images": ["/no/such.png"]}
        args = self.arguments(tmp_path, on_bad_sample="skip", max_bad_share=0.15, max_steps=2, logging_steps=1)
        trainer = train(model, tiny_processor, args, [bad, *EXAMPLES[:7]])  # 1 of 2 in the first step, 1 of 8 in all
        assert trainer.totals["skipped_samples"] == 1
        for _ in range(2):
            assert trainer.evaluate(dataset_of([bad, EXAMPLES[0]]))["eval_skipped_samples"] == 1
        assert trainer.totals["skipped_samples"] == 1  # evaluation does not count

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
        """The means are taken over the other batches."""
        examples, options = examples_with_nan(), {"on_nonfinite_loss": "skip", "per_device_eval_batch_size": 1}
        trainer = build_trainer(model, tiny_processor, self.arguments(tmp_path, **options), examples)
        found = trainer.evaluate(dataset_of(examples))
        expected = trainer.evaluate(dataset_of([*examples[:5], *examples[6:]]))
        for name in ("eval_loss", "eval_num_text_labels", "eval_visual_cosine"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5)
        assert "sample-5. This batch is left out of the evaluation" in caplog.text

    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_nan_is_named(self, tiny_processor, tiny_model, tmp_path, accumulation):
        """The error names step and batch, and the step does not change the weights."""
        options = {"train_sampling_strategy": "sequential", "save_strategy": "no", "lr_scheduler_type": "constant"}
        options |= {"per_device_train_batch_size": 2 // accumulation, "gradient_accumulation_steps": accumulation}
        model, twin = tiny_model(), tiny_model()
        with pytest.raises(ValueError, match=r"Step 3, process 0: text_loss is nan") as error:
            train(model, tiny_processor, self.arguments(tmp_path, **options), examples_with_nan())
        assert "sample-5" in str(error.value) and ("sample-4" in str(error.value)) == (accumulation == 1)
        train(twin, tiny_processor, self.arguments(tmp_path, max_steps=2, **options), examples_with_nan())
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, twin.state_dict()[name]), name

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("mode", ["raise", "skip"])
    def test_gradient_that_is_not_finite(self, tiny_processor, tiny_model, tmp_path, caplog, value, mode):
        """The losses say nothing of it before the weights are broken."""
        options = {"max_steps": 3, "lr_scheduler_type": "constant", "optim": "sgd", "save_strategy": "no"}
        options["train_sampling_strategy"] = "sequential"  # all batches are the same
        model, twin, calls = tiny_model(), tiny_model(), []

        def break_second_gradient(gradient: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return gradient.index_fill(0, torch.tensor(0), value) if len(calls) == 2 else gradient

        model.lm_head.weight.register_hook(break_second_gradient)
        args = self.arguments(tmp_path, on_nonfinite_loss=mode, **options)
        if mode == "raise":
            with pytest.raises(ValueError, match="Step 2: the losses are finite, but the gradients are not"):
                train(model, tiny_processor, args, EXAMPLES[:2] * 3)
        else:
            trainer = train(model, tiny_processor, args, EXAMPLES[:2] * 3)
            assert trainer.totals["skipped_steps"] == 1 and "Step 2: the losses are finite" in caplog.text
        steps = 1 if mode == "raise" else 2
        train(twin, tiny_processor, self.arguments(tmp_path, **{**options, "max_steps": steps}), EXAMPLES[:2] * 3)
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, twin.state_dict()[name]), name

    def test_gradient_of_an_empty_shard(self, tiny_processor, model, tmp_path):
        """FSDP leaves some processes no part of a small parameter."""
        trainer = build_trainer(model, tiny_processor, arguments(tmp_path))
        model.empty = torch.nn.Parameter(torch.zeros(0))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        assert not _WatchSteps(trainer).has_nonfinite_gradient()
        model.lm_head.weight.grad[0, 0] = math.nan
        with pytest.raises(ValueError, match="Step 1: the losses are finite, but the gradients are not"):
            _WatchSteps(trainer).has_nonfinite_gradient()

    @pytest.mark.parametrize("packing", [False, True])
    def test_broken_image_of_a_column_of_images(self, tiny_processor, model, tmp_path, packing):
        """The collator skips it and counts it; datasets would end the run by an error that names no row."""
        buffer = io.BytesIO()
        picture(0).save(buffer, "png")
        images = [{"bytes": buffer.getvalue()[:size], "path": f"{size}.png"} for size in (None, 60, None, None)]
        messages = [
            {"role": "user", "content": [{"type": "text", "text": "draw a cat"}]},
            {"role": "assistant", "content": [{"type": "image", "text": None}]},
        ]
        columns = {"messages": [messages] * 4, "images": [[image] for image in images]}
        dataset = Dataset.from_dict(columns).cast_column("images", List(ImageFeature()))
        options = {"max_steps": 2, "packing": packing, "max_length": 64 if packing else None}
        for mode in ("raise", "skip"):
            args = arguments(tmp_path / mode, on_bad_sample=mode, max_bad_share=0.5, **options)
            trainer = VPiTTrainer(model, args, processing_class=tiny_processor, train_dataset=dataset)
            if mode == "raise":
                with pytest.raises(BadSample, match="Example . of the batch has a bad image.*60.png"):
                    trainer.train()
            else:
                trainer.train()
                (rejected,) = (tmp_path / mode).glob("rejected_samples-*.jsonl")
                assert trainer.totals["skipped_samples"] > 0 and "60.png" in rejected.read_text(encoding="utf-8")

    def test_nan_is_skipped_and_counted(self, tiny_processor, tiny_model, tmp_path, caplog):
        """The run equals one that never saw the step, and its logs are finite."""
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
