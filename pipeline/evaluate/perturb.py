"""Retrieval with captions that say something else in the same words: does the model read more than a bag of words?

After Yuksekgonul et al. 2023 (word order) and Hsieh et al. 2023 (exchanged nouns). A changed caption may be told from a
true one by its grammar alone (Hsieh et al., section 3), so that little is proven by a model that tells them apart, and
much by one that does not. Shapes: N images, M captions, C of them changed, D = embedding width.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline import exchange
from pipeline.evaluate.embed import Embedder, distinct, rows
from pipeline.evaluate.lot import lot
from pipeline.evaluate.measures import EmbedTexts, OpenSet
from pipeline.evaluate.nouns import Noun, nouns, words
from pipeline.evaluate.result import Result
from pipeline.evaluate.retrieval import CUTOFFS, standing
from pipeline.evaluate.sets import Item
from pipeline.evaluate.statistics import Sampled
from pipeline.evaluate.ties import hit_share, pair_scores

TASK = "perturbed_retrieval"
# Of each way, in a record, for people.
EXAMPLES = 5
_ARTICLE = re.compile(r"\b(a)(n?)( +)$", re.IGNORECASE)


class Changed(NamedTuple):
    """What one kind of perturbation made of a set's captions.

    Attributes:
        places: (C,) which of the M captions it changed.
        texts: (C,) what it made of them.
    """

    places: list[int]
    texts: list[str]


def prepare(
    embedder: Embedder, data: Path, opened: OpenSet, image_ND: Tensor, embed: EmbedTexts
) -> tuple[OpenSet, Callable[[], Result]]:
    """A retrieval set with its changed captions, embedded, and how it is scored.

    Args:
        embedder: of the model.
        data: the dataset.
        opened: the set.
        image_ND: unit-norm, of its images.
        embed: its texts → (M, D) unit-norm.

    Collective: every rank calls it.
    """
    changed = exchange.from_main(lambda: perturb(opened.items))
    unique = distinct([text for one in changed.values() for text in one.texts])
    find = rows(unique, embedder.texts(unique)) if unique else embed
    source = replace(opened.source, name=f"{opened.source.name}.perturbed")
    further = replace(
        opened, source=source, texts=[*opened.texts, *(text for one in changed.values() for text in one.texts)]
    )

    def figures() -> Result:
        owners = [index for index, item in enumerate(opened.items) for _ in item.captions]
        of_texts = {way: (one.places, find(one.texts)) for way, one in changed.items() if one.texts}
        sampled = measure(image_ND, embed(opened.texts), owners, of_texts, folds=opened.folds)
        gallery = len(opened.items) // opened.folds
        chance = {f"true_caption_preferred_{way}": 0.5 for way in of_texts}
        chance |= {f"image_retrieval_recall@{k}_{way}": min(1.0, k / gallery) for k in CUTOFFS for way in of_texts}
        return Result(TASK, len(opened.items), sampled, chance, lambda: describe(opened.texts, changed))

    return further, figures


def describe(texts: Sequence[str], changed: Mapping[str, Changed]) -> dict[str, Any]:
    """Of each way how many captions it changed, how many it left out, and a few examples."""
    return {
        "perturbations": {
            way: {
                "captions": len(one.texts),
                "left_out": len(texts) - len(one.texts),
                "examples": [(texts[place], text) for place, text in list(zip(*one, strict=True))[:EXAMPLES]],
            }
            for way, one in changed.items()
        }
    }


def perturb(items: Sequence[Item]) -> dict[str, Changed]:
    """A retrieval set's captions in each way changed, drawn by the text; those that cannot be changed are left out.

    - shuffled: all words in another order; what ends the sentence stays there.
    - nouns_exchanged: two nouns in each other's place that differ, have the same number, and are apart by a verb or a
      preposition ("a dog on a couch", not "a dog and a cat").
    - noun_replaced: a noun gives way to one of the set's captions, of the same number, that no caption of the image
      has; the more often it occurs, the likelier it is drawn.

    `a` and `an` follow the new noun. A change that makes one of the image's own captions is none.

    Raises:
        EvaluationError: HanTa is not installed.
    """
    found = [[nouns(text) for text in item.captions] for item in items]
    pool: dict[str, list[Noun]] = {}
    for noun in itertools.chain.from_iterable(itertools.chain.from_iterable(found)):
        pool.setdefault(noun.tag, []).append(noun)
    result = {way: Changed([], []) for way in ("shuffled", "nouns_exchanged", "noun_replaced")}
    place = itertools.count()
    for item, found_here in zip(items, found, strict=True):
        said = set().union(*map(words, item.captions)) | {noun.lemma for one in found_here for noun in one}
        for text, own in zip(item.captions, found_here, strict=True):
            number = next(place)
            changes = (shuffled(text), exchanged(text, own), replaced(text, own, pool, said))
            for way, changed in zip(result, changes, strict=True):
                if changed is not None and changed not in item.captions:
                    result[way].places.append(number)
                    result[way].texts.append(changed)
    return result


def shuffled(text: str) -> str | None:
    """Its words in another order; None where all are the same, but for capitals."""
    rest = text.rstrip(" .!?")
    found, end = rest.split(), text[len(rest) :]
    plain = [word.lower() for word in found]
    if len(set(plain)) < 2:
        return None
    for attempt in itertools.count():
        order = sorted(range(len(found)), key=lambda number: lot("order", attempt, number, text))
        if [plain[number] for number in order] != plain:
            break
    return " ".join(found[number] for number in order) + end


def exchanged(text: str, own: Sequence[Noun]) -> str | None:
    """Two of its nouns in each other's place; None where no two fit (see `perturb`)."""
    pairs = [
        (first, second)
        for first, second in itertools.combinations(own, 2)
        if first.tag == second.tag and first.lemma != second.lemma and first.relations < second.relations
    ]
    if not pairs:
        return None
    first, second = pairs[lot("pair", text) % len(pairs)]
    return _put(_put(text, second, first.text), first, second.text)


def replaced(text: str, own: Sequence[Noun], pool: Mapping[str, Sequence[Noun]], said: Set[str]) -> str | None:
    """One of its nouns replaced by another of `pool` that is not `said`; None where there is none."""
    for noun in sorted(own, key=lambda noun: lot("noun", noun.begin, text)):
        others = pool[noun.tag]
        begin = lot("other", text) % len(others)
        for other in itertools.chain(others[begin:], others[:begin]):
            if other.text.lower() not in said and other.lemma not in said:
                return _put(text, noun, other.text)
    return None


def _put(text: str, place: Noun, word: str) -> str:
    """Another noun in a noun's place, with its capital, and the article before it as the word wants it."""
    new, n = (word if word.isupper() else word.lower()), "n"
    if text.isupper():
        new, n = word.upper(), "N"
    elif place.text[0].isupper() and not place.text.isupper():
        new = new[0].upper() + new[1:]
    before = text[: place.begin]
    if article := _ARTICLE.search(before):
        before = before[: article.start()] + article[1] + (n if new[0].lower() in "aeiou" else "") + article[3]
    return before + new + text[place.end :]


def measure(
    image_ND: Tensor,
    text_MD: Tensor,
    owners: Sequence[int],
    changed: Mapping[str, tuple[Sequence[int], Tensor]],
    *,
    folds: int = 1,
) -> dict[str, Sampled]:
    """What changed captions find, of each way in which they were changed.

    - image_retrieval_recall@K_WAY: the image is among the first K that the changed caption finds.
    - image_retrieval_recall@K_WAY_drop: how much less that is than with the same captions unchanged.
    - true_caption_preferred_WAY: the image is nearer to the caption than to the changed one; a tie counts a half.

    Args:
        image_ND: unit-norm.
        text_MD: unit-norm, of the captions as they are.
        owners: (M,) index of each caption's image, ascending.
        changed: way → (C,) which captions, at least one, and (C, D) unit-norm, what was made of them.
        folds: galleries, as in retrieval.measure.
    """
    owner_M, found = torch.as_tensor(owners), {}
    for way, (places, changed_CD) in changed.items():
        true_CD, owner_C = text_MD[torch.as_tensor(places, device=text_MD.device)], owner_M[places]
        fold_C = owner_C // (len(image_ND) // folds)
        hits = [_hits(image_ND, one_CD, owner_C, fold_C, folds) for one_CD in (true_CD, changed_CD)]
        for k in CUTOFFS:
            name = f"image_retrieval_recall@{k}_{way}"
            found[name] = Sampled.of(hits[1][k], images=owner_C, groups=fold_C)
            found[f"{name}_drop"] = Sampled.of(hits[0][k] - hits[1][k], images=owner_C, groups=fold_C)
        true_C, changed_C = (pair_scores(image_ND, owner_C, one_CD) for one_CD in (true_CD, changed_CD))
        preferred_C = (true_C > changed_C).double() + 0.5 * (true_C == changed_C)
        found[f"true_caption_preferred_{way}"] = Sampled.of(preferred_C, images=owner_C)
    return found


def _hits(image_ND: Tensor, text_CD: Tensor, owner_C: Tensor, fold_C: Tensor, folds: int) -> dict[int, Tensor]:
    """k → (C,) whether each text finds its image among the first k of its gallery."""
    size = len(image_ND) // folds
    found = {k: torch.empty(len(owner_C), dtype=torch.float64) for k in CUTOFFS}
    for fold in range(folds):
        here_C = fold_C == fold
        own_ND, image_N = image_ND[fold * size :][:size], torch.arange(size) + fold * size
        above, right, wrong = standing(text_CD[here_C.to(text_CD.device)], own_ND, owner_C[here_C], image_N)
        for k in CUTOFFS:
            found[k][here_C] = hit_share(above, right, wrong, k)
    return found
