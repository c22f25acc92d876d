"""Measure training against a plain twin, and check that gradients do not depend on how a batch is cut.

    python examples/benchmark_training.py            # about three minutes and 5 GB of memory on 2 CPU cores

All weights are random. The twin is the same model, trained as one would write it down: logits of all positions in
float32, cross-entropy over them with -100 where no text label is, the vision head at all positions. Ratios are of
things timed in this process, in turns; the middle one of `--repeats` times counts. A step is forward and backward,
into gradients that exist. Its memory is what torch allocates at the peak: beyond weights and gradients, and with them.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from benchmark import Timer, build_model
from datasets import Dataset
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from metamorph_hf import MetaMorphForConditionalGeneration, MetaMorphProcessor, VPiTConfig, VPiTTrainer


EMOJI = Path(__file__).parent / "emoji"
Batch = dict[str, torch.Tensor]


def make_batch(model: MetaMorphForConditionalGeneration, rows: list[tuple[int, int, int]], seed: int = 0) -> Batch:
    """Rows of (text tokens, images in the question, images in the answer), right-padded; the last quarter of the text
    and the answer's images are targets. Images are given as visual tokens."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    ids, labels, images = [], [], 0
    for text, asked, drawn in rows:
        words = torch.randint(config.image_start_token_id, (text,), generator=generator)
        image = torch.full((config.num_image_tokens,), config.image_token_id)
        start, end = torch.tensor([config.image_start_token_id]), torch.tensor([config.image_end_token_id])
        answer = torch.cat([words[-(text // 4) :], *[torch.cat([start, image, end])] * drawn])
        question = torch.cat([*[torch.cat([start, image, end])] * asked, words[: -(text // 4)]])
        ids.append(torch.cat([question, answer]))
        labels.append(torch.cat([torch.full_like(question, -100), answer]))
        images += asked + drawn
    shape = (images, config.num_image_tokens, config.visual_token_dim)
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
        "visual_tokens": F.normalize(torch.randn(shape, generator=generator), dim=-1),
    }


def twin_loss(model: MetaMorphForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """Both losses, as one would write them down."""
    hidden_states = model.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], visual_tokens=batch["visual_tokens"]
    ).last_hidden_state
    labels, image_token_id = batch["labels"], model.config.image_token_id
    is_visual = labels == image_token_id
    logits = model.lm_head(hidden_states).float()
    text_labels = labels.masked_fill(is_visual, -100)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), text_labels[:, 1:].flatten())
    if is_visual.any():
        predictions = F.normalize(model.vision_head(hidden_states), dim=-1)[:, :-1]
        targets = torch.zeros_like(predictions)
        is_image = batch["input_ids"][:, 1:] == image_token_id
        targets[is_image] = batch["visual_tokens"].flatten(0, 1)
        cosine = (predictions * targets).sum(-1)
        loss = loss - cosine[is_visual[:, 1:]].mean()
    return loss


def step(model: MetaMorphForConditionalGeneration, loss_of, batch: Batch) -> float:
    loss = loss_of(model, batch)
    loss.backward()
    return loss.item()


def peak_bytes(run) -> int:
    """The most memory that torch has allocated on the CPU while `run` runs, over what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def one_step_gradients(batch_size: int, folder: str) -> torch.Tensor:
    """What one step of `VPiTTrainer` over eight emoji conversations with 0 to 4 images takes from the weights."""
    from emoji.emoji_images import load_images
    from emoji.emoji_tasks import EmojiTasks

    rows, pixels = load_images()
    tasks, rng = EmojiTasks(rows), random.Random(0)
    records = [tasks.sample(task, rng) for task in ("sequence", "name", "text_to_image", "edit", "yes_no", "thinking")]
    text = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}], "images": []}
    pictures = pixels.permute(0, 2, 3, 1).numpy()
    examples = [
        {"messages": record["messages"], "images": [Image.fromarray(pictures[image]) for image in record["images"]]}
        for record in (*records, text, tasks.sample("category", rng))
    ]
    processes = PartialState(cpu=True).num_processes
    args = VPiTConfig(
        folder,
        max_steps=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=len(examples) // batch_size // processes,
        train_sampling_strategy="sequential",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="sgd",
        max_grad_norm=0.0,
        gradient_checkpointing=False,
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
    dataset = Dataset.from_dict({"place": range(len(examples))}).with_transform(
        lambda columns: {key: [examples[place][key] for place in columns["place"]] for key in ("messages", "images")}
    )
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    VPiTTrainer(model, args, processing_class=processor, train_dataset=dataset).train()
    return before - torch.cat([p.detach().flatten() for p in model.parameters()])


def two_process_gradients(folder: str) -> torch.Tensor:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", __file__]
    subprocess.run([*launcher, "--gradients-to", folder], check=True, capture_output=True)
    return torch.load(Path(folder) / "gradients.pt", weights_only=True)


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / one.norm()).item()


def measure(args: argparse.Namespace) -> dict[str, float]:
    timer, results = Timer("cpu", args.repeats), {}
    torch.manual_seed(0)

    model = build_model(args).train()
    model.model.vision_tower.requires_grad_(False)
    text = args.tokens - args.visual_tokens - 2  # a quarter of all is targets, half of them visual
    batch = make_batch(model, [(text, 0, 1)])
    ours, twin = lambda: step(model, our_loss, batch), lambda: step(model, twin_loss, batch)
    # They differ by the placeholder's share of probability alone, which the twin does not take away.
    results["loss, ours - twin's"] = ours() - twin()
    seconds = timer(ours, twin)
    results["step, ours, s"], results["step, twin, s"] = seconds
    results["step, ours / twin (at most 0.6)"] = seconds[0] / seconds[1]
    held = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    held_bytes = sum(t.numel() * t.element_size() for t in held)
    for checkpointing, name in ((False, ""), (True, ", gradient checkpointing")):
        if checkpointing:
            model.gradient_checkpointing_enable()
        peaks = [peak_bytes(run) for run in (ours, twin)]
        results[f"memory beyond weights and gradients{name}, ours, MB"] = peaks[0] / 1e6
        results[f"memory beyond weights and gradients{name}, twin, MB"] = peaks[1] / 1e6
        results[f"memory beyond them{name}, ours / twin (at most 0.5)"] = peaks[0] / peaks[1]
        results[f"memory with them{name}, ours / twin"] = (held_bytes + peaks[0]) / (held_bytes + peaks[1])
    model.gradient_checkpointing_disable()

    batch = make_batch(model, [(192, 2, 2)])
    pixels = torch.randn(4, 3, 224, 224)
    with_tower = {**batch, "pixel_values": pixels}
    del with_tower["visual_tokens"]
    seconds = timer(lambda: step(model, our_loss, batch), lambda: step(model, our_loss, with_tower))
    results["step, 4 images, precomputed visual tokens / with the tower"] = seconds[0] / seconds[1]

    with tempfile.TemporaryDirectory() as folder:
        whole = one_step_gradients(8, folder)
        for batch_size in (4, 2, 1):
            name = f"gradients, 1 x 8 against {8 // batch_size} x {batch_size} (at most 1e-5)"
            results[name] = relative_difference(whole, one_step_gradients(batch_size, folder))
        name = "gradients, one process against two (at most 1e-5)"
        results[name] = relative_difference(whole, two_process_gradients(folder))
    return results


def our_loss(model: MetaMorphForConditionalGeneration, batch: Batch) -> torch.Tensor:
    return model(**batch, use_cache=False).loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="width of the language model (default: 512)")
    parser.add_argument("--layers", type=int, default=8, help="its layers (default: 8)")
    parser.add_argument("--vocabulary", type=int, default=128_256, help="its vocabulary (default: 128256)")
    parser.add_argument("--tokens", type=int, default=512, help="of the conversation that is timed (default: 512)")
    parser.add_argument("--visual-tokens", type=int, default=64, help="per image (default: 64)")
    parser.add_argument("--tower-hidden", type=int, default=768, help="width of the vision tower (default: 768)")
    parser.add_argument("--tower-layers", type=int, default=12, help="its layers (default: 12)")
    parser.add_argument("--repeats", type=int, default=3, help="times each thing is timed (default: 3)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--gradients-to", help=argparse.SUPPRESS)  # for the two processes that it launches
    args = parser.parse_args()
    args.device, args.dtype = "cpu", "float32"
    if args.gradients_to is not None:
        gradients = one_step_gradients(1, args.gradients_to)
        if PartialState().is_main_process:
            torch.save(gradients, Path(args.gradients_to) / "gradients.pt")
        PartialState().destroy_process_group()  # a process that ends while it runs may abort
        return

    results = measure(args)
    for name, value in results.items():
        print(f"{name:<74} {value:10.3g}")
    measured = {"settings": {k: str(v) for k, v in vars(args).items()}, "results": results}
    print(json.dumps(measured))
    if args.json is not None:
        args.json.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
