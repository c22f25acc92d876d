"""Run by test_distributed.py in one or two processes: trains the tiny model and saves what became of it."""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from datasets import IterableDataset
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback


sys.path.append(str(Path(__file__).parent))
import conftest  # noqa: E402
from helpers import EXAMPLES, arguments, build_trainer, examples_with_nan, losses  # noqa: E402


class Kill(TrainerCallback):
    """SIGKILL for the last process, with the gradients of step 4 computed and no update made."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def run(
    output: Path,
    kill: str | None = None,
    resume: bool = False,
    fsdp: bool = False,
    zero: int | None = None,
    tied: bool = False,
    nan: bool = False,
    stream: bool = False,
    **options,
) -> None:
    """
    Trains into `output`/final and logs.json. `kill` is "step" (the fourth) or "save" (of step 4, before its end),
    `zero` DeepSpeed's stage; `nan` gives a sample without a finite loss, `stream` a dataset that is read while
    training. `options` are the trainer's.
    """
    processor = conftest.tiny_processor.__wrapped__(conftest.tiny_tokenizer.__wrapped__())
    make_config = conftest.tiny_config.__wrapped__(processor.tokenizer)
    model = conftest.tiny_model.__wrapped__(make_config)(tie_word_embeddings=tied, visual_token_noise=0.0)
    if fsdp:
        # Both towers' layers are sharded: a process whose batch has no image must still take part.
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
        # accelerate shards on accelerators alone; this has it take the same path for CPU processes.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    examples = examples_with_nan() if nan else EXAMPLES
    trainer = build_trainer(model, processor, args, examples, callbacks=[Kill()] if kill == "step" else [])
    if kill == "save":
        save_rng_state = trainer._save_rng_state

        def die(output_dir):
            if trainer.state.global_step == 4 and args.process_index == args.world_size - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            save_rng_state(output_dir)

        trainer._save_rng_state = die
    dataset = trainer.train_dataset
    if stream:
        trainer.train_dataset = IterableDataset.from_generator(partial(iter, EXAMPLES))
    trainer.train(resume_from_checkpoint=resume)
    assert fsdp == any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    logs = {"skipped_steps": trainer.totals["skipped_steps"]}
    if not nan:  # of a step that is skipped only finite parts are logged; in evaluation NaN stops the run
        logs |= {"losses": losses(trainer), "eval_loss": trainer.evaluate(dataset)["eval_loss"]}
    trainer.save_model(output / "final")
    if trainer.is_world_process_zero():
        (output / "logs.json").write_text(json.dumps(logs))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in json.loads(sys.argv[1]):
        run(**{**case, "output": Path(case["output"])})
    PartialState().destroy_process_group()  # a process that ends while it runs may abort
