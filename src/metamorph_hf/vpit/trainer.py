"""Visual-Predictive Instruction Tuning (VPiT, arXiv 2412.14164 section 3) on TRL's `SFTTrainer`."""

import contextlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_model_param_count
from transformers.trainer_utils import has_length
from trl import SFTTrainer

from ..configuration_metamorph import MetaMorphConfig
from ..modeling_metamorph import MetaMorphForConditionalGeneration
from ..processing_metamorph import MetaMorphProcessor
from .collator import DataCollatorForVPiT
from .config import VPiTConfig
from .stages import complete_peft_config, module_of, only_image_token_embeddings


logger = get_logger(__name__)


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint folder of a run that was saved to its end, or None: a save may have been interrupted."""
    checkpoints = Path(output_dir).glob("checkpoint-[0-9]*")
    for folder in sorted(checkpoints, key=lambda folder: int(folder.name.rsplit("-")[-1]), reverse=True):
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text())  # what Trainer writes last
            return str(folder)
        except (FileNotFoundError, json.JSONDecodeError):
            logger.warning(f"{folder} was not saved to its end and is not used.")
    return None


class _SkipNonfiniteSteps(TrainerCallback):
    """Makes no update from an optimisation step in which a loss of any process was NaN or infinite."""

    def __init__(self, trainer: "VPiTTrainer"):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        if self.trainer.accelerator.reduce(self.trainer.num_nonfinite) > 0:
            optimizer.zero_grad(set_to_none=True)  # an optimizer passes over parameters without gradient
            self.trainer.totals["skipped_steps"] += 1
        self.trainer.num_nonfinite.zero_()


class VPiTTrainer(SFTTrainer):
    """
    Trains a [`MetaMorphForConditionalGeneration`] on conversations with images: [`~trl.SFTTrainer`] with both losses
    (paper, section 3.2) and both stages (section 3.3).

    Each loss is a mean over its own labels in the whole optimisation step, over all devices and accumulation steps.
    Logged apart, for training and evaluation, over all processes since the last log: `text_loss`, `visual_loss`,
    `visual_cosine`, `num_text_labels`, `num_visual_labels`, `num_images`, and for training `images_per_second`; once
    there are any, `skipped_samples`, `shortened_samples` and `skipped_steps` of the run so far, or of an evaluation.

    Args:
        model ([`MetaMorphForConditionalGeneration`], [`~peft.PeftModel`] of one, or `str`):
            The model, or where to load it from.
        args ([`VPiTConfig`]): `stage` decides what is trained; a table of it is printed.
        processing_class ([`MetaMorphProcessor`], *optional*): Defaults to the one saved beside the model.
        data_collator (*optional*): Defaults to [`DataCollatorForVPiT`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapters for stage `"full"`. What it leaves open is filled in by [`complete_peft_config`].
        kwargs: Everything else that [`~trl.SFTTrainer`] takes.

    Raises:
        ValueError: if model and processor do not fit together, the stage does not allow what is asked for, or a loss
            is NaN or infinite.
    """

    _tag_names = ["trl", "vpit", "metamorph"]
    _name = "VPiT"
    _paper = {
        "title": "MetaMorph: Multimodal Understanding and Generation via Instruction Tuning",
        "id": "2412.14164",
    }
    # compute_loss divides by the counts of the whole step, so Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: "MetaMorphForConditionalGeneration | PeftModel | str",
        args: VPiTConfig,
        processing_class: MetaMorphProcessor | None = None,
        data_collator: Callable | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs,
    ):
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func cannot stand in for VPiT's two losses: leave it out.")
        path = model if isinstance(model, str) else model.config._name_or_path
        if processing_class is None:
            processing_class = MetaMorphProcessor.from_pretrained(path)
        config = MetaMorphConfig.from_pretrained(path) if isinstance(model, str) else model.config
        self._check_agreement(config, processing_class)
        if args.stage == "projector" and (peft_config is not None or isinstance(model, PeftModel)):
            raise ValueError(
                "Stage 'projector' trains no language model to adapt: leave out peft_config and adapters."
            )
        if peft_config is not None:
            with torch.device("meta"):
                skeleton = MetaMorphForConditionalGeneration(config) if isinstance(model, str) else model
            peft_config = complete_peft_config(peft_config, skeleton, args.vision_tower_learning_rate is not None)
        if data_collator is None:
            options = (args.max_length, args.on_bad_sample, args.on_too_long)
            data_collator = DataCollatorForVPiT(processing_class, *options)
        if args.ddp_find_unused_parameters is None:
            # Every batch reaches everything that is trained but the tower's final norm, or a head without a loss.
            no_visual_loss = (
                config.visual_loss_weight if args.visual_loss_weight is None else args.visual_loss_weight
            ) == 0
            tower = args.vision_tower_learning_rate is not None
            args.ddp_find_unused_parameters = tower or (args.stage == "full" and no_visual_loss)
        self._sums = {mode: defaultdict(float) for mode in ("train", "eval")}
        self._last_log_time = time.monotonic()
        self.totals = Counter()  # of samples seen, skipped and shortened, and of steps skipped
        super().__init__(
            model,
            args,
            processing_class=processing_class,
            data_collator=data_collator,
            peft_config=peft_config,
            **kwargs,
        )
        self._has_visual_tokens = "visual_tokens" in next(iter(self.train_dataset))
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and parallelism.non_data_parallel_size > 1:
            raise ValueError("VPiTTrainer supports data parallelism (DDP, FSDP, DeepSpeed ZeRO) only.")
        self._set_trainable()
        self._check_learning_rates()
        if args.on_nonfinite_loss == "skip":
            if self.is_deepspeed_enabled:
                raise ValueError("on_nonfinite_loss='skip' is not supported with DeepSpeed: use 'raise'.")
            self.num_nonfinite = torch.zeros((), device=self.accelerator.device)
            self.add_callback(_SkipNonfiniteSteps(self))
        self.accelerator.print(self.trainable_table())

    @staticmethod
    def _check_agreement(config: MetaMorphConfig, processor: MetaMorphProcessor) -> None:
        for name in ("image_token_id", "image_start_token_id", "image_end_token_id", "num_image_tokens"):
            if getattr(config, name) != getattr(processor, name):
                raise ValueError(
                    f"The model's {name} is {getattr(config, name)}, but the processor's is "
                    f"{getattr(processor, name)}: they must come from the same checkpoint."
                )
        if len(processor.tokenizer) > config.text_config.vocab_size:
            raise ValueError(
                f"The tokenizer has {len(processor.tokenizer)} tokens, but the model's vocabulary has "
                f"{config.text_config.vocab_size}: call model.resize_token_embeddings(len(processor.tokenizer))."
            )

    # ---- What is trained ----

    @property
    def metamorph(self) -> MetaMorphForConditionalGeneration:
        """The model itself, out of what PEFT and accelerate wrapped around it."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def _set_trainable(self) -> None:
        model, args = self.metamorph, self.args
        if isinstance(self.model, PeftModel):
            for name, parameter in self.model.named_parameters():
                # Whole weights in bfloat16, as TRL leaves them, would lose updates of 1e-4.
                if parameter.requires_grad and "lora_" not in name:
                    parameter.data = parameter.data.float()
            return
        model.requires_grad_(args.stage == "full")
        model.model.vision_tower.requires_grad_(args.vision_tower_learning_rate is not None)
        model.model.projector.requires_grad_(True)
        model.get_input_embeddings().requires_grad_(True)  # in stage "projector": two rows, see train()

    def _check_learning_rates(self) -> None:
        trained = {module_of(name) for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        for module in ("projector", "vision_head", "vision_tower"):
            if getattr(self.args, f"{module}_learning_rate") is not None and module not in trained:
                raise ValueError(
                    f"{module}_learning_rate is set, but nothing of that module is trained: leave it out, or name "
                    f"{module} in the peft_config's modules_to_save."
                )
        if self.args.vision_tower_learning_rate is not None and self._has_visual_tokens:
            raise ValueError(
                "vision_tower_learning_rate is set, but the dataset brings `visual_tokens`, for which the tower does "
                "not run: leave it out, or train on images."
            )

    def _learning_rate_of(self, module: str) -> float:
        own = {
            "projector": self.args.projector_learning_rate,
            "vision_head": self.args.vision_head_learning_rate,
            "vision_tower": self.args.vision_tower_learning_rate,
        }.get(module)
        return (self.args.learning_rate if own is None else own) * self.args.learning_rate_scale

    def trainable_table(self) -> str:
        """What is trained and what is frozen, a line per module: parameters, trainable ones, peak learning rate."""
        embeddings = {id(parameter) for parameter in self.metamorph.get_input_embeddings().parameters()}
        totals, trainable = defaultdict(int), defaultdict(int)
        for name, parameter in self.model.named_parameters():
            if "original_module" in name.split("."):  # PEFT's untouched copy of what it trains whole
                continue
            is_embedding = id(parameter) in embeddings
            module = "embeddings" if is_embedding else module_of(name)
            size = get_model_param_count(nn.ParameterList([parameter]))
            totals[module] += size
            if parameter.requires_grad:
                only_two_rows = is_embedding and self.args.stage == "projector"
                trainable[module] += 2 * parameter.shape[-1] if only_two_rows else size
        lines = [f"{'module':<16}{'parameters':>16}{'trainable':>16}{'learning rate':>16}"]
        for module, total in totals.items():
            rate = f"{self._learning_rate_of(module):.3g}" if trainable[module] else "frozen"
            lines.append(f"{module:<16}{total:>16,}{trainable[module]:>16,}{rate:>16}")
        return "\n".join(lines)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """[`~transformers.Trainer`]'s, with its groups split by learning rate."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        modules = {p: module_of(name) for name, p in (model or self.model).named_parameters()}
        embeddings = self.metamorph.get_input_embeddings().weight
        groups = list(optimizer.param_groups)
        optimizer.param_groups.clear()
        for group in groups:
            split = defaultdict(list)
            for parameter in group["params"]:
                # Weight decay would move the embeddings of all other tokens.
                decayed = self.args.stage == "full" or parameter is not embeddings
                split[self._learning_rate_of(modules[parameter]), group["weight_decay"] * decayed].append(parameter)
            for (learning_rate, weight_decay), parameters in split.items():
                changed = {"params": parameters, "lr": learning_rate, "weight_decay": weight_decay}
                optimizer.add_param_group({**group, **changed})
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        See [`~transformers.Trainer.train`]. `resume_from_checkpoint=True` goes on from the last checkpoint of
        `output_dir` that was saved to its end.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} holds no complete checkpoint to resume from.")
        self._last_log_time = time.monotonic()
        only_rows = self.args.stage == "projector"
        with only_image_token_embeddings(self.metamorph) if only_rows else contextlib.nullcontext():
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self._sums["train"]:  # of steps after the last log
            self._add_means({}, "", self._sums["train"])
            self._sums["train"].clear()
        self.accelerator.wait_for_everyone()
        self.accelerator.print(self.rejected_table(), end="")
        return result

    def rejected_table(self) -> str:
        """How many samples this run left out or shortened, a line per task; empty if none."""
        counts = defaultdict(Counter)
        for path in Path(self.args.output_dir).glob("rejected_samples-*.jsonl"):
            for line in path.read_text().splitlines():
                sample = json.loads(line)
                counts[str(sample["task"])][sample["kind"]] += 1
        lines = [f"{task:<24}{kinds['skipped']:>10}{kinds['shortened']:>12}" for task, kinds in sorted(counts.items())]
        return "\n".join([f"{'task':<24}{'skipped':>10}{'shortened':>12}", *lines, ""]) if lines else ""

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Only then comes trainer_state.json, by which a checkpoint is known to be complete.
        self.accelerator.wait_for_everyone()

    # ---- The two losses ----

    @property
    def visual_loss_weight(self) -> float:
        """Weight of the visual loss: the arguments', else 0 in stage `"projector"` and the model's in `"full"`."""
        if self.args.visual_loss_weight is not None:
            return self.args.visual_loss_weight
        return 0.0 if self.args.stage == "projector" else self.metamorph.config.visual_loss_weight

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Text and visual labels of the whole optimisation step, over all processes. Shape (2,)."""
        if not batch_samples:
            return None
        image_token_id = self.metamorph.config.image_token_id
        counts = torch.zeros(2, dtype=torch.long, device=device)
        for batch in batch_samples:
            labels = batch["labels"][:, 1:]
            num_visual = (labels == image_token_id).sum()
            counts += torch.stack([(labels != -100).sum() - num_visual, num_visual]).to(device)
        return self.accelerator.gather(counts.unsqueeze(0)).sum(0)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        inputs = self._with_images(inputs)
        sample_ids = inputs.pop("sample_ids", None)
        num_skipped, num_shortened = self._note_rejected(inputs.pop("rejected", []))
        if num_items_in_batch is not None:
            inputs["num_text_items"], inputs["num_visual_items"] = num_items_in_batch.clamp(min=1)
        outputs = model(**inputs, use_cache=False, skip_logits=not return_outputs)
        loss = outputs.text_loss
        if self.visual_loss_weight:
            loss = loss + self.visual_loss_weight * outputs.visual_loss
        if not torch.isfinite(loss):
            self._report_nonfinite(outputs, sample_ids)

        num_text, num_visual = outputs.num_text_labels, outputs.num_visual_labels
        is_image_token = inputs["input_ids"] == self.metamorph.config.image_token_id
        sums = {
            "text_loss": outputs.text_loss.detach() * inputs.get("num_text_items", num_text),
            "visual_loss": outputs.visual_loss.detach() * inputs.get("num_visual_items", num_visual),
            "visual_cosine": outputs.visual_cosine * num_visual,
            "num_text_labels": num_text,
            "num_visual_labels": num_visual,
            "num_images": is_image_token.sum() / self.metamorph.config.num_image_tokens,
            "skipped_samples": torch.tensor(num_skipped, device=loss.device),
            "shortened_samples": torch.tensor(num_shortened, device=loss.device),
            "samples": torch.tensor(len(sample_ids or []), device=loss.device),
        }
        is_counted = torch.isfinite(loss)
        for name, value in sums.items():
            if name not in ("skipped_samples", "shortened_samples", "samples"):
                value = torch.where(is_counted, value, 0)  # the means are the other batches'
            self._sums["train" if self.model.training else "eval"][name] += value.float()
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # data parallelism averages gradients over processes
        return (loss, outputs) if return_outputs else loss

    def _with_images(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """
        A batch without images gets none of them explicitly, so that the projector always runs. Where modules are
        sharded (FSDP, ZeRO-3) every process must run the tower, too: it gets a blank image, which stands nowhere.
        """
        if "pixel_values" in inputs or "visual_tokens" in inputs:
            return dict(inputs)
        config, device = self.metamorph.config, inputs["input_ids"].device
        if self._has_visual_tokens or not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            none = torch.zeros(0, config.num_image_tokens, config.visual_token_dim, device=device)
            return {**inputs, "visual_tokens": none}
        blank = torch.zeros(1, 3, config.vision_config.image_size, config.vision_config.image_size, device=device)
        return {**inputs, "pixel_values": blank, "image_indices": torch.zeros(0, dtype=torch.long, device=device)}

    def _note_rejected(self, rejected: list[dict[str, str]]) -> tuple[int, int]:
        """Appends what the collator left out or shortened to this process' list; returns how many of each."""
        if rejected:
            path = Path(self.args.output_dir) / f"rejected_samples-{self.accelerator.process_index}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in rejected)
        kinds = [sample["kind"] for sample in rejected]
        return kinds.count("skipped"), kinds.count("shortened")

    def _report_nonfinite(self, outputs, sample_ids: list[str] | None) -> None:
        sentence = (
            f"Step {self.state.global_step + 1}, process {self.accelerator.process_index}: text_loss is "
            f"{outputs.text_loss.item()}, visual_loss is {outputs.visual_loss.item()}. The batch holds the samples "
            f"{'(the collator gives no sample_ids)' if sample_ids is None else ', '.join(map(str, sample_ids))}."
        )
        if self.args.on_nonfinite_loss == "raise":
            raise ValueError(f"{sentence} Look at them, lower the learning rate, or set on_nonfinite_loss='skip'.")
        if not self.model.training:
            logger.warning(f"{sentence} This batch is left out of the evaluation.", main_process_only=False)
            return
        logger.warning(f"{sentence} This optimisation step is skipped.", main_process_only=False)
        self.num_nonfinite += 1

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        return torch.nan_to_num(loss, 0.0, 0.0, 0.0) if self.args.on_nonfinite_loss == "skip" else loss

    def evaluation_loop(self, *args, **kwargs):
        self._sums["eval"].clear()  # `predict` leaves some, which nobody logs
        return super().evaluation_loop(*args, **kwargs)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        started = time.monotonic()
        metrics = super().evaluate(*args, **kwargs)
        self._last_log_time += time.monotonic() - started  # so that training's images per second are training's
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        loss_name = "loss" if mode == "train" else next((name for name in logs if name.endswith("_loss")), "loss")
        if loss_name in logs and self._sums[mode]:
            self._add_means(logs, loss_name.removesuffix("loss"), self._sums[mode])
            self._sums[mode].clear()
            if mode == "train":
                now = time.monotonic()
                logs["images_per_second"] = logs["num_images"] / (now - self._last_log_time)
                self._last_log_time = now
            else:  # Trainer's is a mean over batches, whatever they hold
                visual = logs.get(f"{loss_name.removesuffix('loss')}visual_loss", 0.0)
                text = logs.get(f"{loss_name.removesuffix('loss')}text_loss", 0.0)
                logs[loss_name] = text + self.visual_loss_weight * visual
        super().log(logs, start_time)

    def _add_means(self, logs: dict[str, float], prefix: str, sums: dict[str, torch.Tensor]) -> None:
        totals = self.accelerator.gather(torch.stack(list(sums.values())).unsqueeze(0)).sum(0).tolist()
        totals = dict(zip(sums, totals, strict=True))
        samples = {name: int(totals.pop(name)) for name in ("skipped_samples", "shortened_samples", "samples")}
        counts = {name: totals.pop(name) for name in ("num_text_labels", "num_visual_labels", "num_images")}
        for name, total in totals.items():
            if count := counts["num_text_labels" if name == "text_loss" else "num_visual_labels"]:
                logs[prefix + name] = total / count
        logs.update({prefix + name: round(count) for name, count in counts.items()})
        if prefix:  # of an evaluation, which may come often
            logs.update({prefix + name: count for name, count in samples.items() if name != "samples" and count})
            return
        self.totals.update(samples)
        for name in ("skipped_samples", "shortened_samples", "skipped_steps"):
            if self.totals[name]:
                logs[name] = self.totals[name]
        # Of a whole epoch, or of a thousand samples of a stream: early on, a single one is a large share.
        skipped, seen = self.totals["skipped_samples"], self.totals["skipped_samples"] + self.totals["samples"]
        expected = len(self.train_dataset) if has_length(self.train_dataset) else 1000
        if skipped > self.args.max_bad_share * max(seen, expected):
            raise ValueError(
                f"{skipped} of {seen} samples were skipped, a larger share than max_bad_share="
                f"{self.args.max_bad_share:g}. {self.args.output_dir}/rejected_samples-*.jsonl says why: mend them, "
                "or raise max_bad_share."
            )


__all__ = ["VPiTTrainer", "last_complete_checkpoint"]
