"""Visual-Predictive Instruction Tuning (VPiT, arXiv 2412.14164 section 3) on TRL's `SFTTrainer`."""

import contextlib
import functools
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from peft import PeftConfig, PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, has_length
from transformers.utils import find_adapter_config_file
from trl import SFTTrainer

from .. import __version__
from ..configuration_metamorph import MetaMorphConfig
from ..data.mixture import disable_decoding
from ..model_cards import create_model_card
from ..modeling_metamorph import MetaMorphForConditionalGeneration
from ..processing_metamorph import MetaMorphProcessor
from . import stages
from .checkpoints import find_problems, last_complete_checkpoint
from .collator import DataCollatorForVPiT
from .config import MODULE_LEARNING_RATES, VPiTConfig
from .metrics import COUNTS, MEANS, RUN_COUNTS, average_by_task, measure_batch, sum_by_sample
from .packing import check_packable, pack_dataset
from .text_loss import measure_text


logger = get_logger(__name__)

UNSUPPORTED_ARGUMENTS = {
    "compute_loss_func": "cannot replace VPiT's two losses: leave it out",
    "formatting_func": "has no effect on VPiT: format the dataset's `messages` before training",
}


class _WatchSteps(TrainerCallback):
    """Prevent the update of a step if a loss or a gradient is not finite, and measure the step's time."""

    def __init__(self, trainer: "VPiTTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if (stored := state.stateful_callbacks.get("VPiTTrainer")) is not None:  # of a resumed checkpoint
            self.trainer.totals = Counter(stored["attributes"]["totals"])

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        if self.trainer.has_nonfinite_loss() or self.has_nonfinite_gradient():
            optimizer.zero_grad(set_to_none=True)  # Optimizers pass over parameters without gradients.
            self.trainer.totals["skipped_steps"] += 1

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.seconds += time.monotonic() - self.trainer.step_start

    def has_nonfinite_gradient(self) -> bool:
        """
        Return whether a gradient of any process is NaN or infinite, which would break the weights for good although
        the losses are finite. Not with DeepSpeed, which keeps the gradients to itself, and with float16, whose scaler
        checks them.

        Raises:
            ValueError: if there is one and `on_nonfinite_loss` is `"raise"`.
        """
        trainer = self.trainer
        if trainer.is_deepspeed_enabled or trainer.accelerator.scaler is not None:
            return False
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        parts = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in gradients]
        largest = nn.utils.get_total_norm([part for part in parts if part.numel()], math.inf)  # shards may be empty
        is_nonfinite = ~largest.isfinite()
        if not trainer.accelerator.reduce(is_nonfinite.to(trainer.accelerator.device).long()):
            return False
        sentence = f"Step {trainer.state.global_step + 1}: the losses are finite, but the gradients are not."
        if trainer.args.on_nonfinite_loss == "raise":
            raise ValueError(
                f"{sentence} The weights are those before this step. Resume from a checkpoint with a lower learning "
                "rate, or set on_nonfinite_loss='skip'."
            )
        logger.warning(f"{sentence} This optimization step is skipped.")
        return True


class _PaddedStream(IterableDataset):
    """A stream that ends with None until its length is a multiple."""

    def __init__(self, dataset: IterableDataset, multiple: int):
        self.dataset, self.multiple = dataset, multiple

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        count = 0
        for sample in self.dataset:
            count += 1
            yield sample
        yield from [None] * (-count % self.multiple)


def _keep_undecoded(data: Any) -> Any:
    """Leave the reading of images to the collator, which names or skips the broken ones."""
    if isinstance(data, dict):
        return {name: _keep_undecoded(dataset) for name, dataset in data.items()}
    return disable_decoding(data) if isinstance(data, (datasets.Dataset, datasets.IterableDataset)) else data


def _collate_samples(collate: Callable, samples: list[dict[str, Any] | None]) -> dict[str, Any]:
    return collate([sample for sample in samples if sample is not None])


def _prepare_arguments(args: VPiTConfig, kwargs: dict[str, Any]) -> None:
    if not isinstance(args, VPiTConfig):
        raise TypeError(f"args is a {type(args).__name__}, expected a VPiTConfig, which has the same options.")
    for name, problem in UNSUPPORTED_ARGUMENTS.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} {problem}.")
    for name in {"train_dataset", "eval_dataset"} & kwargs.keys():
        kwargs[name] = _keep_undecoded(kwargs[name])
    if (dataset := kwargs.get("train_dataset")) is not None and next(iter(dataset), None) is None:
        raise ValueError("train_dataset has no samples.")


def _build_collator(processor: MetaMorphProcessor, args: VPiTConfig, config: MetaMorphConfig) -> DataCollatorForVPiT:
    # Some language models, such as state space models, have no limit.
    limits = (args.max_length, getattr(config.text_config, "max_position_embeddings", None))
    max_length = min((limit for limit in limits if limit is not None), default=None)
    return DataCollatorForVPiT(processor, max_length, args.on_bad_sample, args.on_too_long)


class VPiTTrainer(SFTTrainer):
    """
    Train a [`MetaMorphForConditionalGeneration`] on conversations with images: [`~trl.SFTTrainer`] with both losses
    (paper, section 3.2) and both stages (section 3.3).

    Each loss is a mean over its own labels in the whole optimization step, over all devices and accumulation steps.
    Training and evaluation log, over all processes since the last log, `text_loss`, `visual_loss`, `visual_cosine`,
    `mean_token_accuracy` and `entropy` (of text labels), `num_text_labels`, `num_visual_labels`, `num_images` and, in
    training, `images_per_second`; both losses of each task and source, such as `text_loss/llava/captions.jsonl`, if
    there are several; `aux_loss` of mixtures of experts, as SFTTrainer does; and of the whole run `num_tokens` and, if
    they are not 0, `skipped_samples`, `shortened_samples` and `skipped_steps`.

    Args:
        model ([`MetaMorphForConditionalGeneration`], [`~peft.PeftModel`] of one, or `str`):
            The model, or a path or Hub name to load it from with `args.model_init_kwargs`. That of an adapter trains
            this adapter further.
        args ([`VPiTConfig`]): `stage` decides which modules are trained; a table of them is printed.
        processing_class ([`MetaMorphProcessor`], *optional*): Defaults to the one saved beside the model.
        data_collator (*optional*): Defaults to [`DataCollatorForVPiT`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapters for stage `"full"`. [`complete_peft_config`] fills in what it leaves open.
        kwargs: Further arguments of [`~trl.SFTTrainer`].

    Raises:
        TypeError: if `args` is not a [`VPiTConfig`].
        ValueError: if model and processor, or settings and stage, do not fit together, or a loss or a gradient is NaN
            or infinite.
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
        _prepare_arguments(args, kwargs)
        path = model if isinstance(model, str) else model.config._name_or_path
        init_kwargs = dict(args.model_init_kwargs or {}) if isinstance(model, str) else {}
        revision = init_kwargs.get("revision")
        if isinstance(model, str) and find_adapter_config_file(model, revision=revision) is not None:
            if peft_config is not None:
                raise ValueError(f"{model} holds an adapter, which is trained further: leave out peft_config.")
            init_kwargs["quantization_config"] = kwargs.pop("quantization_config", None)
            model, args.model_init_kwargs = stages.load_adapter(model, **init_kwargs), None
        if args.stage == "projector" and (peft_config is not None or isinstance(model, PeftModel)):
            raise ValueError("Stage 'projector' has no language model to adapt: leave out peft_config and adapters.")
        is_path = isinstance(model, str)
        config = MetaMorphConfig.from_pretrained(path, revision=revision) if is_path else model.config
        if processing_class is None:
            processing_class = MetaMorphProcessor.from_pretrained(path, revision=revision)
        if not isinstance(processing_class, MetaMorphProcessor):
            raise TypeError(f"processing_class is a {type(processing_class).__name__}, expected a MetaMorphProcessor.")
        processing_class.check_config(config)
        trains_tower = args.vision_tower_learning_rate is not None
        if peft_config is not None:
            with torch.device("meta"):
                skeleton = MetaMorphForConditionalGeneration(config) if is_path else model
            peft_config = stages.complete_peft_config(peft_config, skeleton, trains_tower)
        data_collator = data_collator or _build_collator(processing_class, args, config)
        weight = config.visual_loss_weight if args.visual_loss_weight is None else args.visual_loss_weight
        if args.ddp_find_unused_parameters is None:
            # Every batch reaches all trained parameters but the tower's final norm and a vision head without a loss.
            args.ddp_find_unused_parameters = weight == 0 or trains_tower
        self.visual_loss_weight = 0.0 if args.stage == "projector" and args.visual_loss_weight is None else weight
        self.totals = Counter()  # samples, skipped_samples, shortened_samples, skipped_steps and num_tokens of the run
        self.step_start, self.seconds = 0.0, 0.0  # and the seconds of all steps since the last log
        self._sums = {"train": defaultdict(int), "eval": defaultdict(int)}
        self._task_sums = {"train": defaultdict(int), "eval": defaultdict(int)}  # of this process, see sum_by_sample
        self._unchecked_losses = []
        packing, padding_free = args.packing, args.padding_free
        args.packing = args.padding_free = False  # TRL packs text alone, and refuses images
        try:
            super().__init__(
                model, args, data_collator, processing_class=processing_class, peft_config=peft_config, **kwargs
            )
        finally:
            args.packing, args.padding_free = packing, padding_free
        self._has_visual_tokens = "visual_tokens" in next(iter(self.train_dataset))
        self._num_samples = len(self.train_dataset) if has_length(self.train_dataset) else None
        if packing or padding_free:
            self._pack()
        stages.set_trainable(self.model, args)
        base = self.metamorph.config._name_or_path  # empty for a model that was not loaded
        if isinstance(self.model, PeftModel) and base and Path(base).is_dir():  # a relative path works from here only
            self.model.active_peft_config.base_model_name_or_path = str(Path(base).resolve())
        elif peft_config is not None:
            self.model.active_peft_config.revision = revision
        self._check_options()
        self.add_callback(_WatchSteps(self))
        self.accelerator.print(stages.format_trainable_table(self.metamorph, args))
        if args.base_batch_size is not None:
            self.accelerator.print(
                f"The learning rate {args.learning_rate / args.learning_rate_scale:.3g} for a batch of "
                f"{args.base_batch_size} is {args.learning_rate:.3g} for this batch of {args.total_train_batch_size}."
            )

    def _pack(self) -> None:
        """Replace the training dataset by a packed one, or let the collator join the rows of a batch."""
        args, collator = self.args, self.data_collator
        if not isinstance(collator, DataCollatorForVPiT):
            raise ValueError("packing and padding_free need a DataCollatorForVPiT: leave out data_collator.")
        if args.packing and collator.max_length is None:
            raise ValueError("packing=True needs the length of a row: set max_length.")
        language_model = self.metamorph.model.language_model
        check_packable(language_model, not (self.is_fsdp_enabled or self.is_deepspeed_enabled))
        # Flash attention tells conversations apart in one row only; others would compute the square of its length.
        is_flash = "flash" in language_model.config._attn_implementation
        collator.padding_free = args.padding_free or is_flash
        if args.packing:
            with args.main_process_first(desc="measuring conversations"):  # the others read its cache
                self.train_dataset = pack_dataset(self.train_dataset, collator, args.packing_strategy)
        if args.packing and self._num_samples is not None:
            self.accelerator.print(
                f"{self._num_samples} conversations are packed in {len(self.train_dataset)} rows of at most "
                f"{collator.max_length} tokens. Batch sizes count rows."
            )

    def _check_options(self) -> None:
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and parallelism.non_data_parallel_size > 1:
            raise ValueError("VPiTTrainer supports data parallelism (DDP, FSDP, DeepSpeed ZeRO) only.")
        if self.args.on_nonfinite_loss == "skip" and self.is_deepspeed_enabled:
            raise ValueError("on_nonfinite_loss='skip' is not supported with DeepSpeed: use 'raise'.")
        if isinstance(self.train_dataset, datasets.IterableDataset):
            for name in ("eval_strategy", "save_strategy", "logging_strategy"):
                if getattr(self.args, name) == "epoch":
                    raise ValueError(f"{name}='epoch' is set, but a stream has no epochs: use 'steps'.")
        groups = stages.group_parameters(self.metamorph)
        for name in MODULE_LEARNING_RATES:
            module = name.removesuffix("_learning_rate")
            if getattr(self.args, name) is not None and not any(p.requires_grad for p in groups[module]):
                raise ValueError(
                    f"{name} is set, but nothing of that module is trained: leave it out, or name {module} in the "
                    "peft_config's modules_to_save."
                )
        if self.args.vision_tower_learning_rate is not None and self._has_visual_tokens:
            raise ValueError("vision_tower_learning_rate is set, but the tower does not run on `visual_tokens`.")

    @property
    def metamorph(self) -> MetaMorphForConditionalGeneration:
        """The model itself, without the wrappers of PEFT and accelerate."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """See [`~transformers.Trainer.create_optimizer`]. Its parameter groups are split by learning rate."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        modules = {p: name for name, parameters in stages.group_parameters(self.metamorph).items() for p in parameters}
        groups, optimizer.param_groups = optimizer.param_groups, []
        for group in groups:
            split = defaultdict(list)
            for parameter in group["params"]:
                # In stage 1, weight decay would change the embeddings of all other tokens.
                is_decayed = self.args.stage == "full" or modules[parameter] != "embeddings"
                rate = stages.get_learning_rate(modules[parameter], self.args)
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
        if resume_from_checkpoint:
            if problems := find_problems(Path(resume_from_checkpoint)):
                raise ValueError(f"{resume_from_checkpoint} is not a complete checkpoint: {', '.join(problems)}.")
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
            if state.global_step >= max_steps:
                return self._load_finished(resume_from_checkpoint, state)
            self.accelerator.print(f"Resuming from {resume_from_checkpoint}.")
        only_rows = self.args.stage == "projector"
        rows = stages.only_image_token_embeddings(self.metamorph) if only_rows else contextlib.nullcontext()
        with rows:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self._sums["train"]:  # The last steps may not have been logged.
            self._pop_metrics("train")
        return result

    def _load_finished(self, checkpoint: str, state: TrainerState) -> TrainOutput:
        """Load the model of a run that is already finished, and say so."""
        sentence = f"{checkpoint} has all {state.global_step} steps: this run is already finished."
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(f"{sentence} Raise max_steps or num_train_epochs to train on.")
        self.accelerator.print(sentence)
        is_best = self.args.load_best_model_at_end and state.best_model_checkpoint is not None
        checkpoint = state.best_model_checkpoint if is_best else checkpoint
        self._load_from_checkpoint(checkpoint)
        self.state = state
        losses = [log["loss"] for log in state.log_history if "loss" in log]
        return TrainOutput(state.global_step, sum(losses) / max(len(losses), 1), {})

    def get_train_dataloader(self) -> DataLoader:
        """See [`~transformers.Trainer.get_train_dataloader`]. A stream begins again when it ends."""
        dataset = self.train_dataset
        if isinstance(dataset, datasets.IterableDataset):
            # Trainer would begin it again only after a step with fewer batches, and loses count when it resumes.
            self.train_dataset = dataset.repeat(None)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = dataset

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """
        See [`~transformers.Trainer.get_batch_samples`]. The second value is a tensor of shape (2,), the text and
        visual label counts of the optimization step over all processes, or None without batches.
        """
        self.step_start = time.monotonic()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        labels = torch.cat([batch["labels"][:, 1:].flatten() for batch in batches]).to(device)
        num_visual = (labels == self.metamorph.config.image_token_id).sum()
        return batches, self.accelerator.reduce(torch.stack([(labels != -100).sum() - num_visual, num_visual]))

    def compute_loss(
        self, model, inputs, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ):
        """See [`~transformers.Trainer.compute_loss`]; `num_items_in_batch` comes from [`get_batch_samples`]."""
        inputs = self._add_missing_images(inputs)
        sample_ids, tasks, rejected = (inputs.pop(name, []) for name in ("sample_ids", "tasks", "rejected"))
        # The losses compute the logits they need; others are needed for `outputs` alone.
        kwargs = {"num_items_in_batch": num_items_in_batch, "logits_to_keep": 0 if return_outputs else 1}
        if self.aux_loss_enabled:  # as SFTTrainer finds out
            kwargs["output_router_logits"] = True
        outputs = model(**inputs, **kwargs, use_cache=False, measure_text=measure_text)
        loss, config = outputs.text_loss, self.metamorph.config
        if self.visual_loss_weight:
            loss = loss + self.visual_loss_weight * outputs.visual_loss
        losses = torch.stack([part.detach() for part in (loss, outputs.text_loss, outputs.visual_loss)])
        by_task = (tasks, sum_by_sample(inputs, outputs, len(tasks), config.image_token_id) if tasks else None)
        self._unchecked_losses.append((losses, sample_ids, by_task))

        sums, is_finite = self._sums["train" if self.model.training else "eval"], torch.isfinite(loss)
        measures = measure_batch(inputs, outputs, num_items_in_batch, len(sample_ids), config)
        for name, value in measures.items():
            sums[name] += torch.where(is_finite, value.float(), 0)
        sums["samples"] += len(sample_ids)
        self._record_rejected(rejected, sums)

        loss = torch.where(is_finite, loss, 0)  # Logged losses are means over the other batches.
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # Data parallelism averages gradients over processes.
        if self.aux_loss_enabled:  # a mean over the batch, which is averaged over processes and accumulation steps
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            aux_loss = torch.where(is_finite, outputs.aux_loss, 0)
            loss = loss + self.router_aux_loss_coef * aux_loss / steps
            sums["aux_loss"] += aux_loss.detach()
            sums["batches"] += is_finite
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

    def _record_rejected(self, rejected: list[dict[str, str]], sums: dict[str, Any]) -> None:
        """Count samples that the collator skipped or shortened, and append them to the list of this process."""
        for sample in rejected:
            sums[f"{sample['kind']}_samples"] += 1
            path = Path(self.args.output_dir) / f"rejected_samples-{self.accelerator.process_index}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")

    def has_nonfinite_loss(self) -> bool:
        """
        Return whether a loss since the last call was NaN or infinite; during training, on any process. Checking them
        together waits for the device once instead of once per batch.

        Raises:
            ValueError: if there was one and `on_nonfinite_loss` is `"raise"`.
        """
        unchecked, self._unchecked_losses = self._unchecked_losses, []
        num_nonfinite = sum((~losses[0].isfinite()).long() for losses, *_ in unchecked)
        if self.model.training:
            num_nonfinite = self.accelerator.reduce(num_nonfinite)
        is_finite = bool(num_nonfinite == 0)
        for losses, sample_ids, (tasks, sums) in unchecked:
            loss, text_loss, visual_loss = (0.0, 0.0, 0.0) if is_finite else losses.tolist()
            if math.isfinite(loss):
                for task, values in zip(tasks, [] if sums is None else sums.T.double().cpu().numpy()):
                    self._task_sums["train" if self.model.training else "eval"][task] += values
                continue
            step = self.state.global_step
            where = f"Step {step + 1}" if self.model.training else f"Evaluation after step {step}"
            sentence = (
                f"{where}, process {self.accelerator.process_index}: text_loss is "
                f"{text_loss}, visual_loss is {visual_loss}. Samples of the batch: {', '.join(map(str, sample_ids))}."
            )
            if self.args.on_nonfinite_loss == "raise":
                raise ValueError(f"{sentence} Inspect them, lower the learning rate, or set on_nonfinite_loss='skip'.")
            done = "optimization step is skipped" if self.model.training else "batch is left out of the evaluation"
            logger.warning(f"{sentence} This {done}.", main_process_only=False)
        return not is_finite

    def get_eval_dataloader(self, eval_dataset: Dataset | str | None = None) -> DataLoader:
        """See [`~transformers.Trainer.get_eval_dataloader`]. Every sample is in one batch of one process only."""
        if self.args.world_size == 1:
            return super().get_eval_dataloader(eval_dataset)
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        # accelerate would fill up the last batches with other samples, which would be counted twice.
        multiple, collate = self.args.eval_batch_size * self.args.world_size, self.data_collator
        if has_length(eval_dataset):
            padded = ConcatDataset([eval_dataset, [None] * (-len(eval_dataset) % multiple)])
        else:
            padded = _PaddedStream(eval_dataset, multiple)
        self.data_collator = functools.partial(_collate_samples, collate)
        try:
            return super().get_eval_dataloader(padded)
        finally:
            self.data_collator = collate

    get_test_dataloader = get_eval_dataloader  # of `predict`

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, *args, **kwargs):
        """See [`~transformers.Trainer.evaluation_loop`]."""
        if self.args.world_size > 1 and not (prediction_loss_only or self.args.prediction_loss_only):
            raise ValueError(
                "Predictions cannot be gathered from several processes, whose last batches differ in size: call "
                "`predict`, or evaluate with `compute_metrics`, in one process, or set prediction_loss_only=True."
            )
        self._sums["eval"].clear()  # `predict` leaves sums that are not logged.
        self._task_sums["eval"].clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, *args, **kwargs)
        self.has_nonfinite_loss()
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See [`~transformers.Trainer.log`]. Adds the metrics that the class lists."""
        mode = "train" if self.model.training else "eval"
        loss_name = "loss" if mode == "train" else next((name for name in logs if name.endswith("_loss")), "loss")
        if loss_name in logs and self._sums[mode]:
            metrics = self._pop_metrics(mode)
            if mode == "train":
                metrics["images_per_second"] = metrics["num_images"] / self.seconds
                self.seconds = 0.0
            else:  # Trainer's eval_loss is a mean over batches, whatever they hold.
                visual_loss = metrics.get("visual_loss", 0.0)
                metrics["loss"] = metrics.get("text_loss", 0.0) + self.visual_loss_weight * visual_loss
                metrics["loss"] += self.router_aux_loss_coef * metrics.get("aux_loss", 0.0)
            logs.update({loss_name.removesuffix("loss") + name: value for name, value in metrics.items()})
        super().log(logs, start_time)

    def _pop_metrics(self, mode: str) -> dict[str, float]:
        """Return means and counts over all processes since the last call, which they must make together."""
        totals = self._reduce_sums(mode, (*MEANS, *COUNTS, *RUN_COUNTS, "batches"))
        self._sums[mode].clear()
        metrics = {name: totals[name] / totals[count] for name, count in MEANS.items() if totals[count]}
        metrics |= {name: round(totals[name]) for name in COUNTS}
        metrics |= average_by_task(gather_object([dict(self._task_sums[mode])]))
        self._task_sums[mode].clear()
        counts = Counter({name: round(totals[name]) for name in RUN_COUNTS})
        if mode == "train":
            self.totals.update(counts)
            counts, skipped = self.totals, self.totals["skipped_samples"]
            # Relative to a whole epoch, or to a thousand samples of a stream: one sample early on is a large share.
            expected = self._num_samples or 1000
            if skipped > self.args.max_bad_share * max(counts["samples"] + skipped, expected):
                raise ValueError(
                    f"{skipped} of {counts['samples'] + skipped} samples were skipped, a larger share than "
                    f"max_bad_share={self.args.max_bad_share:g}. {self.args.output_dir}/rejected_samples-*.jsonl "
                    "gives the reasons: correct the data, or raise max_bad_share."
                )
        named = ("skipped_samples", "shortened_samples", "skipped_steps")
        metrics |= {name: counts[name] for name in named if counts[name]}
        return {**metrics, "num_tokens": self.totals["num_tokens"]}

    def _reduce_sums(self, mode: str, names: tuple[str, ...]) -> dict[str, float]:
        sums, device = self._sums[mode], self.accelerator.device
        local = torch.stack([torch.as_tensor(sums[name], dtype=torch.float, device=device) for name in names])
        return dict(zip(names, self.accelerator.reduce(local).tolist()))

    # Overridden since all processes run it just before the main one saves the state and deletes older checkpoints.
    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        unlogged = {name: round(total) for name, total in self._reduce_sums("train", RUN_COUNTS).items()}
        totals = dict(self.totals + Counter(unlogged))
        self.state.stateful_callbacks["VPiTTrainer"] = {"args": {}, "attributes": {"totals": totals}}
        self.accelerator.wait_for_everyone()

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Write the model's card with the facts of its training to `README.md` in `output_dir`. Its name is
        `hub_model_id`, or else `model_name`, or else that of the folder. Checkpoints and `push_to_hub` call this, too.
        """
        if not self.is_world_process_zero():
            return
        args, base = self.args, self.metamorph.config._name_or_path
        name = args.hub_model_id or model_name or Path(args.output_dir).name
        tags = [tags] if isinstance(tags, str) else tags or []
        card = create_model_card(self.metamorph.config, name, [*self._tag_names, *tags])
        last_log = next((log for log in reversed(self.state.log_history) if "loss" in log), {})
        facts = {
            "base model": Path(base).name if Path(base).exists() else base,  # Paths of this machine mean nothing.
            "stage": args.stage,
            "data": dataset_name or "not recorded",
            "adapter": self.model.active_peft_config.peft_type.value if isinstance(self.model, PeftModel) else "none",
            "steps": self.state.global_step,
            "batch (over all devices and accumulation steps)": args.total_train_batch_size,
            "peak learning rate": f"{args.learning_rate:.3g}",
            "visual loss weight": self.visual_loss_weight,
            **{f"last {name}": f"{last_log[name]:.4f}" for name in ("loss", *MEANS) if name in last_log},
            "metamorph_hf": __version__,
        }
        rows = "".join(f"| {fact} | {value} |\n" for fact, value in facts.items())
        card.text += f"\n\n## Training facts\n\n| | |\n|---|---|\n{rows}"
        card.save(Path(args.output_dir) / "README.md")
