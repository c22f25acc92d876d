"""Visual-Predictive Instruction Tuning (VPiT, arXiv 2412.14164 section 3) on TRL's `SFTTrainer`."""

import contextlib
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import has_length
from trl import SFTTrainer

from .. import __version__
from ..configuration_metamorph import MetaMorphConfig
from ..model_cards import create_model_card
from ..modeling_metamorph import MetaMorphForConditionalGeneration
from ..processing_metamorph import MetaMorphProcessor
from . import stages
from .checkpoints import RecordProcesses, last_complete_checkpoint
from .collator import DataCollatorForVPiT
from .config import MODULE_LEARNING_RATES, VPiTConfig


logger = get_logger(__name__)

# What is summed between two logs, and for means the count that they are divided by.
METRICS = dict.fromkeys(("text_loss", "mean_token_accuracy", "entropy"), "num_text_labels")
METRICS |= dict.fromkeys(("visual_loss", "visual_cosine"), "num_visual_labels")
METRICS |= dict.fromkeys(("num_text_labels", "num_visual_labels", "num_images", "num_tokens"))
METRICS |= dict.fromkeys(("samples", "skipped_samples", "shortened_samples"))


class _CheckLosses(TrainerCallback):
    """Look at the losses of an optimization step before its update, and prevent that if one is not finite."""

    def __init__(self, trainer: "VPiTTrainer"):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        if self.trainer.has_nonfinite_loss():
            optimizer.zero_grad(set_to_none=True)  # Optimizers pass over parameters without gradients.
            self.trainer.totals["skipped_steps"] += 1


class VPiTTrainer(SFTTrainer):
    """
    Train a [`MetaMorphForConditionalGeneration`] on conversations with images: [`~trl.SFTTrainer`] with both losses
    (paper, section 3.2) and both stages (section 3.3).

    Each loss is a mean over its own labels in the whole optimization step, over all devices and accumulation steps.
    Training and evaluation log, over all processes since the last log, `text_loss`, `visual_loss`, `visual_cosine`,
    `num_text_labels`, `num_visual_labels`, `num_images` and TRL's `mean_token_accuracy` and `entropy` (of text labels)
    and `num_tokens` (of the whole training); training also `images_per_second`; and, if they are not 0, the run's or
    the evaluation's `skipped_samples`, `shortened_samples` and `skipped_steps`.

    Args:
        model ([`MetaMorphForConditionalGeneration`], [`~peft.PeftModel`] of one, or `str`):
            The model, or a path or Hub name to load it from with `args.model_init_kwargs`.
        args ([`VPiTConfig`]): `stage` decides which modules are trained; a table of them is printed.
        processing_class ([`MetaMorphProcessor`], *optional*): Defaults to the one saved beside the model.
        data_collator (*optional*): Defaults to [`DataCollatorForVPiT`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapters for stage `"full"`. [`complete_peft_config`] fills in what it leaves open.
        kwargs: Further arguments of [`~trl.SFTTrainer`].

    Raises:
        ValueError: if model and processor do not fit together, a setting does not fit the stage, or a loss is NaN or
            infinite.
    """

    _tag_names = ["trl", "vpit", "metamorph"]
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
            raise ValueError("compute_loss_func cannot replace VPiT's two losses: leave it out.")
        if args.stage == "projector" and (peft_config is not None or isinstance(model, PeftModel)):
            raise ValueError("Stage 'projector' has no language model to adapt: leave out peft_config and adapters.")
        is_path = isinstance(model, str)
        path = model if is_path else model.config._name_or_path
        revision = args.model_init_kwargs.get("revision") if is_path and args.model_init_kwargs else None
        config = MetaMorphConfig.from_pretrained(path, revision=revision) if is_path else model.config
        if processing_class is None:
            processing_class = MetaMorphProcessor.from_pretrained(path, revision=revision)
        self._check_agreement(config, processing_class)
        if peft_config is not None:
            with torch.device("meta"):
                skeleton = MetaMorphForConditionalGeneration(config) if is_path else model
            peft_config = stages.complete_peft_config(
                peft_config, skeleton, args.vision_tower_learning_rate is not None
            )
        if data_collator is None:
            options = (args.max_length, args.on_bad_sample, args.on_too_long)
            data_collator = DataCollatorForVPiT(processing_class, *options)
        if args.ddp_find_unused_parameters is None:
            # Every batch reaches all trained parameters but the tower's final norm and a vision head without a loss.
            weight = config.visual_loss_weight if args.visual_loss_weight is None else args.visual_loss_weight
            has_unused_head = args.stage == "full" and weight == 0
            args.ddp_find_unused_parameters = has_unused_head or args.vision_tower_learning_rate is not None
        self.totals = Counter()  # samples, skipped_samples, shortened_samples, skipped_steps and num_tokens of the run
        self._sums = {"train": defaultdict(int), "eval": defaultdict(int)}
        self._unchecked_losses = []
        self._last_log_time = time.monotonic()
        options = {"processing_class": processing_class, "data_collator": data_collator, "peft_config": peft_config}
        super().__init__(model, args, **options, **kwargs)
        self._has_visual_tokens = "visual_tokens" in next(iter(self.train_dataset))
        stages.set_trainable(self.model, args)
        self._check_options()
        self.add_callback(RecordProcesses())
        self.add_callback(_CheckLosses(self))
        self.accelerator.print(stages.format_trainable_table(self.metamorph, args))
        if args.base_batch_size is not None:
            self.accelerator.print(
                f"The learning rate {args.learning_rate / args.learning_rate_scale:.3g} for a batch of "
                f"{args.base_batch_size} is {args.learning_rate:.3g} for this batch of {args.total_train_batch_size}."
            )

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

    def _check_options(self) -> None:
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and parallelism.non_data_parallel_size > 1:
            raise ValueError("VPiTTrainer supports data parallelism (DDP, FSDP, DeepSpeed ZeRO) only.")
        if self.args.on_nonfinite_loss == "skip" and self.is_deepspeed_enabled:
            raise ValueError("on_nonfinite_loss='skip' is not supported with DeepSpeed: use 'raise'.")
        groups = stages.group_parameters(self.metamorph)
        for name in MODULE_LEARNING_RATES:
            module = name.removesuffix("_learning_rate")
            if getattr(self.args, name) is not None and not any(p.requires_grad for p in groups[module]):
                raise ValueError(
                    f"{name} is set, but nothing of that module is trained: leave it out, or name {module} in the "
                    "peft_config's modules_to_save."
                )
        if self.args.vision_tower_learning_rate is not None and self._has_visual_tokens:
            raise ValueError(
                "vision_tower_learning_rate is set, but the dataset has `visual_tokens`, for which the tower does not "
                "run: leave it out, or train on images."
            )

    @property
    def metamorph(self) -> MetaMorphForConditionalGeneration:
        """The model itself, without the wrappers of PEFT and accelerate."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    @property
    def visual_loss_weight(self) -> float:
        """Weight of the visual loss, as [`VPiTConfig`] describes it."""
        if self.args.visual_loss_weight is not None:
            return self.args.visual_loss_weight
        return 0.0 if self.args.stage == "projector" else self.metamorph.config.visual_loss_weight

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """See [`~transformers.Trainer.create_optimizer`]. Its parameter groups are split by learning rate."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        modules = {p: name for name, parameters in stages.group_parameters(self.metamorph).items() for p in parameters}
        groups = list(optimizer.param_groups)
        optimizer.param_groups.clear()
        for group in groups:
            split = defaultdict(list)
            for parameter in group["params"]:
                module = modules[parameter]
                # In stage 1, weight decay would change the embeddings of all other tokens.
                is_decayed = self.args.stage == "full" or module != "embeddings"
                rate = stages.get_learning_rate(module, self.args)
                split[rate, group["weight_decay"] * is_decayed].append(parameter)
            for (learning_rate, weight_decay), parameters in split.items():
                changed = {"params": parameters, "lr": learning_rate, "weight_decay": weight_decay}
                optimizer.add_param_group({**group, **changed})
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        See [`~transformers.Trainer.train`]. `resume_from_checkpoint=True` resumes from the checkpoint that
        [`last_complete_checkpoint`] finds in `output_dir`.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} holds no complete checkpoint to resume from.")
        self._last_log_time = time.monotonic()
        only_rows = self.args.stage == "projector"
        with stages.only_image_token_embeddings(self.metamorph) if only_rows else contextlib.nullcontext():
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self._sums["train"]:  # The last steps may not have been logged.
            self._pop_metrics("train")
        self.accelerator.wait_for_everyone()
        self.accelerator.print(self.rejected_table(), end="")
        return result

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """
        See [`~transformers.Trainer.get_batch_samples`]. The second value is a tensor of shape (2,), the text and
        visual label counts of the optimization step over all processes, or None without batches.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        counts = torch.zeros(2, dtype=torch.long, device=device)
        for batch in batches:
            labels = batch["labels"][:, 1:]
            num_visual = (labels == self.metamorph.config.image_token_id).sum()
            counts += torch.stack([(labels != -100).sum() - num_visual, num_visual]).to(device)
        return batches, self.accelerator.gather(counts.unsqueeze(0)).sum(0)

    def compute_loss(
        self, model, inputs, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ):
        """See [`~transformers.Trainer.compute_loss`]; `num_items_in_batch` comes from [`get_batch_samples`]."""
        inputs = self._add_missing_images(inputs)
        sample_ids, rejected = inputs.pop("sample_ids", []), inputs.pop("rejected", [])
        # The losses compute the logits they need; others are needed for `outputs` alone.
        kwargs = {"num_items_in_batch": num_items_in_batch, "logits_to_keep": 0 if return_outputs else 1}
        outputs = model(**inputs, **kwargs, use_cache=False)
        loss, config = outputs.text_loss, self.metamorph.config
        if self.visual_loss_weight:
            loss = loss + self.visual_loss_weight * outputs.visual_loss
        losses = torch.stack([part.detach() for part in (loss, outputs.text_loss, outputs.visual_loss)])
        self._unchecked_losses.append((losses, sample_ids))

        num_text, num_visual = outputs.num_text_labels, outputs.num_visual_labels
        text_items, visual_items = (num_text, num_visual) if num_items_in_batch is None else num_items_in_batch
        sums, is_finite = self._sums["train" if self.model.training else "eval"], torch.isfinite(loss)
        for name, value in {
            "text_loss": outputs.text_loss.detach() * text_items,
            "mean_token_accuracy": outputs.text_accuracy * num_text,
            "entropy": outputs.text_entropy * num_text,
            "visual_loss": outputs.visual_loss.detach() * visual_items,
            "visual_cosine": outputs.visual_cosine * num_visual,
            "num_text_labels": num_text,
            "num_visual_labels": num_visual,
            "num_images": (inputs["input_ids"] == config.image_token_id).sum() / config.num_image_tokens,
            "num_tokens": inputs["attention_mask"].sum(),
        }.items():
            sums[name] += torch.where(is_finite, value.float(), 0)
        sums["samples"] += len(sample_ids)
        for sample in rejected:
            sums[f"{sample['kind']}_samples"] += 1
        self._write_rejected(rejected)

        loss = torch.where(is_finite, loss, 0)  # Logged losses are means over the other batches.
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # Data parallelism averages gradients over processes.
        return (loss, outputs) if return_outputs else loss

    def _add_missing_images(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """
        Copy the batch, and give one without images an empty set of visual tokens, as DDP expects every process to run
        the projector. Where modules are sharded (FSDP, ZeRO-3), every process must run the vision tower, too: give the
        batch a blank image that none of its positions use.
        """
        if "pixel_values" in inputs or "visual_tokens" in inputs:
            return dict(inputs)
        config, device = self.metamorph.config, inputs["input_ids"].device
        if self._has_visual_tokens or not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            shape = (0, config.num_image_tokens, config.visual_token_dim)
            return {**inputs, "visual_tokens": torch.zeros(shape, device=device)}
        blank = torch.zeros(1, 3, config.vision_config.image_size, config.vision_config.image_size, device=device)
        return {**inputs, "pixel_values": blank, "image_indices": torch.zeros(0, dtype=torch.long, device=device)}

    def _write_rejected(self, rejected: list[dict[str, str]]) -> None:
        """Append samples that the collator skipped or shortened to the list of this process."""
        if rejected:
            path = Path(self.args.output_dir) / f"rejected_samples-{self.accelerator.process_index}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in rejected)

    def rejected_table(self) -> str:
        """Return a table of the samples that were skipped or shortened, one line per task; empty if there are none."""
        counts = defaultdict(Counter)
        for path in Path(self.args.output_dir).glob("rejected_samples-*.jsonl"):
            for line in path.read_text().splitlines():
                sample = json.loads(line)
                counts[str(sample["task"])][sample["kind"]] += 1
        lines = [f"{task:<24}{kinds['skipped']:>10}{kinds['shortened']:>12}" for task, kinds in sorted(counts.items())]
        return "\n".join([f"{'task':<24}{'skipped':>10}{'shortened':>12}", *lines, ""]) if lines else ""

    def has_nonfinite_loss(self) -> bool:
        """
        Return whether a loss since the last call was NaN or infinite; during training, on any process. Checking them
        together waits for the device once instead of once per batch.

        Raises:
            ValueError: if there was one and `on_nonfinite_loss` is `"raise"`.
        """
        if not self._unchecked_losses:
            return False
        losses, names = zip(*self._unchecked_losses)
        self._unchecked_losses, losses = [], torch.stack(losses)
        skips = self.args.on_nonfinite_loss == "skip"
        num_nonfinite = (~losses[:, 0].isfinite()).sum()
        if skips and self.model.training:
            num_nonfinite = self.accelerator.reduce(num_nonfinite)
        if num_nonfinite == 0:
            return False
        for (loss, text_loss, visual_loss), sample_ids in zip(losses.tolist(), names):
            if math.isfinite(loss):
                continue
            sentence = (
                f"Step {self.state.global_step + 1}, process {self.accelerator.process_index}: text_loss is "
                f"{text_loss}, visual_loss is {visual_loss}. Samples of the batch: {', '.join(map(str, sample_ids))}."
            )
            if not skips:
                raise ValueError(f"{sentence} Inspect them, lower the learning rate, or set on_nonfinite_loss='skip'.")
            done = "optimization step is skipped" if self.model.training else "batch is left out of the evaluation"
            logger.warning(f"{sentence} This {done}.", main_process_only=False)
        return True

    def evaluation_loop(self, *args, **kwargs):
        """See [`~transformers.Trainer.evaluation_loop`]."""
        started = time.monotonic()
        self._sums["eval"].clear()  # `predict` leaves sums that are not logged.
        output = super().evaluation_loop(*args, **kwargs)
        self.has_nonfinite_loss()
        self._last_log_time += time.monotonic() - started  # images_per_second leaves out evaluation.
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See [`~transformers.Trainer.log`]. Adds the metrics that the class lists."""
        mode = "train" if self.model.training else "eval"
        loss_name = "loss" if mode == "train" else next((name for name in logs if name.endswith("_loss")), "loss")
        if loss_name in logs and self._sums[mode]:
            metrics = self._pop_metrics(mode)
            if mode == "train":
                now = time.monotonic()
                metrics["images_per_second"] = metrics["num_images"] / (now - self._last_log_time)
                self._last_log_time = now
            else:  # Trainer's eval_loss is a mean over batches, whatever they hold.
                visual_loss = metrics.get("visual_loss", 0.0)
                metrics["loss"] = metrics.get("text_loss", 0.0) + self.visual_loss_weight * visual_loss
            logs.update({loss_name.removesuffix("loss") + name: value for name, value in metrics.items()})
        super().log(logs, start_time)

    def _pop_metrics(self, mode: str) -> dict[str, float]:
        """Return means and counts over all processes since the last call, which they must make together."""
        sums = self._sums[mode]
        local = [torch.as_tensor(sums[name], dtype=torch.float, device=self.accelerator.device) for name in METRICS]
        totals = self.accelerator.gather(torch.stack(local).unsqueeze(0)).sum(0).tolist()
        totals = dict(zip(METRICS, totals, strict=True))
        sums.clear()
        metrics = {}
        for name, count in METRICS.items():
            if count is None:
                metrics[name] = round(totals[name])
            elif totals[count]:
                metrics[name] = totals[name] / totals[count]
        counts = Counter({name: metrics.pop(name) for name in ("samples", "skipped_samples", "shortened_samples")})
        if mode == "train":
            self.totals.update({**counts, "num_tokens": metrics["num_tokens"]})
            self._check_bad_share()
            counts = self.totals
        metrics["num_tokens"] = self.totals["num_tokens"]
        named = ("skipped_samples", "shortened_samples", "skipped_steps")
        return metrics | {name: counts[name] for name in named if counts[name]}

    def _check_bad_share(self) -> None:
        # Relative to a whole epoch, or to a thousand samples of a stream: one sample early on is a large share.
        skipped, seen = self.totals["skipped_samples"], self.totals["skipped_samples"] + self.totals["samples"]
        expected = len(self.train_dataset) if has_length(self.train_dataset) else 1000
        if skipped > self.args.max_bad_share * max(seen, expected):
            raise ValueError(
                f"{skipped} of {seen} samples were skipped, a larger share than max_bad_share="
                f"{self.args.max_bad_share:g}. {self.args.output_dir}/rejected_samples-*.jsonl gives the reasons: "
                "correct the data, or raise max_bad_share."
            )

    def training_facts(self, dataset_name: str | None = None) -> dict[str, Any]:
        """Return the facts of training that the model card lists: data, stage, adapter, steps, losses, versions."""
        args, base = self.args, self.metamorph.config._name_or_path
        adapter = "none"
        if isinstance(self.model, PeftModel):
            peft_config = self.model.peft_config["default"]
            adapter = peft_config.peft_type.value
            if isinstance(peft_config, LoraConfig):
                adapter += f", rank {peft_config.r}, alpha {peft_config.lora_alpha}"
        last_log = next((log for log in reversed(self.state.log_history) if "loss" in log), {})
        losses = ("loss", "text_loss", "visual_loss", "visual_cosine", "mean_token_accuracy")
        return {
            "base model": Path(base).name if Path(base).exists() else base,  # Paths of this machine mean nothing.
            "stage": args.stage,
            "data": dataset_name or "not recorded",
            "adapter": adapter,
            "steps": self.state.global_step,
            "batch (over all devices and accumulation steps)": args.total_train_batch_size,
            "processes": args.world_size,
            "peak learning rate": f"{args.learning_rate:.3g}",
            "schedule": f"{args.lr_scheduler_type.value}, warm-up {args.warmup_steps:g}",
            "visual loss weight": self.visual_loss_weight,
            "mixed precision": args.mixed_precision,
            **{f"last {name}": f"{last_log[name]:.4f}" for name in losses if name in last_log},
            "metamorph_hf": __version__,
            "torch": torch.__version__,
        }

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Write the model's card with a table of [`training_facts`] to `README.md` in `output_dir`. Its name is
        `hub_model_id`, or else `model_name`, or else that of the folder. Checkpoints and `push_to_hub` call this, too.
        """
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or model_name or Path(self.args.output_dir).name
        tags = [tags] if isinstance(tags, str) else tags or []
        card = create_model_card(self.metamorph.config, name, [*self._tag_names, *tags])
        rows = (f"| {fact} | {value} |\n" for fact, value in self.training_facts(dataset_name).items())
        card.text += "\n\n## Training facts\n\n| | |\n|---|---|\n" + "".join(rows)
        card.save(Path(self.args.output_dir) / "README.md")


__all__ = ["VPiTTrainer", "last_complete_checkpoint"]
