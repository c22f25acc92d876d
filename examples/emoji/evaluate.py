"""Measure the emoji model: prints one JSON object and writes a contact sheet.

    python examples/emoji/evaluate.py                       # five to ten minutes on 2 CPU cores
    python examples/emoji/evaluate.py --limit 100           # fewer questions of each kind

Retrieval ranks an answer among all base Google pictures (or, for edits, all of Google's skin-tone variants) by the
cosine of their flattened visual tokens. Pictures that are identical to the byte, as the flags of Norway and Svalbard,
cannot be told apart and count as one.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from emoji_pictures import encode_pictures, load_pictures
from emoji_tasks import EmojiTasks
from PIL import Image
from tqdm import tqdm
from transformers.image_transforms import to_pil_image

from metamorph_hf import MetaMorphForConditionalGeneration, MetaMorphPipeline, MetaMorphProcessor


HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
from evaluate_generation import contact_sheet, rank_among  # noqa: E402


MAX_NEW_TOKENS = 24


@torch.no_grad()
def answer(
    model: MetaMorphForConditionalGeneration,
    processor: MetaMorphProcessor,
    records: list[dict],
    visual_tokens: torch.Tensor | None = None,
    batch_size: int = 128,
    progress: str | None = None,
) -> tuple[list[str], list[torch.Tensor]]:
    """
    Answer each record greedily.

    Args:
        visual_tokens: (pictures, N, V), where the records' pictures are looked up.

    Returns:
        The answers' texts, and their pictures as visual tokens, (pictures, N, V) each.
    """
    tokenizer, texts, drawn = processor.tokenizer, [], []
    starts = range(0, len(records), batch_size)
    for start in tqdm(starts, desc=progress, disable=progress is None):
        batch = records[start : start + batch_size]
        prompts = processor.apply_chat_template(
            [record["messages"] for record in batch], tokenize=False, add_generation_prompt=True
        )
        prompts = [prompt.replace(processor.image_token, processor.replace_image_token()) for prompt in prompts]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=False)
        pictures = [picture for record in batch for picture in record["images"]]
        output = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            visual_tokens=visual_tokens[pictures].to(model.dtype) if pictures else None,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
        )
        texts += processor.decode_generated(output.sequences[:, inputs.input_ids.shape[1] :])
        drawn += output.visual_tokens
    return texts, drawn


def draw(model, processor, records, visual_tokens=None, progress=None) -> torch.Tensor:
    """First picture of each answer, (records, N, V) in float32; zeros where the answer has none."""
    _, drawn = answer(model, processor, records, visual_tokens, progress=progress)
    shape = (model.config.num_image_tokens, model.config.visual_token_dim)
    return torch.stack([pictures[0].float() if len(pictures) else torch.zeros(shape) for pictures in drawn])


def rank_of_answer(
    drawn: torch.Tensor, records: list[dict], candidates: torch.Tensor, candidate_ids: list[int]
) -> torch.Tensor:
    """
    How many candidates are nearer to what was drawn than the right picture is; 0 is best.

    Args:
        drawn: (records, N, V).
        candidates: (candidates, N, V), the visual tokens of the pictures `candidate_ids`.

    Returns:
        (records,) int64. An answer without a picture ranks last.
    """
    place = {picture: index for index, picture in enumerate(candidate_ids)}
    right = torch.tensor([place[record["answer"]] for record in records])
    ranks = rank_among(drawn, candidates, right)
    return ranks.where(drawn.flatten(1).any(1), len(candidate_ids))


def share(hits: torch.Tensor | list[bool]) -> float:
    return round(100 * torch.as_tensor(hits).float().mean().item(), 1)


def to_pixels(images: list[Image.Image], size: int = 64) -> torch.Tensor:
    """PIL images to uint8 (I, 3, size, size)."""
    resized = [image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC) for image in images]
    data = torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in resized])
    return data.view(-1, size, size, 3).permute(0, 3, 1, 2)


def paint(pipe: MetaMorphPipeline, visual_tokens: torch.Tensor, batch_size: int = 128) -> list[Image.Image]:
    pipe.set_progress_bar_config(disable=True)
    generator, images = torch.Generator().manual_seed(0), []
    for batch in tqdm(visual_tokens.split(batch_size), desc="painting"):
        images += pipe.decode_visual_tokens(batch, generator=generator)
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint", help="a MetaMorphPipeline folder")
    parser.add_argument("--sheet", type=Path, default=HERE / "contact_sheet.png", help="where the contact sheet goes")
    parser.add_argument("--limit", type=int, help="at most this many questions of each kind")
    args = parser.parse_args()
    if not (args.checkpoint / "model_index.json").is_file():
        sys.exit(f"{args.checkpoint} is no pipeline folder: it has no model_index.json. Train one with train.py.")

    pipe = MetaMorphPipeline.from_pretrained(args.checkpoint, dtype=torch.float32)
    model, processor = pipe.model, pipe.processor
    rows, pixels = load_pictures()
    pixels = pixels[: len(rows)]
    tasks = EmojiTasks(rows)
    visual_tokens = encode_pictures(model, pixels)
    bases = tasks.google
    variants = [i for i, row in enumerate(rows) if row["vendor"] == "google" and row["skin_tone"]]

    def questions(kind: str) -> list[dict]:
        records = tasks.evaluation(kind)
        return records if args.limit is None else random.Random(0).sample(records, min(args.limit, len(records)))

    def retrieve(kind: str, candidate_ids: list[int]) -> tuple[list[dict], torch.Tensor, torch.Tensor]:
        records = questions(kind)
        drawn = draw(model, processor, records, visual_tokens, progress=kind)
        return records, drawn, rank_of_answer(drawn, records, visual_tokens[candidate_ids], candidate_ids)

    def exact(kind: str) -> float:
        records = questions(kind)
        texts, _ = answer(model, processor, records, visual_tokens, progress=kind)
        return share([text == record["answer"] for text, record in zip(texts, records, strict=True)])

    results = {}
    records, drawn, ranks = retrieve("seen_phrasings", bases)
    results["seen_phrasings_top1"], results["seen_phrasings_top5"] = share(ranks < 1), share(ranks < 5)
    painted = paint(pipe, drawn)
    encoded = encode_pictures(model, to_pixels(painted))
    results["painted_and_encoded_again_top1"] = share(
        rank_of_answer(encoded, records, visual_tokens[bases], bases) < 1
    )
    real = bases[::10]  # what the visualizer alone can do
    encoded = encode_pictures(model, to_pixels(paint(pipe, visual_tokens[real])))
    ranks = rank_of_answer(encoded, [{"answer": picture} for picture in real], visual_tokens[bases], bases)
    results["painted_from_real_tokens_top1"] = share(ranks < 1)
    _, _, ranks = retrieve("unseen_phrasings", bases)
    results["unseen_phrasings_top1"], results["unseen_phrasings_top5"] = share(ranks < 1), share(ranks < 5)
    for kind in ("name_google", "name_twitter_held_out", "category_twitter_held_out"):
        results[kind] = exact(kind)
    _, _, ranks = retrieve("edit_held_out", variants)
    results["edit_held_out_top1"] = share(ranks < 1)
    _, _, ranks = retrieve("sequence_held_out", bases)
    results["sequence_held_out_top1"] = share(ranks < 1)

    shown = random.Random(2).sample(range(len(records)), min(36, len(records)))
    cells = [
        (
            records[i]["messages"][0]["content"][-1]["text"],
            painted[i],
            to_pil_image(pixels[records[i]["answer"]].numpy()),
        )
        for i in shown
    ]
    contact_sheet(cells).save(args.sheet)

    generate = HERE.parent / "generate.py"
    started = time.perf_counter()
    command = [sys.executable, str(generate), "a red apple", "--model", str(args.checkpoint)]
    subprocess.run([*command, "--out", str(args.sheet.with_name("red_apple.png"))], check=True, stdout=sys.stderr)
    results["generate_seconds"] = round(time.perf_counter() - started, 1)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
