"""Generated scenes: one to four coloured shapes, as pixels, as captions, and as questions with their answers.

Some colour-shape pairs never occur in training, neither in a picture nor in a text: what a model makes of them shows
whether it has learned colours and shapes, or only their combinations. Everything is a function of the random
generator that is handed in.
"""

from __future__ import annotations

import io
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageDraw

COLORS = {
    "red": (214, 40, 40),
    "green": (36, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 215, 40),
    "purple": (140, 50, 180),
    "orange": (245, 135, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
NUMBERS = ("no", "one", "two", "three", "four")

Pair = tuple[str, str]
PAIRS: tuple[Pair, ...] = tuple(itertools.product(COLORS, SHAPES))


# Held out of training: a diagonal of the 36 pairs, so that no colour and no shape lacks more than one partner. Half of
# it is to tune on, the other half to report.
_DIAGONAL = tuple(zip(COLORS, SHAPES, strict=True))
UNSEEN_VAL = _DIAGONAL[::2]
UNSEEN_TEST = _DIAGONAL[1::2]
SEEN = tuple(pair for pair in PAIRS if pair not in UNSEEN_VAL + UNSEEN_TEST)

SIDE = 64
SUPERSAMPLING = 2
MARGIN = 2
RADII = {"small": (11.0, 14.0), "large": (18.0, 24.0)}
COUNTS = {1: 0.35, 2: 0.35, 3: 0.2, 4: 0.1}
# How often several things are of one pair.
TWINS = 0.1
# How often a thing's partner is one that brings a held-out pair's other half into the picture. Without it a color is
# seen less often beside the shape that it never has, and a contrastive model learns just that; with much more of it,
# color alone would point to the held-out pair. At this share a held-out pair's halves meet as often as a seen pair's.
BALANCE = 0.45
# Places tried for a thing before the whole scene is begun anew.
PLACEMENTS = 30

CAPTIONS = 5
# What captions tell, and how often. The shares are the same for scenes of one thing and of several: a kind that only
# the latter have would be one in which the halves of held-out pairs meet more often than those of seen pairs.
KINDS = {"list": 0.4, "relation": 0.1, "focus": 0.15, "shapes": 0.3, "colors": 0.05}
# How often a single thing is counted: "one star" for "a star".
COUNTED = 0.3

ANNOTATORS = 10
# How often an annotator gives another answer than the scene's.
ANNOTATOR_ERROR = 0.08

Random = np.random.Generator
Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Thing:
    """One shape; x and y from its centre to the left and top edge, in pixels of a 64-pixel scene."""

    color: str
    shape: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def pair(self) -> Pair:
        return self.color, self.shape

    def name(self, with_size: bool = False) -> str:
        return f"{self.size} {self.color} {self.shape}" if with_size else f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Things on a background that is `dark` or `light`."""

    things: tuple[Thing, ...]
    background: str


def draw_scene(random: Random, pairs: Sequence[Pair], count: int | None = None, distinct: bool = False) -> Scene:
    """A scene of 1 to 4 things of these pairs; in `distinct` ones no colour and no shape occurs twice."""
    count = count or _pick(random, COUNTS)
    twins = int(random.integers(2, count + 1)) if count > 1 and not distinct and random.random() < TWINS else 1
    chosen = [pairs[int(random.integers(len(pairs)))]] * twins
    while len(chosen) < count:
        taken = {word for pair in chosen for word in pair} if distinct else set()
        allowed = [pair for pair in pairs if not taken & set(pair)]
        if not distinct and random.random() < BALANCE:
            color, shape = chosen[int(random.integers(len(chosen)))]
            absent = [pair for pair in allowed if (color, pair[1]) not in pairs or (pair[0], shape) not in pairs]
            allowed = absent or allowed
        chosen.append(allowed[int(random.integers(len(allowed)))])
    while True:
        things = _arrange(random, chosen)
        if things:
            return Scene(things, "dark" if random.random() < 0.5 else "light")


def _pick(random: Random, shares: Mapping[Choice, float]) -> Choice:
    """A key, with the probability that stands beside it."""
    threshold = random.random() * sum(shares.values())
    bounds = zip(shares, itertools.accumulate(shares.values()), strict=True)
    return next(choice for choice, bound in bounds if threshold < bound)


def _arrange(random: Random, pairs: Sequence[Pair]) -> tuple[Thing, ...]:
    """A thing of each pair, none touching another; empty if the first ones left no room for the rest."""
    # More than two have room only where all are small.
    sizes = ["large" if len(pairs) <= 2 and random.random() < 0.5 else "small" for _ in pairs]
    radii = [random.uniform(*RADII[size]) for size in sizes]
    things: dict[int, Thing] = {}
    for index in sorted(range(len(pairs)), key=lambda index: -radii[index]):
        radius = radii[index]
        places = random.uniform(radius + MARGIN, SIDE - radius - MARGIN, (PLACEMENTS, 2))
        free = np.ones(PLACEMENTS, dtype=bool)
        for other in things.values():
            away = (places[:, 0] - other.x) ** 2 + (places[:, 1] - other.y) ** 2
            free &= away > (radius + other.radius + MARGIN) ** 2
        if not free.any():
            return ()
        x, y = places[int(free.argmax())].tolist()
        things[index] = Thing(*pairs[index], sizes[index], x, y, radius)
    return tuple(things[index] for index in range(len(pairs)))


def render(scene: Scene, random: Random) -> bytes:
    """The scene as a JPEG of 64 × 64 pixels."""
    dark = scene.background == "dark"
    base = random.uniform(15, 70, 3) if dark else random.uniform(185, 240, 3)
    image = Image.new("RGB", (SIDE * SUPERSAMPLING,) * 2, tuple(int(value) for value in base))
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        light, tint = random.uniform(-45, 45), random.uniform(-18, 18, 3)
        shade = np.clip(np.array(COLORS[thing.color]) + light + tint, 0, 255)
        _draw_thing(canvas, thing, tuple(int(value) for value in shade), random.uniform(-0.25, 0.25))
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    slope = np.linspace(-1, 1, SIDE, dtype=np.float32) * random.uniform(-14, 14)
    noise = random.standard_normal((SIDE, SIDE, 3), dtype=np.float32) * random.uniform(2, 9)
    noisy = pixels + noise + (slope[:, None, None] if random.random() < 0.5 else slope[None, :, None])
    buffer = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _draw_thing(canvas: ImageDraw.ImageDraw, thing: Thing, fill: tuple[int, ...], tilt: float) -> None:
    x, y, radius = (value * SUPERSAMPLING for value in (thing.x, thing.y, thing.radius))
    if thing.shape in ("circle", "ring"):
        box = (x - radius, y - radius, x + radius, y + radius)
        if thing.shape == "circle":
            canvas.ellipse(box, fill=fill)
        else:
            canvas.ellipse(box, outline=fill, width=round(radius * 0.45))
        return
    turn, cos, sin = OUTLINES[thing.shape], math.cos(tilt), math.sin(tilt)
    canvas.polygon([(x + radius * (u * cos - v * sin), y + radius * (u * sin + v * cos)) for u, v in turn], fill=fill)


def _around(radii: Sequence[float], start: float) -> list[tuple[float, float]]:
    steps = len(radii)
    angles = [start + 2 * math.pi * step / steps for step in range(steps)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in zip(radii, angles, strict=True)]


_ARM = 0.3
# Corners of each shape in a circle of radius 1, y pointing down.
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(radius * 1.1, y * 1.1 + 0.15) for radius, y in _around([1, 1, 1], -math.pi / 2)],
    "star": _around([1.12, 0.38] * 5, -math.pi / 2),
    "cross": [
        *[(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)],
        *[(_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)],
    ],
}


def captions(scene: Scene, random: Random, count: int = CAPTIONS) -> list[str]:
    """Several ways to say what is seen; some name everything, others one thing, only the shapes or only the colours."""
    return [_caption(scene, random) for _ in range(count)]


def _caption(scene: Scene, random: Random) -> str:
    things = list(scene.things)
    kind = _pick(random, KINDS)
    if kind == "relation" and len({thing.pair for thing in things}) == len(things) == 2:
        first, second = (things[int(index)] for index in random.permutation(2))
        return f"{article(first.name())} {relation(first, second)} {article(second.name())}"
    if kind == "focus":
        thing = things[int(random.integers(len(things)))]
        name = _listed([thing.name(with_size=random.random() < 0.4)], random)
        return f"{name} {position(thing)}" if random.random() < 0.6 else _framed(name, scene, random)
    if kind == "shapes":
        return _framed(_listed([thing.shape for thing in things], random), scene, random)
    if kind == "colors":
        return _framed(_listed([f"{thing.color} shape" for thing in things], random), scene, random)
    with_size = random.random() < 0.35
    return _framed(_listed([thing.name(with_size) for thing in things], random), scene, random)


def _framed(words: str, scene: Scene, random: Random) -> str:
    """The words alone, or in a longer phrase."""
    verb = "is" if words.startswith(("a ", "an ", "one ")) else "are"
    forms = ("{}", "{}", f"there {verb} {{}}", "a picture of {}", f"{{}} on a {scene.background} background")
    return forms[int(random.integers(len(forms)))].format(words)


def _listed(names: Sequence[str], random: Random) -> str:
    """`two red stars, a blue circle and a green square`, in a random order."""
    counts = Counter(names)
    distinct = list(counts)
    parts = []
    for index in random.permutation(len(distinct)):
        name = distinct[int(index)]
        if counts[name] > 1:
            parts.append(f"{NUMBERS[counts[name]]} {plural(name)}")
        else:
            parts.append(f"one {name}" if random.random() < COUNTED else article(name))
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def plural(name: str) -> str:
    """`red cross` → `red crosses`."""
    return name + ("es" if name.endswith("s") else "s")


def article(name: str) -> str:
    """`an orange star`, `a red star`."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def position(thing: Thing) -> str:
    """Where in the frame, in thirds."""
    rows, columns = ("top", "", "bottom"), ("left", "", "right")
    words = f"{rows[min(2, int(3 * thing.y / SIDE))]} {columns[min(2, int(3 * thing.x / SIDE))]}".strip()
    return f"near the {words}" if words else "in the middle"


def relation(first: Thing, second: Thing) -> str:
    """How the first lies to the second, along the axis on which they differ more."""
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def questions(scene: Scene, random: Random, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """VQA's form without ids: three questions a scene at most, ten answers each; only `pairs` are spoken of."""
    things = scene.things
    shapes, colors = Counter(thing.shape for thing in things), Counter(thing.color for thing in things)
    present = {thing.pair for thing in things}
    asked: list[tuple[str, str, str, str, Sequence[str]]] = []
    for thing in things:
        if shapes[thing.shape] == 1:
            other = [color for color in COLORS if (color, thing.shape) in pairs]
            asked.append(("what color is the", f"What color is the {thing.shape}?", thing.color, "other", other))
        if colors[thing.color] == 1:
            other = [shape for shape in SHAPES if (thing.color, shape) in pairs]
            question = f"What shape is the {thing.color} object?"
            asked.append(("what shape is the", question, thing.shape, "other", other))
    counted = things[0].shape
    numbers = ("1", "2", "3", "4")
    asked.append(("how many", f"How many {plural(counted)} are there?", str(shapes[counted]), "number", numbers))
    pair = pairs[int(random.integers(len(pairs)))] if random.random() < 0.5 else things[0].pair
    truth = "yes" if pair in present else "no"
    asked.append(("is there a", f"Is there {article(' '.join(pair))}?", truth, "yes/no", ("yes", "no")))
    if len(present) == len(things) == 2:
        said = relation(*things) if random.random() < 0.5 else OPPOSITE[relation(*things)]
        answer = "yes" if said == relation(*things) else "no"
        words = f"to the {said}" if said in ("left of", "right of") else said
        question = f"Is the {things[0].name()} {words} the {things[1].name()}?"
        asked.append(("is the", question, answer, "yes/no", ("yes", "no")))
    chosen = random.permutation(len(asked))[:3]
    return [_annotated(random, *asked[int(index)]) for index in chosen]


def _annotated(
    random: Random, question_type: str, question: str, truth: str, answer_type: str, possible: Sequence[str]
) -> dict[str, Any]:
    """Ten annotators' answers, some wrong, and their majority."""
    wrong = [answer for answer in possible if answer != truth] or [truth]
    answers = []
    for number in range(1, ANNOTATORS + 1):
        errs = random.random() < ANNOTATOR_ERROR
        answer = wrong[int(random.integers(len(wrong)))] if errs else truth
        answers.append({"answer": answer, "answer_confidence": "maybe" if errs else "yes", "answer_id": number})
    majority = Counter(given["answer"] for given in answers).most_common(1)[0][0]
    return {
        "question": question,
        "question_type": question_type,
        "answers": answers,
        "answer_type": answer_type,
        "multiple_choice_answer": majority,
    }
