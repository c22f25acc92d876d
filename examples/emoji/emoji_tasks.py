"""Conversations for the small emoji model, built from the rows of `emoji.parquet`.

An image id is a row's index; `len(rows) + i` is the center crop of row i (its middle 32x32, enlarged to 64x64).
`EmojiTasks.sample` gives training records, and `EmojiTasks.evaluation` lists the held-out ones. Training never sees

- the sentences of `HELD_OUT_PHRASINGS`, alone or inside a longer text_to_image prompt;
- Twitter's images of 200 emoji, skin-tone variants included, in the tasks name, category, yes_no and thinking;
- 100 pairs of emoji and skin tone, of either vendor, in any task;
- forward sequences that begin at one of 2 moon phases and 6 clock faces, of either vendor.

All wordings come from the grammar in `words.yaml`.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import yaml
from datasets import Dataset


HELD_OUT_PHRASINGS = ("Could you sketch {} for me?", "I want to see {}.", "Let's have a picture with {} in it.")
DEFAULT_PHRASING = "Generate an image of {}."

UNDERSTANDING = {"name": 0.55, "category": 0.2, "yes_no": 0.25}
MIXTURE = {"text_to_image": 0.44, "name": 0.24, "category": 0.1, "yes_no": 0.03}
MIXTURE |= {"edit": 0.04, "sequence": 0.13, "thinking": 0.02}

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
CYCLES = {
    "moon": tuple(f"{0x1F311 + i:X}" for i in range(8)),
    "clock": tuple(f"{start + hour:X}" for hour in range(12) for start in (0x1F550, 0x1F55C)),
}
HELD_OUT_STARTS = {"moon": 2, "clock": 6}
HELD_OUT_IMAGES = 200
HELD_OUT_PAIRS = 100
CORPUS_CONVERSATIONS = 20_000

WORDS = yaml.safe_load((Path(__file__).parent / "words.yaml").read_text(encoding="utf-8"))
GRAMMAR = {symbol: [text.strip() for text in alternatives.split("|")] for symbol, alternatives in WORDS.items()}

# Spelling does not tell the sound: "a unicorn", "an 8ball".
CONSONANT_SOUNDS = ("uni", "ufo", "uk", "uga", "uru", "u.s", "us ", "u7", "u5", "u6", "eu", "ewe", "one", "once")
VOWEL_SOUNDS = ("a", "e", "i", "o", "u", "é", "å", "hour", "8", "x-ray", "x ray", "sos", "ng", "rv", "mrs")


def expand(symbol: str, rng: random.Random) -> str:
    """Return a random sentence of `GRAMMAR[symbol]`. `<tone>` is left to the caller."""
    text = rng.choice(GRAMMAR[symbol])
    return re.sub(r"<(\w+)>", lambda match: match[0] if match[1] == "tone" else expand(match[1], rng), text)


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


def add_article(noun: str, rng: random.Random) -> str:
    """Put a/an, the or some before `noun`."""
    if noun.endswith("s") and not noun.endswith("ss"):
        return f"{rng.choice(('some', 'the'))} {noun}"
    vowel = noun.startswith(VOWEL_SOUNDS) and not noun.startswith(CONSONANT_SOUNDS)
    return f"{rng.choice(('an' if vowel else 'a',) * 3 + ('the',))} {noun}"


def user_turn(images: Sequence[int], question: str) -> dict:
    return {"role": "user", "content": [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]}


def conversation(task: str, images: Sequence[int], question: str, answer: Sequence[int | str]) -> dict:
    """Build a training record: images and a question, answered by images (ids) and texts."""
    reply = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in answer]
    return {
        "messages": [user_turn(images, question), {"role": "assistant", "content": reply}],
        "images": [*images, *(part for part in answer if not isinstance(part, str))],
        "task": task,
    }


class EmojiTasks:
    """Training and evaluation records over the rows of `emoji.parquet`, whose `image` column is not read.

    Attributes:
        held_out_images (`frozenset[str]`): Base code points whose Twitter images no training question shows.
        held_out_pairs (`frozenset[tuple[str, str]]`): (base, skin tone) pairs that no training record contains.
        held_out_starts (`dict[str, frozenset[int]]`): Per cycle of `CYCLES`, where no forward sequence begins.
        google (`list[int]`): Google's images of the base emoji, the targets of text_to_image.
        twitter (`list[int]`): Twitter's images of the base emoji, without the held-out ones.
        emphasis (`list[float]`): Relative frequency of each of `google`; 1 unless it is changed.
    """

    def __init__(self, rows: Sequence[Mapping]):
        self.rows = rows
        self.index = {(row["vendor"], row["base"], row["skin_tone"]): i for i, row in enumerate(rows)}
        self.google = [i for i, row in enumerate(rows) if row["vendor"] == "google" and not row["skin_tone"]]
        self.names = [rows[i]["name"] for i in self.google]
        self.emphasis = [1.0] * len(self.google)

        rng = random.Random(0)
        bases = sorted(rows[i]["base"] for i in self.google)
        pairs = sorted((base, tone) for vendor, base, tone in self.index if vendor == "google" and tone in TONES)
        self.held_out_images = frozenset(rng.sample(bases, HELD_OUT_IMAGES))
        self.held_out_pairs = frozenset(rng.sample(pairs, HELD_OUT_PAIRS))
        self.held_out_starts = {
            cycle: frozenset(rng.sample(range(len(CYCLES[cycle])), count)) for cycle, count in HELD_OUT_STARTS.items()
        }

        self.google_variants, self.twitter, self.twitter_variants = [], [], []
        tones_of = defaultdict(list)
        for i, row in enumerate(rows):
            vendor, base, tone = row["vendor"], row["base"], row["skin_tone"]
            if (base, tone) in self.held_out_pairs:
                continue
            if tone in ("", *TONES):
                tones_of[vendor, base].append(tone)
            if vendor == "google" and tone:
                self.google_variants.append(i)
            elif vendor == "twitter" and base not in self.held_out_images:
                (self.twitter_variants if tone else self.twitter).append(i)
        self.editable = [(vendor, base, tones) for (vendor, base), tones in tones_of.items() if len(tones) > 1]

        self.in_category = defaultdict(list)
        for i in self.google:
            self.in_category[rows[i]["category"]].append(rows[i]["name"])
        uses = Counter(self.names) + Counter(alias for i in self.google for alias in rows[i]["aliases"])
        self.clear_aliases = {i: [alias for alias in rows[i]["aliases"] if uses[alias] == 1] for i in self.google}

    def sample(self, task: str, rng: random.Random) -> dict:
        """Sample a record of a task in `MIXTURE`: `messages` (both turns), `images` (ids in order) and `task`."""
        match task:
            case "text_to_image":
                return self._text_to_image(rng)
            case "edit":
                return self._edit(rng)
            case "sequence":
                return self._sequence(rng)
        return self._ask_about_an_image(task, rng)

    def evaluation(self, kind: str) -> list[dict]:
        """List records to evaluate: `messages` (user turn), `images`, `answer` (a text or an image id) and `task`."""
        rng, rows = random.Random(1), self.rows
        twitter = [self.index["twitter", base, ""] for base in sorted(self.held_out_images)]
        match kind:
            case "seen_phrasings" | "unseen_phrasings":
                seen = kind == "seen_phrasings"
                requests = [sample_request(rng) if seen else HELD_OUT_PHRASINGS[i % 3] for i in range(len(self.names))]
                prompts = [request.replace("{}", name) for request, name in zip(requests, self.names)]
                records = [("text_to_image", [], prompt, image) for prompt, image in zip(prompts, self.google)]
            case "name_google" | "name_twitter_held_out":
                images = self.google if kind == "name_google" else twitter
                records = [("name", [i], "What is this?", rows[i]["name"]) for i in images]
            case "category_twitter_held_out":
                question = "Which category is this?"
                records = [("category", [i], question, rows[i]["category"].lower()) for i in twitter]
            case "edit_held_out":
                records = []
                for base, tone in sorted(self.held_out_pairs):
                    image, target = (self.index["google", base, skin_tone] for skin_tone in ("", tone))
                    records.append(("edit", [image], expand("ask_edit", rng).replace("{}", tone), target))
            case "sequence_held_out":
                frames = [
                    self._frames("google", cycle, start, 1, shown + 1)
                    for cycle, starts in self.held_out_starts.items()
                    for start in sorted(starts)
                    for shown in (2, 3, 4)
                ]
                records = [("sequence", images, "Predict the next image.", i) for *images, i in frames]
            case _:
                raise ValueError(f"There is no evaluation called {kind!r}.")
        return [
            {"messages": [user_turn(images, question)], "images": [*images], "answer": answer, "task": task}
            for task, images, question, answer in records
        ]

    def _choose_image(self, rng: random.Random) -> int:
        """Choose an image that an understanding task may show."""
        groups = (self.google, self.google_variants, self.twitter, self.twitter_variants)
        group = rng.choices(groups, weights=(0.42, 0.1, 0.42, 0.06))[0]
        return rng.choices(group, self.emphasis if group is self.google else None)[0]

    def _text_to_image(self, rng: random.Random) -> dict:
        is_base = rng.random() < 0.85
        target = rng.choices(self.google, self.emphasis)[0] if is_base else rng.choice(self.google_variants)
        row = self.rows[target]
        aliases = self.clear_aliases[self.index["google", row["base"], ""]]
        subject = rng.choice(aliases) if aliases and rng.random() < 0.25 else row["name"]
        if not is_base:
            subject = expand("toned", rng).replace("{}", subject).replace("<tone>", row["skin_tone"])
        request = sample_request(rng)
        if rng.random() < 0.35:
            subject = add_article(subject, rng)
        kind = rng.random()
        if request.isupper() or kind < 0.01:
            subject = subject.upper()
        elif kind < 0.05:
            subject = subject.title()
        elif request.startswith("{}") and kind < 0.5:
            subject = subject[0].upper() + subject[1:]
        return conversation("text_to_image", [], request.replace("{}", subject), [target])

    def _ask_about_an_image(self, task: str, rng: random.Random) -> dict:
        image = self._choose_image(rng)
        row = self.rows[image]
        name = subject = row["name"]
        match task:
            case "name":
                answer = [name]
            case "category":
                answer = [row["category"].lower()]
            case "thinking":
                answer = [len(self.rows) + image, name]
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

    def _edit(self, rng: random.Random) -> dict:
        vendor, base, tones = rng.choice(self.editable)
        source, target = rng.sample(tones, 2)
        request = expand("ask_edit", rng).replace("{}", target) if target else expand("ask_untone", rng)
        return conversation("edit", [self.index[vendor, base, source]], request, [self.index[vendor, base, target]])

    def _frames(self, vendor: str, cycle: str, start: int, step: int, count: int) -> list[int]:
        order = CYCLES[cycle]
        return [self.index[vendor, order[(start + step * i) % len(order)], ""] for i in range(count)]

    def _sequence(self, rng: random.Random) -> dict:
        vendor, cycle = rng.choice(("google", "twitter")), rng.choice(tuple(CYCLES))
        forward = rng.random() < 0.75
        excluded = self.held_out_starts[cycle] if forward else ()
        start = rng.choice([i for i in range(len(CYCLES[cycle])) if i not in excluded])
        *shown, last = self._frames(vendor, cycle, start, 1 if forward else -1, rng.randint(2, 4) + 1)
        return conversation("sequence", shown, expand("ask_forward" if forward else "ask_backward", rng), [last])


def corpus(tasks: EmojiTasks) -> Iterator[str]:
    """Yield texts to train a tokenizer on: names, aliases, categories, tones, and the texts of sampled records."""
    for i in tasks.google:
        yield tasks.rows[i]["name"]
        yield from tasks.rows[i]["aliases"]
    for category in tasks.in_category:
        yield category.lower()
    yield from TONES
    rng = random.Random(0)
    for task in rng.choices(list(MIXTURE), weights=MIXTURE.values(), k=CORPUS_CONVERSATIONS):
        for message in tasks.sample(task, rng)["messages"]:
            yield from (part["text"] for part in message["content"] if part["type"] == "text")


def training_stream(
    tasks: EmojiTasks, mixture: dict, size: int, group: int, column: str, look_up: Callable, num_views: int = 1
) -> Dataset:
    """Make a dataset of `size` conversations, which are built when they are read.

    Each conversation depends on its index alone, so that resuming changes nothing. Conversations of similar length
    stand together in groups of `group`, so that little of a batch is padding.

    Args:
        column (`str`): The column of the images: `"images"` or `"visual_tokens"`.
        look_up (`Callable`): Returns the image for (view, image id, task).
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
        # Length in letters: an image is 18 tokens, a token of text about 4 letters.
        records.sort(key=lambda record: 4 * 18 * len(record["images"]) + len(str(record["messages"])))
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
