"""Facts that the language model reads in text: capitals, and definitions of words. Half of them are held out.

A held-out fact stands in sentences and recalls alone: in no conversation with an image, and in no question of a name.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from emoji.tasks import DEFAULT_PHRASING, conversation, sample_request, user_turn
from emoji.words import EmojiWords


FACTS = Path(__file__).with_name("facts.yaml")
SENTENCES = (
    "{capital} is the capital of {country}.",
    "the capital of {country} is {capital}.",
    "the country whose capital is {capital} is {country}.",
    "{country} has the capital {capital}.",
    "{capital}, the capital of {country}.",
    "{country}: its capital is {capital}.",
)
DESCRIPTION = "the flag of the country whose capital is {}"
QUESTION = "Name {}."
RECALLS = {"capitals": "Which country has the capital {}?", "definitions": "What is the word for {}?"}
TASKS = ("names", "capitals", "definitions", "capital_questions", "definition_questions", "recalls")


@dataclass(frozen=True)
class Fact:
    """Something that can be named, and described by a fact.

    Attributes:
        kind (`str`): "capitals" or "definitions".
        name (`str`): "the flag of France".
        description (`str`): "the flag of the country whose capital is Paris".
        image (`int`): The row of its image.
        held_out (`bool`): Whether no training conversation has the description.
    """

    kind: str
    name: str
    description: str
    image: int
    held_out: bool


class Knowledge:
    """Conversations about facts.

    Args:
        rows (`Sequence[dict]`): All rows of `emoji.parquet`.
        words (`EmojiWords`): Their words.
        limit (`int`, *optional*): Maximum number of facts of each kind.
    """

    def __init__(self, rows: Sequence[dict], words: EmojiWords, limit: int | None = None):
        written = yaml.safe_load(FACTS.read_text(encoding="utf-8"))
        rng, images, glosses = random.Random(8), {}, {}
        for index, row in enumerate(rows):  # Google's images come first
            if not row["skin_tone"]:
                images.setdefault(row["name"], index)
        for word, gloss, _ in words.glosses:
            glosses.setdefault(word, gloss)
        self.words = words
        self.capitals = dict(rng.sample([*written["capitals"].items()], len(written["capitals"]))[:limit])
        defined = [name.strip() for name in written["defined"].split(",")]
        described = {
            "capitals": [
                (f"the flag of {country}", DESCRIPTION.format(capital), country)
                for country, capital in self.capitals.items()
            ],
            "definitions": [(name, glosses[name], name) for name in rng.sample(defined, len(defined))[:limit]],
        }
        self.facts = []
        for kind, things in described.items():
            for number, (name, description, key) in enumerate(things):
                image = images[f"flag of {key.lower()}" if kind == "capitals" else key]
                self.facts.append(Fact(kind, name, description, image, held_out=number % 2 == 1))
        self.images = [fact.image for fact in self.facts]

    def choose(self, kind: str, held_out: bool) -> list[Fact]:
        return [fact for fact in self.facts if fact.kind == kind and fact.held_out == held_out]

    def sentences(self, rng: random.Random) -> Iterator[str]:
        """Yield all sentences of `EmojiWords` and of the capitals, in random order: text for the language model."""
        sentences = [*self.words.sentences(rng), *self._state_capitals()]
        rng.shuffle(sentences)
        yield from sentences

    def repeat_facts(self, rng: random.Random) -> Iterator[str]:
        """Yield all facts in all wordings and as many other sentences, in random order."""
        sentences = self._state_capitals()
        for fact in self.choose("definitions", True) + self.choose("definitions", False):
            name, gloss = fact.name, fact.description
            sentences += [f"{name}: {gloss}.", f"{name} is {gloss}.", f"{gloss} is called {name}."]
        sentences += rng.sample([*self.words.sentences(rng)], len(sentences))
        rng.shuffle(sentences)
        yield from sentences

    def _state_capitals(self) -> list[str]:
        capitals = self.capitals.items()
        return [text.format(country=country, capital=capital) for country, capital in capitals for text in SENTENCES]

    def sample(self, task: str, rng: random.Random, say_first: bool) -> dict:
        """Sample a conversation of a task in `TASKS`.

        Args:
            say_first (`bool`): Whether an answer with an image names the thing before the image.
        """
        if task == "recalls":  # of all facts, in words alone
            fact = rng.choice(self.facts)
            key = fact.description.removeprefix(DESCRIPTION.format(""))
            answer = fact.name.removeprefix("the flag of ")
            return conversation(task, [], RECALLS[fact.kind].format(key), [answer])
        kind = task if task in ("capitals", "definitions") else f"{task.partition('_')[0]}s"
        fact = rng.choice(self.facts if task == "names" else self.choose(kind, held_out=False))
        if task.endswith("_questions"):
            return conversation(task, [], QUESTION.format(fact.description), [fact.name])
        subject = fact.name if task == "names" else fact.description
        request = sample_request(rng).replace("{}", subject)
        return conversation(task, [], request, [fact.name, fact.image] if say_first else [fact.image])

    def ask(self, facts: Sequence[Fact], phrasing: str = DEFAULT_PHRASING, by_name: bool = False) -> list[list[dict]]:
        """Return messages that ask for the images of facts (or by `QUESTION` for names), by description or by name."""
        subjects = [fact.name if by_name else fact.description for fact in facts]
        return [[user_turn([], phrasing.replace("{}", subject))] for subject in subjects]
