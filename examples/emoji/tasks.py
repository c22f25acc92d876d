"""Conversations for the small emoji model, built from the rows of `emoji.parquet`.

An image is known by its number: a row's index, then the training scenes, then the center crops of Google's base emoji.
`EmojiTasks.sample` gives training records, and `EmojiTasks.evaluation` lists the held-out ones. Training never sees

- the sentences of `HELD_OUT_PHRASINGS`, alone or inside a longer text_to_image prompt;
- a tenth of CLDR's keywords, as or in the subject of a prompt for an image;
- Twitter's images of 200 emoji, in any question or edit;
- 100 pairs of emoji and skin tone, in any style, in any task;
- forward sequences that begin at one of 2 moon phases and 6 clock faces, in any style;
- a tenth of the combinations of things in scenes.

All wordings come from the grammar in `words.yaml`.
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import yaml
from datasets import Dataset

from .scenes import MEANINGS, NUMBERS, RELATIONS, THINGS, Scene, sample_scene
from .words import EmojiWords, add_article, indefinite_article, make_plural


HELD_OUT_PHRASINGS = ("Could you sketch {} for me?", "I want to see {}.", "Let's have a picture with {} in it.")
DEFAULT_PHRASING = "Generate an image of {}."

UNDERSTANDING = {"name": 0.5, "category": 0.15, "yes_no": 0.15, "scene_question": 0.2}
MIXTURE = {"text_to_image": 0.36, "style": 0.07, "scene": 0.15, "edit_tone": 0.06, "edit_style": 0.04}
MIXTURE |= {"sequence": 0.05, "name": 0.09, "category": 0.03, "yes_no": 0.02, "scene_question": 0.05}
MIXTURE |= {"thinking": 0.01, "reconstruction": 0.01, "meaning": 0.04, "gloss": 0.02}
# Stage 2 also has many requests of whose images a part is predicted.
REQUESTS = {"text_to_image": 0.82, "style": 0.07, "scene": 0.11}

STYLES = ("google", "twitter", "microsoft", "firefox")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
CYCLES = {
    "moon": tuple(f"{0x1F311 + i:X}" for i in range(8)),
    "clock": tuple(f"{start + hour:X}" for hour in range(12) for start in (0x1F550, 0x1F55C)),
}
HELD_OUT_STARTS = {"moon": 2, "clock": 6}
HELD_OUT_IMAGES = 200
HELD_OUT_PAIRS = 100
SCENES = 6000  # training scenes that are drawn
SCENE_PROMPTS = 100  # held-out ones of each kind
CORPUS_CONVERSATIONS = 20_000

WORDS = yaml.safe_load((Path(__file__).parent / "words.yaml").read_text(encoding="utf-8"))
GRAMMAR = {symbol: [text.strip() for text in alternatives.split("|")] for symbol, alternatives in WORDS.items()}


def expand(symbol: str, rng: random.Random, **values: str) -> str:
    """Return a random sentence of `GRAMMAR[symbol]`; `values` replace symbols that the grammar leaves open."""
    text = rng.choice(GRAMMAR[symbol])
    return re.sub(r"<(\w+)>", lambda match: values.get(match[1]) or expand(match[1], rng), text)


def normalize(text: str) -> str:
    """Keep lower-case words and `{}` only, so that wordings compare equal whatever their punctuation."""
    return " ".join(re.sub(r"[^\w{} ]", "", text.lower()).split())


def is_held_out(phrasing: str) -> bool:
    """Return whether `phrasing` contains a held-out phrasing, with or without an article before its subject."""
    words = re.sub(r"\b(?:a|an|the|some) {}", "{}", normalize(phrasing))
    return any(f" {normalize(held_out)} " in f" {words} " for held_out in HELD_OUT_PHRASINGS)


def sample_request(rng: random.Random) -> str:
    """Return a training wording of "generate {}": often the default one, never a held-out one."""
    if rng.random() < 0.15:
        return DEFAULT_PHRASING
    while True:
        text = re.sub(r"\s+([,.?!:])", r"\1", " ".join(expand("prompt", rng).split()))
        noisy = restyle(disturb(text, rng), rng)
        if not is_held_out(text) and not is_held_out(noisy):
            return noisy


def disturb(text: str, rng: random.Random) -> str:
    """Sometimes drop a word or add a random one, so that the model finds the subject in any surroundings."""
    words = text.split()
    kind = rng.random()
    removable = [i for i, word in enumerate(words) if "{}" not in word]
    if kind < 0.06 and removable:
        del words[rng.choice(removable)]
    elif 0.06 <= kind < 0.12:
        # Before or after the sentence, where a stray word cannot pass for a part of the subject.
        words.insert(rng.choice((0, len(words))), expand("word", rng))
    return " ".join(words)


def restyle(text: str, rng: random.Random) -> str:
    """Vary capitals and final punctuation at random."""
    kind = rng.random()
    if kind < 0.6:
        text = re.sub(r"(^|[.?!] )([a-z])", lambda match: match[1] + match[2].upper(), text)
    elif kind < 0.63:
        text = text.upper()
    elif kind < 0.8:
        text = text.lower()
    kind = rng.random()
    if kind < 0.12:
        text = text.rstrip(".?!")
    elif kind < 0.17 and text[-1] == ".":
        text = text[:-1] + "!"
    return text


def user_turn(images: Sequence[int], question: str) -> dict:
    return {"role": "user", "content": [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]}


def conversation(task: str, images: Sequence[int], question: str, answer: Sequence[int | str]) -> dict:
    """Build a training record: images and a question, answered by images (numbers) and texts."""
    reply = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in answer]
    return {
        "messages": [user_turn(images, question), {"role": "assistant", "content": reply}],
        "images": [*images, *(part for part in answer if not isinstance(part, str))],
        "task": task,
    }


def describe_scene(scene: Scene, rng: random.Random) -> str:
    """Describe a scene in words, as a prompt does: "two bananas on a blue background"."""
    first = scene.things[0]
    if len(scene.things) == 1:
        text = add_article(first, rng)
    elif not scene.is_pair:
        text = f"{NUMBERS[len(scene.things)]} {make_plural(first)}"
    else:
        first, second = (f"{indefinite_article(thing)} {thing}" for thing in scene.things)
        # "a cat and a dog" stand side by side, the first one on the left.
        joint = "and" if scene.relation == "left" and rng.random() < 0.4 else RELATIONS[scene.relation]
        text = f"{first} {joint} {second}"
    if scene.color != "white" or len(scene.things) == 1 or rng.random() < 0.1:
        text = f"{text} {expand('background', rng, color=scene.color)}"
    return text.replace(" a orange", " an orange")


def caption_scene(scene: Scene) -> str:
    """Name what a scene shows, always in the same words: "two bananas, blue background"."""
    first = scene.things[0]
    if scene.is_pair:
        first = f"{first} {RELATIONS[scene.relation]} {scene.things[1]}"
    elif len(scene.things) > 1:
        first = f"{NUMBERS[len(scene.things)]} {make_plural(first)}"
    return f"{first}, {scene.color} background"


class EmojiTasks:
    """Training and evaluation records over the rows of `emoji.parquet`.

    Args:
        rows (`Sequence[Mapping]`): Rows of `emoji.parquet`.
        scenes (`int`): Number of training scenes.
        say_first (`bool`): Whether an answer says in words what its image shows, before the image.

    Attributes:
        words (`EmojiWords`): The words for each emoji.
        index (`dict[tuple[str, str, str], int]`): Image by style, base and skin tone.
        bases (`list[int]`): One image for each base emoji: Google's, or where Google has none, the first other one.
        scenes (`list[Scene]`): The training scenes, whose images follow the rows.
        held_out_images (`frozenset[str]`): Base code points whose Twitter images no training question shows.
        held_out_pairs (`frozenset[tuple[str, str]]`): (base, skin tone) pairs that no training record contains.
        held_out_starts (`dict[str, frozenset[int]]`): Per cycle of `CYCLES`, where no forward sequence begins.
        phrases (`list[str]`): All names, everyday phrases and keywords that mean one emoji.
        emphasis (`list[float]`): Relative frequency of each of `bases`; 1 unless it is changed.
    """

    def __init__(self, rows: Sequence[Mapping], scenes: int = SCENES, say_first: bool = False):
        self.rows, self.words, self.say_first = rows, EmojiWords(rows), say_first
        self.index = {(row["style"], row["base"], row["skin_tone"]): i for i, row in enumerate(rows)}
        default = {}
        for i, row in enumerate(rows):
            if not row["skin_tone"]:
                default.setdefault(row["base"], i)
        self.bases = [*default.values()]
        self.names = [rows[i]["name"] for i in self.bases]
        self.emphasis = [1.0] * len(self.bases)
        self.crop_of = {image: len(rows) + scenes + number for number, image in enumerate(self.bases)}
        rng = random.Random(4)
        self.scenes = [sample_scene(rng) for _ in range(scenes)]

        rng = random.Random(0)
        twitter = sorted(base for style, base, tone in self.index if style == "twitter" and not tone)
        both = [base for base in twitter if ("google", base, "") in self.index]
        pairs = sorted((base, tone) for style, base, tone in self.index if style == "google" and tone in TONES)
        self.held_out_images = frozenset(rng.sample(both, min(HELD_OUT_IMAGES, len(both) // 4)))
        self.held_out_pairs = frozenset(rng.sample(pairs, min(HELD_OUT_PAIRS, len(pairs) // 4)))
        self.held_out_starts = {
            cycle: frozenset(rng.sample(range(len(CYCLES[cycle])), count)) for cycle, count in HELD_OUT_STARTS.items()
        }

        self.variants = []  # Google's skin tones
        self.styled = defaultdict(list)  # the images of each style, without those that Twitter holds out
        self.styles_of = defaultdict(list)  # the images of each emoji and tone, in all styles
        tones_of = defaultdict(list)
        for i, row in enumerate(rows):
            style, base, tone = row["style"], row["base"], row["skin_tone"]
            if (base, tone) in self.held_out_pairs or (style == "twitter" and base in self.held_out_images):
                continue
            if tone in ("", *TONES):
                tones_of[style, base].append(tone)
            if style == "google" and tone:
                self.variants.append(i)
            self.styled[style, bool(tone)].append(i)
            self.styles_of[base, tone].append(i)
        self.editable = [(style, base, tones) for (style, base), tones in tones_of.items() if len(tones) > 1]
        self.restylable = [images for images in self.styles_of.values() if len(images) > 1]
        self.in_category = defaultdict(list)
        for i in self.bases:
            self.in_category[rows[i]["category"]].append(rows[i]["name"])
        names = {rows[i]["name"]: i for i in self.bases}
        self.sprite_rows = {thing: names[MEANINGS.get(thing, thing)] for thing in THINGS}
        self.phrases = sorted(self.words.meanings)

    def sample(self, task: str, rng: random.Random) -> dict:
        """Sample a record of a task in `MIXTURE`: `messages` (both turns), `images` (numbers in order) and `task`."""
        makers = {
            "text_to_image": self._text_to_image,
            "style": self._style,
            "scene": self._scene,
            "edit_tone": self._edit_tone,
            "edit_style": self._edit_style,
            "sequence": self._sequence,
            "scene_question": self._scene_question,
            "meaning": self._meaning,
            "gloss": self._gloss,
        }
        record = makers[task](rng) if task in makers else self._ask_about_an_image(task, rng)
        reply = record["messages"][1]["content"]
        if self.say_first and reply[-1]["type"] == "image":
            reply.insert(0, {"type": "text", "text": self.caption(record["images"][-1])})
        return record

    def caption(self, image: int) -> str:
        """Say what an emoji or a scene shows: "waving hand, dark skin tone, in Twitter's style"."""
        if image >= len(self.rows):
            return caption_scene(self.scenes[image - len(self.rows)])
        row = self.rows[image]
        tone = f", {row['skin_tone']} skin tone" if row["skin_tone"] else ""
        style = "" if row["style"] == "google" else f", in {row['style'].capitalize()}'s style"
        return row["name"] + tone + style

    def evaluation(self, kind: str) -> list[dict]:
        """List records to evaluate.

        Returns:
            `list[dict]`: `messages` (user turn), `images`, `task` and `answer`: a text, an image's number, a list of
            images any of which is right, or a `Scene`.
        """
        rng, rows = random.Random(1), self.rows
        twitter = [self.index["twitter", base, ""] for base in sorted(self.held_out_images)]
        match kind:
            case "seen_phrasings" | "unseen_phrasings":
                seen = kind == "seen_phrasings"
                requests = [sample_request(rng) if seen else HELD_OUT_PHRASINGS[i % 3] for i in range(len(self.names))]
                prompts = [request.replace("{}", name) for request, name in zip(requests, self.names)]
                records = [("text_to_image", [], prompt, image) for prompt, image in zip(prompts, self.bases)]
            case "held_out_keywords":
                default = {rows[i]["base"]: i for i in self.bases}
                records = [
                    (
                        "text_to_image",
                        [],
                        DEFAULT_PHRASING.replace("{}", keyword),
                        [default[base] for base in self.words.owners[keyword]],
                    )
                    for keyword in sorted(self.words.held_out)
                ]
            case "name_google" | "name_twitter_held_out":
                images = self.bases if kind == "name_google" else twitter
                records = [("name", [i], "What is this?", rows[i]["name"]) for i in images]
            case "category_twitter_held_out":
                question = "Which category is this?"
                records = [("category", [i], question, rows[i]["category"]) for i in twitter]
            case "edit_held_out":
                records = []
                for base, tone in sorted(self.held_out_pairs):
                    image, target = (self.index["google", base, skin_tone] for skin_tone in ("", tone))
                    records.append(("edit_tone", [image], expand("ask_edit", rng).replace("{}", tone), target))
            case "sequence_held_out":
                frames = [
                    self._frames("google", cycle, start, 1, shown + 1)
                    for cycle, starts in self.held_out_starts.items()
                    for start in sorted(starts)
                    for shown in (2, 3, 4)
                ]
                records = [("sequence", images, "Predict the next image.", i) for *images, i in frames]
            case "scene_color" | "scene_count" | "scene_pair" | "scene_binding":
                scenes = [sample_scene(rng, True, kind.removeprefix("scene_")) for _ in range(SCENE_PROMPTS)]
                prompts = [DEFAULT_PHRASING.replace("{}", describe_scene(scene, rng)) for scene in scenes]
                records = [("scene", [], prompt, scene) for prompt, scene in zip(prompts, scenes)]
            case _:
                raise ValueError(f"There is no evaluation called {kind!r}.")
        return [
            {"messages": [user_turn(images, question)], "images": [*images], "answer": answer, "task": task}
            for task, images, question, answer in records
        ]

    def _choose_base(self, rng: random.Random) -> int:
        return rng.choices(self.bases, self.emphasis)[0]

    def _choose_image(self, rng: random.Random) -> int:
        """Choose an image that an understanding task may show: any style, seldom with a skin tone."""
        if rng.random() < 0.4:
            return self._choose_base(rng)
        style = rng.choices(STYLES, (0.1, 0.4, 0.35, 0.15))[0]
        return rng.choice(self.styled[style, style != "firefox" and rng.random() < 0.15])

    def _write_subject(self, subject: str, request: str, rng: random.Random) -> str:
        """Vary article and capitals of a subject, and put it into a request."""
        if rng.random() < 0.45:
            subject = add_article(subject, rng)
        kind = rng.random()
        if request.isupper() or kind < 0.01:
            subject = subject.upper()
        elif kind < 0.05:
            subject = subject.title()
        elif request.startswith("{}") and kind < 0.5:
            subject = subject[0].upper() + subject[1:]
        return request.replace("{}", subject)

    def _text_to_image(self, rng: random.Random) -> dict:
        is_base = rng.random() < 0.88
        target = self._choose_base(rng) if is_base else rng.choice(self.variants)
        row = self.rows[target]
        subject = self.words.choose_phrase(row["base"], rng)
        if not is_base:
            subject = expand("toned", rng, tone=row["skin_tone"]).replace("{}", subject)
        return conversation("text_to_image", [], self._write_subject(subject, sample_request(rng), rng), [target])

    def _style(self, rng: random.Random) -> dict:
        style = rng.choices(STYLES, (0.1, 0.35, 0.35, 0.2))[0]
        target = rng.choice(self.styled[style, False])
        subject = add_article(self.words.choose_phrase(self.rows[target]["base"], rng), rng)
        subject = expand("styled", rng, style=style.capitalize()).replace("{}", subject)
        return conversation("style", [], sample_request(rng).replace("{}", subject), [target])

    def _scene(self, rng: random.Random) -> dict:
        number = rng.randrange(len(self.scenes))
        subject = describe_scene(self.scenes[number], rng)
        return conversation("scene", [], sample_request(rng).replace("{}", subject), [len(self.rows) + number])

    def _scene_question(self, rng: random.Random) -> dict:
        number = rng.randrange(len(self.scenes))
        scene = self.scenes[number]
        if rng.random() < 0.3:
            question, answer = expand("ask_color", rng), scene.color
        elif scene.is_pair:
            # The second thing, seen from the first, stands on the other side.
            opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
            first, second, relation = *scene.things, scene.relation
            if rng.random() < 0.5:
                first, second, relation = second, first, opposite[relation]
            question, answer = expand("ask_where", rng, where=RELATIONS[relation], thing=second), first
        else:
            question = expand("ask_count", rng, things=make_plural(scene.things[0]))
            answer = NUMBERS[len(scene.things)]
        return conversation("scene_question", [len(self.rows) + number], question, [answer])

    def _ask_about_an_image(self, task: str, rng: random.Random) -> dict:
        image = self._choose_base(rng) if task == "thinking" else self._choose_image(rng)
        row = self.rows[image]
        name = subject = row["name"]
        match task:
            case "name":
                answer = [name]
            case "category":
                answer = [row["category"]]
            case "thinking":
                answer = [self.crop_of[image], name]
            case "reconstruction":
                answer = [image]
            case "yes_no":
                answer = ["yes"]
                if rng.random() < 0.5:
                    candidates = self.in_category[row["category"]] if rng.random() < 0.5 else self.names
                    subject, answer = rng.choice([other for other in candidates if other != name]), ["no"]
                if rng.random() < 0.6:
                    subject = add_article(subject, rng)
            case _:
                raise ValueError(f"task is {task!r}, but must be one of {', '.join(MIXTURE)}.")
        return conversation(task, [image], expand(f"ask_{task}", rng).replace("{}", subject), answer)

    def _edit_tone(self, rng: random.Random) -> dict:
        style, base, tones = rng.choice(self.editable)
        source, target = rng.sample(tones, 2)
        request = expand("ask_edit", rng).replace("{}", target) if target else expand("ask_untone", rng)
        images = [self.index[style, base, tone] for tone in (source, target)]
        return conversation("edit_tone", images[:1], request, images[1:])

    def _edit_style(self, rng: random.Random) -> dict:
        source, target = rng.sample(rng.choice(self.restylable), 2)
        request = expand("ask_style", rng, style=self.rows[target]["style"].capitalize())
        return conversation("edit_style", [source], request, [target])

    def _frames(self, style: str, cycle: str, start: int, step: int, count: int) -> list[int]:
        order = CYCLES[cycle]
        return [self.index[style, order[(start + step * i) % len(order)], ""] for i in range(count)]

    def _sequence(self, rng: random.Random) -> dict:
        style, cycle = rng.choice(("google", "google", "twitter", "microsoft")), rng.choice(tuple(CYCLES))
        forward = rng.random() < 0.75
        excluded = self.held_out_starts[cycle] if forward else ()
        start = rng.choice([i for i in range(len(CYCLES[cycle])) if i not in excluded])
        step, count = 1 if forward else -1, rng.randint(2, 4) + 1
        frames = self._frames(style, cycle, start, step, count)
        if style == "twitter" and any(self.rows[image]["base"] in self.held_out_images for image in frames):
            frames = self._frames("google", cycle, start, step, count)
        *shown, last = frames
        return conversation("sequence", shown, expand("ask_forward" if forward else "ask_backward", rng), [last])

    def _meaning(self, rng: random.Random) -> dict:
        """Ask for the emoji that a phrase means, in words; held-out keywords are asked for here, too."""
        phrase = rng.choice(self.phrases)
        question = expand("ask_meaning", rng).replace("{}", add_article(phrase, rng) if rng.random() < 0.3 else phrase)
        return conversation("meaning", [], question, [self.words.names[self.words.meanings[phrase]]])

    def _gloss(self, rng: random.Random) -> dict:
        word, gloss, _ = rng.choice(self.words.glosses)
        asks_word = rng.random() < 0.5
        question = expand("ask_word" if asks_word else "ask_gloss", rng).replace("{}", gloss if asks_word else word)
        return conversation("gloss", [], question, [word if asks_word else gloss])


def corpus(tasks: EmojiTasks) -> Iterator[str]:
    """Yield texts to train a tokenizer on: sentences about words, names, and the texts of sampled records."""
    rng = random.Random(0)
    yield from tasks.words.sentences(rng)
    for _ in range(3):
        yield from tasks.words.meanings
    for task in rng.choices(list(MIXTURE), weights=MIXTURE.values(), k=CORPUS_CONVERSATIONS):
        for message in tasks.sample(task, rng)["messages"]:
            yield from (part["text"] for part in message["content"] if part["type"] == "text")


def estimate_length(record: dict) -> int:
    """Estimate the length of a conversation in letters: an image is 66 tokens, a token of text about 4 letters."""
    return 4 * 66 * len(record["images"]) + len(str(record["messages"]))


def training_stream(
    tasks: EmojiTasks, mixture: dict, size: int, group: int, column: str, look_up: Callable, num_views: int = 1
) -> Dataset:
    """Make a dataset of `size` conversations, which are built when they are read.

    Each conversation depends on its index alone, so that resuming changes nothing. Conversations of similar length
    stand together in groups of `group`, so that little of a batch is padding.

    Args:
        column (`str`): The column of the images: `"images"` or `"visual_tokens"`.
        look_up (`Callable`): Returns the image for (view, image number, task).
        num_views (`int`): A question shows one of this many views of an image; an answer shows view 0.
    """
    pool = 16 * group

    @lru_cache(maxsize=4)
    def build_pool(number: int) -> list[dict]:
        rng = random.Random(f"pool {number}")
        names = rng.choices(list(mixture), weights=mixture.values(), k=pool)
        records = [tasks.sample(name, rng) for name in names]
        for record in records:
            asked = sum(part["type"] == "image" for part in record["messages"][0]["content"])
            record["views"] = [rng.randrange(num_views) if i < asked else 0 for i in range(len(record["images"]))]
        records.sort(key=estimate_length)
        groups = [records[start : start + group] for start in range(0, pool, group)]
        rng.shuffle(groups)
        return [record for records in groups for record in records]

    def read(columns: dict) -> dict:
        records = [build_pool(index // pool)[index % pool] for index in columns["index"]]
        images = [
            [look_up(view, image, record["task"]) for view, image in zip(record["views"], record["images"])]
            for record in records
        ]
        return {"messages": [record["messages"] for record in records], column: images}

    return Dataset.from_dict({"index": range(size)}).with_transform(read)
