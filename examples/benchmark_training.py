"""Measure training against a plain twin, and check that gradients do not depend on how a batch is divided.

    python examples/benchmark_training.py            # about six minutes and 5 GB of memory on 2 CPU cores
    python examples/benchmark_training.py --parts packing collator trainer

All weights are random. The twin is the same model, trained in the simplest way: float32 logits of all positions, the
cross-entropy over them with -100 where there is no text label, and the vision head at all positions. Times are medians
of `--repeats` alternating runs in this process. A step is a forward and a backward pass that adds to the gradients of
an earlier one. Its memory is the peak of torch's allocations, beyond weights and gradients and including them.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from benchmark import Timer, build_model
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from metamorph_hf import MetaMorphForConditionalGeneration, MetaMorphProcessor, VPiTConfig, VPiTTrainer
from metamorph_hf.data.mixture import load_mixture
from metamorph_hf.image_reading import read_image
from metamorph_hf.vpit.collator import DataCollatorForVPiT
from metamorph_hf.vpit.packing import pack_lengths
from metamorph_hf.vpit.text_loss import measure_text


EMOJI = Path(__file__).parent / "emoji"
Batch = dict[str, torch.Tensor]
BATCHES = 4  # of each kind that packing is timed with, since how much of a batch is padding varies


def make_batch(model: MetaMorphForConditionalGeneration, text: int, asked: int, answered: int) -> Batch:
    """Return a conversation of `text` text tokens, `asked` images in the question and `answered` ones in the answer.
    The last quarter of the text and the answer's images are targets. Images are given as visual tokens."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    words = torch.randint(config.image_start_token_id, (text,), generator=generator)
    image = torch.full((config.num_image_tokens + 2,), config.image_token_id)
    image[0], image[-1] = config.image_start_token_id, config.image_end_token_id
    question = torch.cat([*[image] * asked, words[: -(text // 4)]])
    answer = torch.cat([words[-(text // 4) :], *[image] * answered])
    input_ids = torch.cat([question, answer]).unsqueeze(0)
    shape = (asked + answered, config.num_image_tokens, config.visual_token_dim)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": torch.cat([torch.full_like(question, -100), answer]).unsqueeze(0),
        "visual_tokens": F.normalize(torch.randn(shape, generator=generator), dim=-1),
    }


def twin_loss(model: MetaMorphForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """Return the sum of both losses, computed in the simplest way."""
    hidden_states = model.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], visual_tokens=batch["visual_tokens"]
    ).last_hidden_state
    image_token_id = model.config.image_token_id
    is_visual = batch["labels"] == image_token_id
    text_labels = batch["labels"].masked_fill(is_visual, -100)
    logits = model.lm_head(hidden_states).float()
    text_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), text_labels[:, 1:].flatten())
    predictions = F.normalize(model.vision_head(hidden_states), dim=-1)[:, :-1]
    targets = torch.zeros_like(predictions)
    targets[batch["input_ids"][:, 1:] == image_token_id] = batch["visual_tokens"].flatten(0, 1)
    return text_loss - (predictions * targets).sum(-1)[is_visual[:, 1:]].mean()


def our_loss(model: MetaMorphForConditionalGeneration, batch: Batch) -> torch.Tensor:
    return model(**batch, use_cache=False, measure_text=measure_text).loss  # as the trainer calls it


def step(model: MetaMorphForConditionalGeneration, batch: Batch, compute_loss: Callable = our_loss) -> float:
    loss = compute_loss(model, batch)
    loss.backward()
    return loss.item()


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return the peak of what torch allocates on the CPU during `run`, beyond what was allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def one_step_gradients(batch_size: int, folder: str) -> torch.Tensor:
    """Return the change of the weights in one `VPiTTrainer` step on eight emoji conversations with 0 to 4 images."""
    from emoji.images import draw_image, load_rows
    from emoji.tasks import EmojiTasks

    tasks, rng = EmojiTasks(load_rows()), random.Random(0)
    names = ("sequence", "name", "text_to_image", "edit_tone", "yes_no", "thinking", "category")
    text = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}], "images": []}
    examples = [text, *(tasks.sample(name, rng) for name in names)]

    def read(columns: dict[str, list]) -> dict[str, list]:
        chosen = [examples[index] for index in columns["index"]]
        images = [[draw_image(tasks, number) for number in example["images"]] for example in chosen]
        return {"messages": [example["messages"] for example in chosen], "images": images}

    args = VPiTConfig(
        folder,
        max_steps=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=len(examples) // batch_size // PartialState(cpu=True).num_processes,
        train_sampling_strategy="sequential",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="sgd",
        max_grad_norm=0.0,
        activation_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = MetaMorphForConditionalGeneration.from_pretrained(EMOJI / "checkpoint" / "model", dtype="float32")
    model.config.visual_token_noise = 0.0
    processor = MetaMorphProcessor.from_pretrained(EMOJI / "checkpoint" / "processor")
    dataset = Dataset.from_dict({"index": range(len(examples))}).with_transform(read)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    VPiTTrainer(model, args, processing_class=processor, train_dataset=dataset).train()
    return before - torch.cat([p.detach().flatten() for p in model.parameters()])


def measure_steps(args: argparse.Namespace) -> dict[str, float]:
    """Return times and memory of a step, ours and the twin's."""
    timer, results = Timer("cpu", args.repeats), {}
    torch.manual_seed(0)
    model = build_model(args, "autoregressive").train()
    model.model.vision_tower.requires_grad_(False)
    batch = make_batch(model, args.tokens - args.visual_tokens - 2, 0, 1)  # a quarter of all tokens are targets
    ours, twin = partial(step, model, batch), partial(step, model, batch, twin_loss)
    # They differ only by the probability of the placeholder token, which ours excludes.
    results["loss, ours - twin's"] = ours() - twin()
    seconds = timer(ours, twin)
    results["step, ours / twin (at most 0.6)"] = seconds[0] / seconds[1]
    held = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    held_bytes = sum(t.numel() * t.element_size() for t in held)
    for name in ("", ", gradient checkpointing"):
        if name:
            model.gradient_checkpointing_enable()
        peaks = [peak_bytes(run) for run in (ours, twin)]
        results[f"memory beyond weights and gradients{name}, ours / twin (at most 0.5)"] = peaks[0] / peaks[1]
        results[f"memory with them{name}, ours / twin"] = (held_bytes + peaks[0]) / (held_bytes + peaks[1])
    model.gradient_checkpointing_disable()

    batch = make_batch(model, 192, 2, 2)
    with_tower = {**batch, "pixel_values": torch.randn(4, 3, 224, 224)}
    del with_tower["visual_tokens"]
    seconds = timer(partial(step, model, batch), partial(step, model, with_tower))
    return results | {"step, 4 images, precomputed visual tokens / with the tower": seconds[0] / seconds[1]}


class CpuTimer(Timer):
    """Measures the CPU time of this process, which other processes disturb less."""

    def time(self, run: Callable[[], Any]) -> float:
        start = time.process_time()
        run()
        return time.process_time() - start


def make_conversations(count: int, shape: tuple[int, int], tokens: tuple[int, int] = (60, 600)) -> list[dict]:
    """Return conversations of about `tokens` tokens, uniformly: short ones answer with an image, longer ones are about
    one, with an answer of a quarter of the words. Images are visual tokens of `shape`."""
    rng, conversations = random.Random(0), []
    for _ in range(count):
        image, words = [{"type": "image"}], rng.randint(*tokens) - shape[0] - 6
        texts = ("a" + " apple" * (words - words // 4), "a" + " apple" * (words // 4))
        parts = [[{"type": "text", "text": text}] for text in texts]
        parts = [parts[0], parts[1] + image] if words < 90 else [image + parts[0], parts[1]]
        messages = [{"role": role, "content": part} for role, part in zip(("user", "assistant"), parts)]
        conversations.append({"messages": messages, "visual_tokens": [torch.randn(shape)]})
    return conversations


def measure_packing(args: argparse.Namespace) -> dict[str, float]:
    """Return the speed of the same conversations, packed and padded, and the shares of padding."""
    torch.manual_seed(0)
    model, emoji = build_model(args, "autoregressive").train(), EMOJI / "checkpoint" / "processor"
    processor = MetaMorphProcessor.from_pretrained(emoji, num_image_tokens=args.visual_tokens)
    model.model.vision_tower.requires_grad_(False)
    for name in ("image_token_id", "image_start_token_id", "image_end_token_id"):
        setattr(model.config, name, getattr(processor, name))
    collate = DataCollatorForVPiT(processor, args.row)
    conversations = make_conversations(1000, (args.visual_tokens, model.config.visual_token_dim))
    lengths = collate.measure(conversations)
    padded = sum(max(lengths[i : i + args.batch]) * args.batch for i in range(0, 1000 - args.batch + 1, args.batch))
    results = {
        f"length of conversations, {name}": value for name, value in (("min", min(lengths)), ("max", max(lengths)))
    }
    results["share of padding, padded batches"] = 1 - sum(lengths[: 1000 // args.batch * args.batch]) / padded
    rows = pack_lengths(lengths, args.row)
    results["share of padding, packed (at most 0.03)"] = 1 - sum(lengths) / (len(rows) * args.row)
    random.Random(0).shuffle(rows)
    rows_at_once = round(args.batch * len(rows) / len(lengths))  # about as many conversations as a padded batch
    chosen = rows[: BATCHES * rows_at_once], range(BATCHES * args.batch)
    tokens = sum(lengths[i] for row in chosen[0] for i in row), sum(lengths[i] for i in chosen[1])
    packed = [{"conversations": [conversations[i] for i in row]} for row in chosen[0]]
    padded = [conversations[i] for i in chosen[1]]

    def train(batches: list[Batch]) -> None:
        for batch in batches:
            step(model, batch)

    batches = [
        [collate(samples[first : first + size]) for first in range(0, len(samples), size)]
        for samples, size in ((packed, rows_at_once), (padded, args.batch))
    ]
    seconds = CpuTimer("cpu", args.repeats)(*(partial(train, each) for each in batches))
    speeds = [count / elapsed for count, elapsed in zip(tokens, seconds)]
    return results | {"real tokens per second, packed / padded (at least 1.6)": speeds[0] / speeds[1]}


def load_emoji(folder: str, count: int) -> Dataset:
    """Write `count` emoji of 64 pixels as PNG files in a parquet file, and load them as captioned images."""
    from emoji.images import load_rows, render_png

    file = f"{folder}/emoji-{count}.parquet"
    rows = [{"image": {"bytes": render_png(row["svg"], 64)}, "caption": row["name"]} for row in load_rows()[:count]]
    Dataset.from_list(rows).to_parquet(file)
    return load_mixture([{"path": "parquet", "data_files": file, "task": "text_to_image"}])


def measure_collator(args: argparse.Namespace, folder: str) -> dict[str, float]:
    """Return the collator's time on emoji of 64 pixels, beyond that of decoding and resizing them."""
    processor = MetaMorphProcessor.from_pretrained(EMOJI / "checkpoint" / "processor")
    dataset = load_emoji(folder, 256)
    batches = [[dataset[index] for index in range(start, start + 16)] for start in range(0, 256, 16)]
    collate = DataCollatorForVPiT(processor)

    def decode() -> None:
        for batch in batches:
            processor.image_processor([read_image(row["images"][0]) for row in batch], return_tensors="pt")

    def collate_all() -> None:
        for batch in batches:
            collate(batch)

    times = CpuTimer("cpu", 10 * args.repeats)(decode, collate_all)
    return {"collator, beyond decoding and resizing / these (at most 0.3)": times[1] / times[0] - 1}


class StepTimes(TrainerCallback):
    """Record when each optimization step ends."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.process_time())


def measure_trainer(args: argparse.Namespace, folder: str, steps: int = 12) -> dict[str, float]:
    """Return the speed of the trainer's steps, and that of a loop of the same model, optimizer and data loader."""
    processor = MetaMorphProcessor.from_pretrained(EMOJI / "checkpoint" / "processor")
    dataset = load_emoji(folder, 16 * steps)
    options = {"max_steps": steps, "per_device_train_batch_size": 16, "train_sampling_strategy": "sequential"}
    options |= {"learning_rate": 1e-4, "gradient_checkpointing": False, "bf16": False, "use_cpu": True}
    options |= {"dataloader_pin_memory": False, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    config = VPiTConfig(folder, logging_steps=10, optim="adamw_torch", **options)
    trainer_seconds, loop_seconds = [], []
    for _ in range(args.repeats):
        model = MetaMorphForConditionalGeneration.from_pretrained(EMOJI / "checkpoint" / "model", dtype="float32")
        times = StepTimes()
        trainer = VPiTTrainer(model, config, processing_class=processor, train_dataset=dataset, callbacks=[times])
        trainer.train()
        trainer_seconds += [end - start for start, end in zip(times.ends[1:], times.ends[2:])]
        optimizer = torch.optim.AdamW(trainer.optimizer.param_groups, fused=trainer.optimizer.defaults.get("fused"))
        ends = []
        for batch in DataLoader(dataset, 16, collate_fn=trainer.data_collator):
            our_loss(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            ends.append(time.process_time())
        loop_seconds += [end - start for start, end in zip(ends[1:], ends[2:])]
    speed = statistics.median(loop_seconds) / statistics.median(trainer_seconds)
    return {"steps per second, trainer / a bare loop (at least 0.95)": speed}


def compare_gradients(folder: str) -> dict[str, float]:
    """Return the relative differences of gradients of a whole batch and of a divided one."""
    whole = one_step_gradients(8, folder)
    divided = {f"1 x 8 against {8 // size} x {size}": one_step_gradients(size, folder) for size in (4, 2, 1)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", __file__]
    subprocess.run([*launcher, "--gradients-to", folder], check=True, capture_output=True)
    divided["one process against two"] = torch.load(Path(folder) / "gradients.pt", weights_only=True)
    return {
        f"gradients, {name} (at most 1e-5)": ((whole - gradients).norm() / whole.norm()).item()
        for name, gradients in divided.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default, help_text in (
        ("--hidden", 512, "width of the language model"),
        ("--layers", 8, "layers of the language model"),
        ("--vocabulary", 128_256, "vocabulary of the language model"),
        ("--tokens", 512, "length of the timed conversation"),
        ("--batch", 16, "conversations of a padded batch"),
        ("--row", 640, "tokens of a packed row"),
        ("--repeats", 3, "timed runs of each step"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{help_text} (default: {default})")
    parts = ("steps", "packing", "collator", "trainer", "gradients")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to measure (default: all)")
    parser.add_argument("--gradients-to", help=argparse.SUPPRESS)  # set for the two processes that this one launches
    parser.set_defaults(device="cpu", dtype="float32", visual_tokens=64, tower_hidden=768, tower_layers=12)
    args = parser.parse_args()
    if args.gradients_to is not None:
        gradients = one_step_gradients(1, args.gradients_to)
        if PartialState().is_main_process:
            torch.save(gradients, Path(args.gradients_to) / "gradients.pt")
        PartialState().destroy_process_group()  # Exiting without this may abort the process.
        return

    with tempfile.TemporaryDirectory() as folder:
        measures = {
            "steps": partial(measure_steps, args),
            "packing": partial(measure_packing, args),
            "collator": partial(measure_collator, args, folder),
            "trainer": partial(measure_trainer, args, folder),
            "gradients": partial(compare_gradients, folder),
        }
        results = {}
        for part in args.parts:
            results |= measures[part]()
    for name, value in results.items():
        print(f"{name:<86} {value:10.3g}")
    print(json.dumps({"settings": vars(args), "results": results}))


if __name__ == "__main__":
    main()
