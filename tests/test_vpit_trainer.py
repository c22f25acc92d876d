import copy

import pytest
import torch
from datasets import Dataset
from PIL import Image

from metamorph_hf import VPiTConfig, VPiTTrainer
from metamorph_hf.vpit_trainer import DataCollatorForVPiT


def picture(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (16 * 16 * 3,), generator=generator, dtype=torch.uint8)
    return Image.frombytes("RGB", (16, 16), bytes(pixels.tolist()))


def conversation(question, answer, images):
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "images": images,
    }


@pytest.fixture
def model(tiny_model):
    return tiny_model()


IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


EXAMPLES = [
    conversation([text("draw a cat")], [IMAGE], [picture(0)]),
    conversation([IMAGE, text("what is this?")], [text("a cat")], [picture(1)]),
    conversation([text("hello")], [text("hello to you, a long answer of many words")], []),
    conversation(
        [IMAGE, text("make it red")], [text("here"), IMAGE, text("done"), IMAGE], [picture(n) for n in range(3)]
    ),
    conversation([text("say yes")], [text("yes")], []),
    conversation([text("two cats")], [IMAGE, IMAGE], [picture(4), picture(5)]),
    conversation([IMAGE, IMAGE, text("same?")], [text("no")], [picture(6), picture(7)]),
    conversation([text("a dog")], [IMAGE], [picture(8)]),
]


def arguments(tmp_path, **kwargs) -> VPiTConfig:
    defaults = {
        "output_dir": str(tmp_path),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }
    return VPiTConfig(**{**defaults, **kwargs})


def train(model, processor, args, examples=EXAMPLES):
    # A transform keeps PIL images and mixed contents as they are, which Arrow columns would not.
    dataset = Dataset.from_dict({"place": list(range(len(examples)))}).with_transform(
        lambda columns: {key: [examples[place][key] for place in columns["place"]] for key in ("messages", "images")}
    )
    trainer = VPiTTrainer(model, args, processing_class=processor, train_dataset=dataset)
    trainer.train()
    return trainer


class TestCollator:
    def test_labels_say_everything(self, tiny_processor):
        batch = DataCollatorForVPiT(tiny_processor)(EXAMPLES[:4])
        ids, labels = batch["input_ids"], batch["labels"]
        image, n = tiny_processor.image_token_id, tiny_processor.num_image_tokens
        assert (labels == image).sum(1).tolist() == [n, 0, 0, 2 * n]
        assert (ids == image).sum(1).tolist() == [n, n, 0, 3 * n]
        learned = labels != -100
        assert torch.equal(labels[learned], ids[learned])
        end = tiny_processor.tokenizer.eos_token_id
        for row in labels:  # the answer's end of turn is the last target, and the only one of the two
            assert row[row != -100][-1] == end
            assert (row == end).sum() == 1
        assert (labels == tiny_processor.image_start_token_id).sum(1).tolist() == [1, 0, 0, 2]
        assert not (learned & (batch["attention_mask"] == 0)).any()
        assert len(batch["pixel_values"]) == 5

    def test_same_ids_as_the_processor(self, tiny_processor):
        example = EXAMPLES[3]
        batch = DataCollatorForVPiT(tiny_processor)([example])
        rendered = tiny_processor.apply_chat_template(example["messages"], tokenize=False)
        inputs = tiny_processor(
            text=[rendered], images=[example["images"]], return_tensors="pt", add_special_tokens=False
        )
        assert torch.equal(batch["input_ids"], inputs["input_ids"])
        assert torch.equal(batch["pixel_values"], inputs["pixel_values"])

    def test_visual_tokens_instead_of_images(self, tiny_processor, model):
        collate = DataCollatorForVPiT(tiny_processor)
        batch = collate([EXAMPLES[3]])
        tokens = model.eval().get_visual_tokens(batch["pixel_values"])
        precomputed = collate([{"messages": EXAMPLES[3]["messages"], "visual_tokens": list(tokens)}])
        assert torch.equal(batch["input_ids"], precomputed["input_ids"])
        loss = model(**batch).loss
        assert torch.allclose(loss, model(**precomputed).loss)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"images": []}, r"Example 7 has 1 image parts in its messages, but 0 images"),
            ({"images": [picture(0), picture(1)]}, r"1 image parts in its messages, but 2 images"),
            ({"images": ["/no/such/picture.png"]}, r"Example 7, image 0 cannot be read \(/no/such/picture.png\)"),
        ],
    )
    def test_bad_images_are_named(self, tiny_processor, change, message):
        with pytest.raises(ValueError, match=message):
            DataCollatorForVPiT(tiny_processor)([EXAMPLES[4], {**EXAMPLES[0], "id": 7, **change}])

    def test_too_long_is_refused(self, tiny_processor):
        with pytest.raises(ValueError, match=r"Example 0 of the batch has \d+ tokens, more than max_length=8"):
            DataCollatorForVPiT(tiny_processor, max_length=8)(EXAMPLES[:1])

    def test_pixels_and_visual_tokens_do_not_mix(self, tiny_processor):
        tokens = {"messages": EXAMPLES[0]["messages"], "visual_tokens": [torch.zeros(4, 16)]}
        with pytest.raises(ValueError, match="use one of the two"):
            DataCollatorForVPiT(tiny_processor)([EXAMPLES[1], tokens])


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

    @pytest.mark.parametrize(
        ("stage", "moves"),
        [
            ("projector", ("model.projector.",)),
            ("full", ("model.projector.", "model.language_model.", "vision_head.")),
        ],
    )
    def test_stage_decides_what_moves(self, tiny_processor, model, tmp_path, stage, moves):
        before = copy.deepcopy(model.state_dict())
        train(model, tiny_processor, arguments(tmp_path, stage=stage, per_device_train_batch_size=8))
        moves = moves + (("lm_head.",) if stage == "full" else ())
        for name, weight in model.state_dict().items():
            moved = not torch.equal(weight, before[name])
            assert moved == name.startswith(moves), f"{name} moved: {moved}"

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
