"""Train the tiny model in one or two processes and save weights and logs; launched by test_distributed.py."""

import json
import math
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType, PartialState
from datasets import IterableDataset
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback


sys.path.append(str(Path(__file__).parent))
import conftest  # noqa: E402
from helpers import EXAMPLES, arguments, dataset_of, examples_with_nan, losses  # noqa: E402

from metamorph_hf import VPiTTrainer  # noqa: E402


class Kill(TrainerCallback):
    """Kill the last process between the gradients and the update of step 4."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


class BreakGradient(TrainerCallback):
    """Put a NaN in a gradient of the last process, after all processes have shared theirs, in step 2."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == 1 and args.process_index == args.world_size - 1:
            next(p.grad for p in model.parameters() if p.grad is not None).view(-1)[0] = math.nan


def run(
    output: Path,
    kill: str | None = None,
    resume: bool = False,
    fsdp: bool = False,
    zero: int | None = None,
    tied: bool = False,
    nan: bool = False,
    nan_gradient: bool = False,
    stream: bool = False,
    parallel: bool = False,
    **options,
) -> None:
    """
    Train, and save the model to `output`/final and the losses to `output`/logs.json.

    Args:
        kill: "step" kills the last process in step 4, "save" while it saves step 4.
        zero: DeepSpeed's stage.
        nan: One sample has a NaN loss.
        nan_gradient: One process has a NaN gradient.
        stream: The dataset is read while training.
        parallel: The model decodes images in parallel.
        options: Options of the configuration.
    """
    processor = conftest.tiny_processor.__wrapped__(conftest.tiny_tokenizer.__wrapped__())
    make_config = conftest.tiny_config.__wrapped__(processor.tokenizer)
    decoding = "parallel" if parallel else "autoregressive"
    model = conftest.tiny_model.__wrapped__(make_config)(tie_word_embeddings=tied, visual_decoding=decoding)
    if fsdp:
        # Layers of both towers are sharded, so a process whose batch has no image must still run them.
        layers = ["LlamaDecoderLayer", "SiglipEncoderLayer"]
        options |= {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": layers}}
    if zero is not None:
        options["deepspeed"] = {
            "zero_optimization": {"stage": zero, "stage3_gather_16bit_weights_on_model_save": True},
            "zero_allow_untested_optimizer": True,  # SGD
            "zero_force_ds_cpu_optimizer": False,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
        }
    args = arguments(output, save_strategy="steps", save_steps=2, max_grad_norm=1.0, **options)
    if fsdp:
        # accelerate shards on accelerators only; with this it takes the same path for CPU processes.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    examples = [{**example, "task": f"task {index % 3}"} for index, example in enumerate(EXAMPLES)]
    examples = examples_with_nan() if nan else examples
    dataset = IterableDataset.from_generator(partial(iter, examples)) if stream else dataset_of(examples)
    callbacks = [Kill()] * (kill == "step") + [BreakGradient()] * nan_gradient
    options = {"processing_class": processor, "callbacks": callbacks}
    trainer = VPiTTrainer(model, args, train_dataset=dataset, **options)
    if kill == "save":
        save_model = trainer.save_model

        def save_and_die(*args, **kwargs):  # before optimizer and random states
            save_model(*args, **kwargs)
            if trainer.state.global_step == 4 and trainer.args.process_index == trainer.args.world_size - 1:
                os.kill(os.getpid(), signal.SIGKILL)

        trainer.save_model = save_and_die
    trainer.train(resume_from_checkpoint=resume)
    assert fsdp == any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    logs = {"skipped_steps": trainer.totals["skipped_steps"]}
    if not nan:  # Logs leave out the NaN batch of one process, which a single process has in a larger batch.
        # Five samples do not divide by any batch.
        few = IterableDataset.from_generator(partial(iter, examples[:5])) if stream else dataset.select(range(5))
        evaluated = trainer.evaluate(few)
        if trainer.args.world_size > 1:
            with pytest.raises(ValueError, match="Predictions cannot be gathered from several processes"):
                trainer.predict(few)
        logs |= {"losses": losses(trainer)}
        last_log = [log for log in trainer.state.log_history if "loss" in log][-1]
        logs |= {name: value for name, value in {**last_log, **evaluated}.items() if "/" in name}  # of tasks
        logs |= {name: evaluated[f"eval_{name}"] for name in ("loss", "num_images", "num_text_labels")}
    trainer.save_model(output / "final")
    if trainer.is_world_process_zero():
        (output / "logs.json").write_text(json.dumps(logs))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in json.loads(sys.argv[1]):
        run(**{**case, "output": Path(case["output"])})
    # gloo's threads may still be busy with the last collective. At the usual end of a process they then abort it, also
    # after `destroy_process_group`, and the launcher kills the other process while it saves.
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)
