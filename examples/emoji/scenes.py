"""Scenes of one to three emoji on a plain background, their words, and a judge that is not the model.

The judge knows the sprites. It finds them in an image by normalized cross-correlation over positions and sizes, so it
needs no training and shares nothing with the model it judges.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F


COLORS = {
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "gray": (150, 150, 150),
    "red": (220, 40, 40),
    "orange": (250, 150, 40),
    "yellow": (250, 225, 70),
    "green": (70, 170, 80),
    "blue": (60, 110, 220),
    "purple": (140, 80, 190),
    "pink": (250, 160, 200),
    "brown": (130, 85, 55),
}
NUMBERS = {1: "one", 2: "two", 3: "three"}
RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
# Common things with short names, whose images do not look alike.
OBJECTS = (
    "cat dog mouse cow tiger rabbit horse pig monkey elephant frog bear panda koala fox lion penguin owl duck eagle "
    "butterfly honeybee spider snail turtle octopus crab whale dolphin fish shark snake unicorn bat "
    "banana watermelon grapes lemon pineapple strawberry tomato carrot avocado hamburger pizza taco bread doughnut "
    "cookie candy lollipop egg pretzel cupcake popcorn rose tulip sunflower cactus mushroom "
    "car bus bicycle airplane rocket ship helicopter tractor ambulance taxi train house castle tent "
    "guitar trumpet drum violin book pencil key hammer scissors umbrella balloon gift camera laptop television clock "
    "hat shoe crown ring heart star sun moon cloud snowman fire ball robot ghost"
).split()
# Things that come in several colors, so that a prompt must bind each color to its thing.
SHAPES = ("heart", "circle", "square")
PAINTED = [f"{color} {shape}" for shape in SHAPES for color in ("red", "orange", "yellow", "green", "blue", "purple")]
THINGS = [*OBJECTS, *PAINTED]
MEANINGS = {  # where the short word is not the emoji's name
    "cat": "cat face", "dog": "dog face", "mouse": "mouse face", "cow": "cow face", "tiger": "tiger face",
    "rabbit": "rabbit face", "horse": "horse face", "pig": "pig face", "monkey": "monkey face", "car": "automobile",
    "book": "closed book", "gift": "wrapped gift", "clock": "alarm clock", "hat": "top hat",
    "shoe": "running shoe", "heart": "red heart", "moon": "crescent moon", "snowman": "snowman without snow",
    "ball": "basketball",
}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """One to three emoji on a plain background.

    Args:
        things (`tuple[str, ...]`): Words from `THINGS`: one, or two or three of the same, or two different ones.
        color (`str`): Background, a key of `COLORS`.
        relation (`str`): Where the first of two things stands, as seen from the second; a key of `RELATIONS`.
    """

    things: tuple[str, ...]
    color: str = "white"
    relation: str = "left"

    @property
    def is_pair(self) -> bool:
        return len(set(self.things)) == 2

    @cached_property
    def places(self) -> list[tuple[int, int, int]]:
        """Center x, center y and size of each thing, in pixels of a 128x128 image."""
        count = len(self.things)
        if count == 1:
            return [(64, 64, 88)]
        if count == 3:
            return [(22, 64, 40), (64, 64, 40), (106, 64, 40)]
        places = [(32, 64, 56), (96, 64, 56)]
        if self.is_pair and self.relation in ("above", "below"):
            places = [(64, 32, 56), (64, 96, 56)]
        return places[::-1] if self.is_pair and self.relation in ("right", "below") else places

    @property
    def is_held_out(self) -> bool:
        """Whether no training example shows this combination: a tenth of the pairs, counts and colors."""
        if self.is_pair:
            return _falls_into_a_tenth("pair", *sorted(set(self.things)))
        kind = "color" if len(self.things) == 1 else len(self.things)
        return _falls_into_a_tenth(kind, self.things[0], self.color if len(self.things) == 1 else "")


def _falls_into_a_tenth(*parts: str | int) -> bool:
    return random.Random(" ".join(map(str, parts))).random() < 0.1


def sample_scene(rng: random.Random, held_out: bool = False, kind: str | None = None) -> Scene:
    """Sample a scene, from the held-out combinations or from the others.

    Args:
        kind (`str`): "color" (of the background), "count", "pair" or "binding" (of colors to two shapes).
    """
    while True:
        chosen = kind or rng.choices(("color", "count", "pair", "binding"), (0.22, 0.28, 0.38, 0.12))[0]
        color = rng.choice([*COLORS]) if chosen == "color" or rng.random() < 0.5 else "white"
        if chosen == "color":
            scene = Scene((rng.choice(THINGS),), color)
        elif chosen == "count":
            scene = Scene((rng.choice(OBJECTS),) * rng.choice((2, 3)), color)
        elif chosen == "pair":
            scene = Scene(tuple(rng.sample(OBJECTS, 2)), color, rng.choice([*RELATIONS]))
        else:
            scene = Scene(tuple(rng.sample(PAINTED, 2)), color, rng.choice([*RELATIONS]))
            colors, shapes = zip(*(thing.split() for thing in scene.things))
            if len({*colors}) == 1 or len({*shapes}) == 1:
                continue
        if any(thing.split()[0] == scene.color for thing in scene.things):
            continue  # a red heart on red cannot be seen
        if scene.is_held_out == held_out:
            return scene


def draw_scene(scene: Scene, sprites: dict[str, torch.Tensor]) -> torch.Tensor:
    """Draw a scene from sprites (4, 128, 128) with premultiplied opacity: uint8 pixels (3, 128, 128)."""
    canvas = torch.tensor(COLORS[scene.color]).float().view(3, 1, 1).repeat(1, 128, 128)
    for thing, (x, y, size) in zip(scene.things, scene.places, strict=True):
        sprite = resize(sprites[thing], size)
        area = canvas[:, y - size // 2 : y + size // 2, x - size // 2 : x + size // 2]
        area.copy_(sprite[:3] + area * (1 - sprite[3:] / 255))
    return canvas.round().clamp(0, 255).byte()


def resize(sprite: torch.Tensor, size: int) -> torch.Tensor:
    """Resize a uint8 sprite (4, height, width) to float32 (4, size, size)."""
    return F.interpolate(sprite[None].float(), size=(size, size), mode="area")[0]


class SceneJudge:
    """Finds known emoji in an image.

    An object counts as found where the correlation of its sprite, on the image's own background, with the image
    exceeds `threshold` and that of all other objects at that place.

    Args:
        sprites (`dict[str, torch.Tensor]`): Sprites (4, 128, 128) by word, with premultiplied opacity.
        threshold (`float`, defaults to 0.6): Least correlation that counts.
    """

    SIZES = (36, 40, 48, 56, 64, 80, 88, 104)
    LEAST_CONTRAST = 0.05  # standard deviation of colors in [0, 1], below which a place counts as plain

    def __init__(self, sprites: dict[str, torch.Tensor], threshold: float = 0.6):
        self.threshold, first = threshold, {}
        # "heart" and "red heart" have one sprite, which goes by the word that comes first.
        self.known_as = {word: first.setdefault(sprite.numpy().tobytes(), word) for word, sprite in sprites.items()}
        self.words = [*first.values()]
        # Half resolution is enough to tell objects apart, and 16 times as fast.
        self.sprites = {
            size: torch.stack([resize(sprites[word], size // 2) for word in self.words]) / 255 for size in self.SIZES
        }

    @torch.no_grad()
    def correlate(self, image: torch.Tensor, size: int) -> torch.Tensor:
        """Correlate uint8 pixels (3, 128, 128) with all sprites at one size: (words, rows, columns) in [-1, 1]."""
        background = torch.tensor(COLORS[name_background(image)]).view(3, 1, 1) / 255
        sprites = self.sprites[size]
        templates = sprites[:, :3] + background * (1 - sprites[:, 3:])
        templates = templates - templates.mean((2, 3), keepdim=True)
        scale = templates.square().mean((1, 2, 3)).sqrt().clamp(min=self.LEAST_CONTRAST)
        pixels, side = F.avg_pool2d(image[None].float() / 255, 2), size // 2
        product = F.conv2d(pixels, templates)[0] / (3 * side**2)
        mean, square = (F.avg_pool2d(values, side, 1)[0] for values in (pixels, pixels.square()))
        deviation = (square - mean.square()).mean(0).clamp(min=self.LEAST_CONTRAST**2).sqrt()
        return product / (deviation * scale.view(-1, 1, 1))

    def find(self, image: torch.Tensor, limit: int = 5) -> list[tuple[str, int, int, int, float]]:
        """Find up to `limit` objects: word, center x, center y, size and correlation, the best first."""
        candidates = []
        for size in self.SIZES:
            best, word = self.correlate(image, size).max(0)
            peaks = (best == F.max_pool2d(best[None], 9, 1, 4)[0]) & (best > self.threshold)
            for row, column in peaks.nonzero().tolist():
                center = (2 * column + size // 2, 2 * row + size // 2)
                candidates.append((self.words[word[row, column]], *center, size, best[row, column].item()))
        found = []
        # A small sprite fits by chance more easily than a large one.
        for candidate in sorted(candidates, key=lambda c: -c[4] * c[3] ** 0.25):
            _, x, y, size, _ = candidate
            if all(max(abs(x - other[1]), abs(y - other[2])) > 0.4 * max(size, other[3]) for other in found):
                found.append(candidate)
        return found[:limit]

    def judge(self, image: torch.Tensor, scene: Scene) -> dict[str, bool]:
        """Judge an image by what a prompt for `scene` asks for: `objects`, `count`, `color` and `relation`."""
        things = [self.known_as[thing] for thing in scene.things]
        found = [entry for entry in self.find(image) if entry[0] in things]
        words = [entry[0] for entry in found]
        verdict = {"objects": set(things) <= set(words), "color": name_background(image) == scene.color}
        if scene.is_pair:
            verdict["relation"] = verdict["objects"] and _relation(found, *things) == scene.relation
        else:
            verdict["count"] = len(words) == len(things)
        return verdict


def _relation(found: Sequence[tuple], first: str, second: str) -> str:
    """Return where the first thing stands as seen from the second."""
    (x1, y1), (x2, y2) = (next(entry[1:3] for entry in found if entry[0] == word) for word in (first, second))
    if abs(x1 - x2) > abs(y1 - y2):
        return "left" if x1 < x2 else "right"
    return "above" if y1 < y2 else "below"


def name_background(image: torch.Tensor) -> str:
    """Return the color of `COLORS` that is nearest to the image's border, a strip of 4 pixels."""
    strips = (image[:, :4], image[:, -4:], image[:, :, :4], image[:, :, -4:])
    color = torch.cat([strip.flatten(1) for strip in strips], dim=1).float().median(1).values
    return min(COLORS, key=lambda name: (color - torch.tensor(COLORS[name])).square().sum().item())
