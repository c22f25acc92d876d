"""Measure the emoji model: print one JSON object and write a contact sheet.

    python examples/evaluate_emoji.py                       # half an hour on 2 CPU cores
    python examples/evaluate_emoji.py --limit 100           # fewer questions of each kind

Retrieval ranks an answer among the base images of all emoji (for edits, among Google's skin-tone variants) by the
cosine of their flattened visual tokens. Byte-identical images, such as the flags of Norway and Svalbard,
cannot be told apart and count as one. An answer without an image counts as wrong. Scenes are judged by `SceneJudge`,
which is not the model; `judge_*` are the shares that it finds right in real scenes.
"""

import argparse
import json
import random
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from common import EMOJI_CHECKPOINT, load_pipeline
from emoji.images import IMAGE_SIZE, draw_image, draw_images, draw_things, load_rows
from emoji.scenes import Scene, SceneJudge, draw_scene
from emoji.tasks import DEFAULT_PHRASING, TONES, EmojiTasks, user_turn
from evaluation import MAX_WORDS, draw_contact_sheet, generate_answers, rank_references
from tqdm import tqdm
from transformers import DynamicCache
from transformers.image_transforms import to_pil_image

from metamorph_hf import MetaMorphPipeline


BATCH_SIZE = 64
BORDER = 8  # pixels between the borders of the autoencoder's patches
REAL_IMAGES = 200  # images that are decoded from their real visual tokens
SECOND_TURNS = 200  # conversations of two turns, of each kind
REAL_SCENES = 200  # scenes that the judge itself is measured on
AT_ONCE = {"force_image": True, "max_images": 1}  # an image without words before it
EVERYDAY_PROMPTS = Path(__file__).parent / "emoji" / "everyday_prompts.yaml"
SHOWN_PROMPTS, SHOWN_SCENES = 24, 6  # cells of the contact sheet; of scenes, for each kind


def add_images(record: dict, tasks: EmojiTasks) -> list[dict]:
    """Return the record's messages with its images in place of their numbers."""
    (turn,), images = record["messages"], iter(record["images"])
    content = [
        {"type": "image", "image": to_pil_image(draw_image(tasks, next(images)).numpy())}
        if part["type"] == "image"
        else part
        for part in turn["content"]
    ]
    return [{**turn, "content": content}]


def answer_records(
    pipe: MetaMorphPipeline, records: list[dict], tasks: EmojiTasks, progress: str, **options
) -> tuple[list[str], torch.Tensor]:
    """Answer records of `tasks` by `generate_answers`."""
    conversations = [add_images(record, tasks) for record in records]
    return generate_answers(pipe.model, pipe.processor, conversations, progress, **options)


@torch.no_grad()
def continue_conversations(
    pipe: MetaMorphPipeline, prompts: list[str], questions: list[str], keep_cache: bool
) -> tuple[list[str], torch.Tensor]:
    """Ask for an image, then ask a question about it.

    Args:
        keep_cache: Continue from the cache, where a parallel model has read its image as queries. Otherwise the whole
            conversation is read again, with the image's visual tokens.

    Returns:
        The texts of the second answers, and the visual tokens (prompts, N, V) of their images; zeros without one.
    """
    config, tokenizer, texts = pipe.model.config, pipe.processor.tokenizer, [""] * len(prompts)
    generated = torch.zeros(len(prompts), config.num_image_tokens, config.visual_token_dim)
    options = {"do_sample": False, "return_dict_in_generate": True}
    image_alone = {"max_new_tokens": config.num_image_tokens + 2, "force_image": True}

    def write(messages: list[list[dict]]) -> dict[str, torch.Tensor]:
        chats = pipe.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        chats = [chat.replace(pipe.processor.image_token, pipe.processor.replace_image_token()) for chat in chats]
        return tokenizer(chats, add_special_tokens=False, padding=True, return_tensors="pt")

    # Rows of one batch have the same question, so that their first answers keep their places.
    order = sorted(range(len(prompts)), key=lambda index: questions[index])
    groups = [[*group] for _, group in groupby(order, key=lambda index: questions[index])]
    batches = [group[start : start + BATCH_SIZE] for group in groups for start in range(0, len(group), BATCH_SIZE)]
    for batch in tqdm(batches, desc="second turns"):
        turns, cache = [[user_turn([], prompts[index])] for index in batch], DynamicCache(config=config.text_config)
        first = pipe.model.generate(**write(turns), **options, **image_alone, cache=cache)
        answer = {"role": "assistant", "content": [{"type": "image"}]}
        inputs = write([[*turn, answer, user_turn([], questions[index])] for turn, index in zip(turns, batch)])
        length = cache.get_seq_length()
        if not inputs["input_ids"][:, :length].equal(first.sequences[:, :length]):
            raise ValueError("The chat template writes the first answer otherwise than the model did.")
        if keep_cache:
            inputs["cache"] = cache
        else:
            inputs["visual_tokens"] = [images[:1] for images in first.visual_tokens]
        second = pipe.model.generate(**inputs, **options, max_new_tokens=config.num_image_tokens + 2 + MAX_WORDS)
        answers = pipe.processor.decode_generated(second.sequences[:, inputs["input_ids"].shape[1] :])
        for index, text, images in zip(batch, answers, second.visual_tokens):
            texts[index], generated[index] = text, images[0] if len(images) else 0
    return texts, generated


@torch.no_grad()
def encode(pipe: MetaMorphPipeline, pixels: torch.Tensor) -> torch.Tensor:
    """Encode uint8 pixels (I, 3, height, width), resized to what the model reads, into visual tokens (I, N, V)."""
    inputs = [pipe.processor.image_processor(images=[*b], return_tensors="pt") for b in pixels.split(BATCH_SIZE)]
    return torch.cat([pipe.model.get_visual_tokens(batch["pixel_values"]).float() for batch in inputs])


def encode_images(pipe: MetaMorphPipeline, tasks: EmojiTasks, numbers: Sequence[int]) -> torch.Tensor:
    """Draw images and encode them into visual tokens (I, N, V)."""
    starts = tqdm(range(0, len(numbers), BATCH_SIZE), desc="drawing and encoding images")
    return torch.cat([encode(pipe, draw_images(tasks, numbers[start : start + BATCH_SIZE])) for start in starts])


def decode(pipe: MetaMorphPipeline, visual_tokens: torch.Tensor) -> torch.Tensor:
    """Decode visual tokens (I, N, V) into uint8 pixels (I, 3, height, width)."""
    generator = torch.Generator().manual_seed(0)
    batches = tqdm(visual_tokens.split(BATCH_SIZE), desc="decoding images")
    images = [pipe.decode_visual_tokens(batch, generator=generator, output_type="pt") for batch in batches]
    return (255 * torch.cat(images)).round().byte()


def resize(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Resize uint8 pixels (I, 3, height, width) to (I, 3, size, size)."""
    return F.interpolate(pixels.float(), size=(size, size), mode="area").round().byte()


def measure_psnr(images: torch.Tensor, references: torch.Tensor) -> float:
    """Return the mean peak signal-to-noise ratio, in dB, of uint8 images (I, 3, height, width)."""
    error = (images.float() - references.float()).square().flatten(1).mean(1).clamp(min=1e-3)
    return (10 * (255**2 / error).log10()).mean().item()


def measure_borders(images: torch.Tensor) -> float:
    """Return how large steps across the borders of patches are, relative to those elsewhere."""
    steps = [images.float().diff(dim=dim).abs().transpose(dim, 1).flatten(2).mean((0, 2)) for dim in (2, 3)]
    at_border = torch.arange(1, images.shape[-1]) % BORDER == 0
    return (sum(s[at_border].mean() for s in steps) / sum(s[~at_border].mean() for s in steps)).item()


def measure_sharpness(images: torch.Tensor) -> float:
    """Return the mean absolute Laplacian of uint8 images (I, 3, height, width)."""
    laplacian = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).expand(3, 1, 3, 3)
    return F.conv2d(images.float(), laplacian, groups=3).abs().mean().item()


def average(verdicts: list[dict[str, bool]]) -> dict[str, float]:
    """Return the share in percent of each verdict, over the images that were judged by it."""
    names = dict.fromkeys(name for verdict in verdicts for name in verdict)
    return {
        name: 100 * sum(v[name] for v in verdicts if name in v) / sum(name in v for v in verdicts) for name in names
    }


def judge_scene(judge: SceneJudge, image: torch.Tensor, scene: Scene) -> dict[str, bool]:
    """Judge an image by what the prompt asks for, which is a number only if there are several equal things."""
    verdict = judge.judge(image, scene)
    return {name: is_right for name, is_right in verdict.items() if name != "count" or len(scene.things) > 1}


class Evaluation:
    """The questions to a pipeline and the real images. Each method in `ALL` returns numbers by name.

    Args:
        pipe (`MetaMorphPipeline`): The pipeline to measure.
        limit (`int`, *optional*): Maximum number of questions of each kind.

    Attributes:
        cells (`list`): Caption, generated image and real image of the contact sheet's cells, uint8 (3, size, size);
            None for an answer without an image.
    """

    def __init__(self, pipe: MetaMorphPipeline, limit: int | None):
        self.pipe, self.limit, self.rng, self.cells = pipe, limit, random.Random(0), []
        self.tasks = EmojiTasks(load_rows())
        self.rows, self.bases = self.tasks.rows, self.tasks.bases
        self.variants = [i for i, row in enumerate(self.rows) if row["style"] == "google" and row["skin_tone"]]
        images = [*self.bases, *self.variants]
        self.visual_tokens = dict(zip(images, encode_images(pipe, self.tasks, images), strict=True))

    def choose(self, items: Sequence) -> list:
        """Choose at most `limit` items at random."""
        return [*items] if self.limit is None else self.rng.sample(items, min(self.limit, len(items)))

    def answer(self, kind: str) -> tuple[list[dict], list[str], torch.Tensor]:
        records = self.choose(self.tasks.evaluation(kind))
        return records, *answer_records(self.pipe, records, self.tasks, progress=kind)

    def rank(self, generated: torch.Tensor, answers: list[list[int]], candidates: list[int]) -> torch.Tensor:
        """Return the rank of the best of each record's right answers; the last one for an answer without an image."""
        place = {image: index for index, image in enumerate(candidates)}
        owners = [number for number, right in enumerate(answers) for _ in right]
        targets = torch.tensor([place[image] for right in answers for image in right])
        references = torch.stack([self.visual_tokens[image] for image in candidates])
        ranks = rank_references(generated[owners], references, targets)
        best = torch.full((len(answers),), len(candidates))
        return best.scatter_reduce(0, torch.tensor(owners), ranks, "amin")

    def share(self, generated: torch.Tensor, answers: list[list[int]], candidates: list[int], top: int = 1) -> float:
        """Return the share, in percent, of the records one of whose right answers is among the `top` nearest."""
        return 100 * (self.rank(generated, answers, candidates) < top).float().mean().item()

    def show(self, text: str, generated: torch.Tensor, decoded: torch.Tensor, real: torch.Tensor) -> None:
        self.cells.append((text, decoded if generated.any() else None, real))

    def measure_everyday_prompts(self) -> dict[str, float]:
        prompts = self.choose([*yaml.safe_load(EVERYDAY_PROMPTS.read_text(encoding="utf-8")).items()])
        by_name = {self.rows[image]["name"]: image for image in self.bases}
        answers = [[by_name[name] for name in names.split("|")] for _, names in prompts]
        questions = [DEFAULT_PHRASING.replace("{}", prompt) for prompt, _ in prompts]
        records = [{"messages": [user_turn([], question)], "images": []} for question in questions]
        _, generated = answer_records(self.pipe, records, self.tasks, progress="everyday prompts")
        decoded = decode(self.pipe, generated)
        for i in self.rng.sample(range(len(prompts)), min(SHOWN_PROMPTS, len(prompts))):
            self.show(prompts[i][0], generated[i], decoded[i], draw_image(self.tasks, answers[i][0]))
        _, at_once = answer_records(self.pipe, records, self.tasks, "images at once", **AT_ONCE)
        results = {"everyday_top1": self.share(generated, answers, self.bases)}
        return results | {"everyday_at_once_top1": self.share(at_once, answers, self.bases)}

    def measure_words(self) -> dict[str, float]:
        records, _, generated = self.answer("held_out_keywords")
        answers = [record["answer"] for record in records]
        results = {"held_out_keywords_top5": self.share(generated, answers, self.bases, top=5)}
        _, at_once = answer_records(self.pipe, records, self.tasks, "images at once", **AT_ONCE)
        results["held_out_keywords_at_once_top5"] = self.share(at_once, answers, self.bases, top=5)
        for kind in ("seen_phrasings", "unseen_phrasings"):
            records, _, generated = self.answer(kind)
            answers = [[record["answer"]] for record in records]
            for top in (1, 5):
                results[f"{kind}_top{top}"] = self.share(generated, answers, self.bases, top)
        _, at_once = answer_records(self.pipe, records, self.tasks, "images at once", **AT_ONCE)
        results["unseen_phrasings_at_once_top1"] = self.share(at_once, answers, self.bases)
        decoded = decode(self.pipe, generated)
        results["decoded_and_encoded_again_top1"] = self.share(encode(self.pipe, decoded), answers, self.bases)
        real = resize(draw_images(self.tasks, [image for (image,) in answers]), decoded.shape[-1])
        results["sharpness_of_generated"] = measure_sharpness(decoded) / measure_sharpness(real)
        return results

    def measure_decoding(self) -> dict[str, float]:
        """Decode images from their real visual tokens."""
        trained = self.rng.sample(self.bases, REAL_IMAGES)
        held_out = [self.tasks.index["twitter", base, ""] for base in sorted(self.tasks.held_out_images)]
        results = {}
        for name, images in (("trained", trained), ("held_out", held_out)):
            pixels = draw_images(self.tasks, images[: self.limit])
            again = decode(self.pipe, encode(self.pipe, pixels))
            real = resize(pixels, again.shape[-1])
            results[f"psnr_{name}"] = measure_psnr(again, real)
            results[f"borders_{name}"] = measure_borders(again)
            results[f"borders_{name}_real"] = measure_borders(real)
            results[f"sharpness_{name}"] = measure_sharpness(again) / measure_sharpness(real)
        return results

    def measure_questions(self) -> dict[str, float]:
        results = {}
        for kind in ("name_google", "name_twitter_held_out", "category_twitter_held_out"):
            records, texts, _ = self.answer(kind)
            results[kind] = 100 * sum(t == record["answer"] for t, record in zip(texts, records)) / len(records)
        return results

    def measure_edits(self) -> dict[str, float]:
        results = {}
        for kind, candidates in (("edit_held_out", self.variants), ("sequence_held_out", self.bases)):
            records, _, generated = self.answer(kind)
            results[f"{kind}_top1"] = self.share(generated, [[record["answer"]] for record in records], candidates)
            text, real = records[0]["messages"][0]["content"][-1]["text"], records[0]["answer"]
            self.show(text, generated[0], decode(self.pipe, generated[:1])[0], draw_image(self.tasks, real))
        return results

    def measure_second_turns(self) -> dict[str, float]:
        """Ask about an image that the model has generated itself, with and without the cache."""
        named = self.choose(self.rng.sample(self.bases, min(SECOND_TURNS, len(self.bases))))
        toned = [i for i in self.variants if self.rows[i]["skin_tone"] in TONES]
        toned = self.choose(self.rng.sample(toned, min(SECOND_TURNS, len(toned))))
        prompts = [DEFAULT_PHRASING.replace("{}", self.rows[image]["name"]) for image in [*named, *toned]]
        questions = ["What is this?"] * len(named)
        questions += [f"Make the skin tone {self.rows[image]['skin_tone']}." for image in toned]
        results = {}
        for way, keep_cache in (("from_cache", True), ("read_again", False)):
            texts, generated = continue_conversations(self.pipe, prompts, questions, keep_cache)
            right = [text == self.rows[image]["name"] for text, image in zip(texts, named)]
            results[f"second_turn_name_{way}"] = 100 * sum(right) / len(right)
            edits = self.share(generated[len(named) :], [[image] for image in toned], self.variants)
            results[f"second_turn_edit_{way}"] = edits
        return results

    def measure_scenes(self) -> dict[str, float]:
        things = draw_things(self.tasks)
        judge = SceneJudge(things)
        real = random.Random(7).sample(self.tasks.scenes, min(REAL_SCENES, self.limit or REAL_SCENES))
        verdicts = [
            judge_scene(judge, draw_scene(scene, things), scene) for scene in tqdm(real, "judging real scenes")
        ]
        results = {f"judge_{name}": value for name, value in average(verdicts).items()}
        verdicts = []
        for kind in ("scene_color", "scene_count", "scene_pair", "scene_binding"):
            records, _, generated = self.answer(kind)
            decoded = resize(decode(self.pipe, generated), IMAGE_SIZE)
            for number, (record, tokens, image) in enumerate(zip(records, generated, decoded)):
                scene, has_image = record["answer"], bool(tokens.any())
                verdicts.append({name: v and has_image for name, v in judge_scene(judge, image, scene).items()})
                if number < SHOWN_SCENES:
                    text = record["messages"][0]["content"][-1]["text"]
                    text = text.removeprefix(DEFAULT_PHRASING.partition("{}")[0]).rstrip(".")
                    self.show(text, tokens, image, draw_scene(scene, things))
        return results | {f"scene_{name}": value for name, value in average(verdicts).items()}

    ALL = (
        measure_everyday_prompts,
        measure_words,
        measure_decoding,
        measure_questions,
        measure_edits,
        measure_second_turns,
        measure_scenes,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=EMOJI_CHECKPOINT, help="a MetaMorphPipeline folder")
    sheet = EMOJI_CHECKPOINT.with_name("contact_sheet.png")
    parser.add_argument(
        "--sheet", type=Path, default=sheet, help="file for the contact sheet (default: that in emoji/)"
    )
    parser.add_argument("--limit", type=int, help="maximum number of questions of each kind (default: all)")
    args = parser.parse_args()
    pipe = load_pipeline(args.checkpoint, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    evaluation, results = Evaluation(pipe, args.limit), {}
    for measure in Evaluation.ALL:
        results |= measure(evaluation)
    cells = [(text, *(x if x is None else to_pil_image(x.numpy()) for x in pair)) for text, *pair in evaluation.cells]
    draw_contact_sheet(cells, size=76).save(args.sheet)
    print(json.dumps({name: round(value, 2) for name, value in results.items()}, indent=2))


if __name__ == "__main__":
    main()
