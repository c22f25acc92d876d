"""Words of the emoji model: names, everyday phrases, CLDR's keywords and WordNet's definitions."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from datasets import Dataset


FOLDER = Path(__file__).parent
HELD_OUT_KEYWORDS = 0.1  # share of CLDR's keywords that no caption holds
MAX_GLOSS_WORDS = 14

# Spelling does not tell the sound: "a unicorn", "an 8ball".
CONSONANT_SOUNDS = ("uni", "ufo", "uk", "uga", "uru", "u.s", "us ", "u7", "u5", "u6", "eu", "ewe", "one", "once")
VOWEL_SOUNDS = ("a", "e", "i", "o", "u", "é", "å", "hour", "8", "x-ray", "x ray", "sos", "ng", "rv", "mrs", "honest")
IRREGULAR_PLURALS = {"fish": "fish", "sheep": "sheep", "deer": "deer", "mouse": "mice", "wolf": "wolves"}
IRREGULAR_PLURALS |= {"leaf": "leaves", "knife": "knives", "foot": "feet", "tooth": "teeth", "cactus": "cacti"}
IRREGULAR_PLURALS |= {"snowman": "snowmen"}
INDEFINITE = re.compile(r"^(?:an?|the|some|my|our|two|three) ")


def add_article(noun: str, rng: random.Random) -> str:
    """Put a/an, the or some before `noun`, unless it has an article already."""
    if INDEFINITE.match(noun):
        return noun
    if noun.endswith("s") and not noun.endswith(("ss", "us")):  # "glass" and "bus" are singular
        return f"{rng.choice(('some', 'the'))} {noun}"
    return f"{rng.choice((indefinite_article(noun),) * 3 + ('the',))} {noun}"


def indefinite_article(noun: str) -> str:
    vowel = noun.startswith(VOWEL_SOUNDS) and not noun.startswith(CONSONANT_SOUNDS)
    return "an" if vowel else "a"


def make_plural(noun: str) -> str:
    """Return the plural of a noun, whose last word decides."""
    start, _, last = noun.rpartition(" ")
    if last in IRREGULAR_PLURALS:
        last = IRREGULAR_PLURALS[last]
    elif re.search(r"(s|x|ch|sh|z|tomato|potato|mango)$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{start} {last}".strip()


class EmojiWords:
    """The words for each base emoji.

    Attributes:
        names (`dict[str, str]`): Name by code points of the base emoji, in the order of the rows.
        everyday (`dict[str, list[str]]`): Phrases of `everyday.yaml` and former names, by code points.
        keywords (`dict[str, list[str]]`): CLDR's keywords by code points, held-out ones included.
        owners (`dict[str, list[str]]`): Code points of all emoji that have a keyword.
        meanings (`dict[str, str]`): The one emoji that a phrase means, for all phrases that are not ambiguous.
        held_out (`frozenset[str]`): The keywords that stand in no caption.
        captions (`dict[str, list[str]]`): The keywords that a caption may use instead of the name, by code points.
        glosses (`list[tuple[str, str, str]]`): Word, definition and kind.
    """

    def __init__(self, rows: Sequence[dict]):
        self.names, self.keywords, self.everyday = {}, {}, defaultdict(list)
        for row in rows:
            if row["base"] not in self.names:
                self.names[row["base"]], self.keywords[row["base"]] = row["name"], row["keywords"]
                self.everyday[row["base"]] = list(row["aliases"])
        bases = {name: base for base, name in self.names.items()}
        for name, phrases in yaml.safe_load((FOLDER / "everyday.yaml").read_text(encoding="utf-8")).items():
            if name in bases:  # the rows may be a part of all
                self.everyday[bases[name]] += [phrase.strip() for phrase in str(phrases).split(",")]

        self.owners = defaultdict(list)
        for base, keywords in self.keywords.items():
            for keyword in keywords:
                self.owners[keyword].append(base)
        uses = Counter(phrase for phrases in self.everyday.values() for phrase in set(phrases))
        for base, phrases in self.everyday.items():
            kept = [phrase for phrase in phrases if uses[phrase] == 1 and phrase not in bases]
            self.everyday[base] = list(dict.fromkeys(kept))
        self.meanings = dict(bases)
        self.meanings |= {phrase: base for base, phrases in self.everyday.items() for phrase in phrases}

        said = " | ".join([*self.meanings]) + " |"
        words = set(re.findall(r"[\w'-]+", said))
        unsaid = sorted(k for k in self.owners if not set(k.split()) <= words and len(k) > 2)
        self.held_out = frozenset(
            random.Random(3).sample(unsaid, min(len(unsaid), int(HELD_OUT_KEYWORDS * len(self.owners))))
        )
        self.captions = {base: [] for base in self.names}
        for keyword in sorted(self.owners):
            base = self._choose_meaning(keyword)
            if base is not None and keyword not in self.meanings:
                self.meanings[keyword] = base
                if not any(held_out in keyword for held_out in self.held_out):
                    self.captions[base].append(keyword)
        self.glosses = [
            (row["word"], row["gloss"], row["kind"])
            for row in Dataset.from_parquet(str(FOLDER / "glosses.parquet")).to_list()
            # No persons with the years of their lives, no Latin names of three words.
            if len(row["gloss"].split()) <= MAX_GLOSS_WORDS and not re.search(r"\d{3}", row["gloss"])
            if row["word"].count(" ") < 2
        ]

    def _choose_meaning(self, keyword: str) -> str | None:
        """Return the emoji that a keyword means best, or None if it has many and none is named by it."""
        owners = self.owners[keyword]
        named = [base for base in owners if keyword in self.names[base].split()]
        if len(owners) > 1 and named:
            return min(named, key=lambda base: len(self.names[base]))
        return owners[0] if len(owners) <= 3 else None

    def choose_phrase(self, base: str, rng: random.Random) -> str:
        """Choose a name, an everyday word or a keyword for a base emoji, never a held-out keyword."""
        kind = rng.random()
        if kind < 0.35 and self.everyday[base]:
            return rng.choice(self.everyday[base])
        if 0.35 <= kind < 0.65 and self.captions[base]:
            return rng.choice(self.captions[base])
        return self.names[base]

    def sentences(self, rng: random.Random) -> Iterator[str]:
        """Yield sentences that say what things are, in random order: the text for the language model."""
        sentences = [*self._say_what_emoji_mean(rng), *self._say_what_words_mean(rng)]
        rng.shuffle(sentences)
        yield from sentences

    def _say_what_emoji_mean(self, rng: random.Random) -> Iterator[str]:
        for base, name in self.names.items():
            others = [*self.everyday[base], *self.keywords[base]]
            if others:
                rng.shuffle(others)
                yield f"{name}: {', '.join(others)}."
            for other in others:
                yield rng.choice(
                    (
                        f"{other} is shown by {name}.",
                        f"{other} means {name}.",
                        f"{name} stands for {other}.",
                        f"for {other}, use {name}.",
                        f"{other}: {name}.",
                    )
                )

    def _say_what_words_mean(self, rng: random.Random) -> Iterator[str]:
        for word, gloss, kind in self.glosses:
            sentences = [f"{word}: {gloss}.", f"{word} is {gloss}.", f"{gloss} is called {word}."]
            if kind:
                sentences.append(f"{word} is a kind of {kind}.")
            yield rng.choice(sentences)
