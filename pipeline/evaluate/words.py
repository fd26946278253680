"""Results in words: what a table calls each figure, and what a model can and cannot do, judged by its intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Metric → what people are told it is.
LABELS = {
    "acc1": "top-1 accuracy",
    "acc5": "top-5 accuracy",
    "mean_per_class_recall": "mean per-class recall",
    "mean_per_class_precision": "mean per-class precision",
    "mean_per_class_f1": "mean per-class F1",
    "image_retrieval_recall@1": "text → image R@1",
    "image_retrieval_recall@5": "text → image R@5",
    "image_retrieval_recall@10": "text → image R@10",
    "image_retrieval_median_rank": "text → image median rank",
    "text_retrieval_recall@1": "image → text R@1",
    "text_retrieval_recall@5": "image → text R@5",
    "text_retrieval_recall@10": "image → text R@10",
    "text_retrieval_median_rank": "image → text median rank",
    "acc": "right caption chosen",
    "vqa_accuracy": "VQA accuracy",
    "vqa_accuracy_yes_no": "VQA accuracy, yes or no",
    "vqa_accuracy_number": "VQA accuracy, numbers",
    "vqa_accuracy_other": "VQA accuracy, other answers",
    "lp_acc1": "linear probe, top-1 accuracy",
    "lp_acc5": "linear probe, top-5 accuracy",
    "knn_acc1": "nearest neighbours, top-1 accuracy",
    "true_caption_preferred_shuffled": "caption preferred to its words in another order",
    "true_caption_preferred_nouns_exchanged": "caption preferred to one with two nouns exchanged",
    "true_caption_preferred_noun_replaced": "caption preferred to one with another noun",
    "image_retrieval_recall@1_held_out": "text → image R@1, held-out pairs",
    "image_retrieval_recall@1_train": "text → image R@1, as many train pairs",
    "image_retrieval_recall@1_memorised": "the difference",
    "text_retrieval_recall@1_held_out": "image → text R@1, held-out pairs",
    "text_retrieval_recall@1_train": "image → text R@1, as many train pairs",
    "text_retrieval_recall@1_memorised": "the difference",
}
# Metric → what a model does that is good at it; a set is judged by those that it has.
SKILLS = {
    "acc1": "names the right class",
    "image_retrieval_recall@1": "finds the image that a caption belongs to",
    "acc": "prefers the right caption to the wrong ones",
    "vqa_accuracy": "gives annotators' answers",
    "lp_acc1": "names the right class through a linear probe",
    "true_caption_preferred_shuffled": "prefers a caption to its words in another order",
    "true_caption_preferred_nouns_exchanged": "prefers a caption to the same with two nouns exchanged",
    "true_caption_preferred_noun_replaced": "prefers a caption to the same with another noun",
}


def rows(record: dict[str, Any]) -> list[dict[str, str]]:
    """The table's rows of one evaluation set."""
    found: list[dict[str, str]] = []
    for name, value in record["metrics"].items():
        low, high = record["intervals"][name]
        found.append(
            {
                "set": record["dataset"] if not found else "",
                "images": f"{record['images']:,}" if not found else "",
                "metric": LABELS.get(name, name.replace("_", " ")),
                "value": f"{value:.3f}",
                "interval": f"{low:.3f} – {high:.3f}",
                "chance": f"{record['chance'][name]:.3f}" if name in record["chance"] else "",
            }
        )
    return found


def verdicts(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """above, chance, below → each set in a sentence, judged by whether its interval holds the chance level."""
    found: dict[str, list[dict[str, str]]] = {"above": [], "chance": [], "below": []}
    for record in results:
        for name in (name for name in SKILLS if name in record["metrics"]):
            low, high = record["intervals"][name]
            value, chance = record["metrics"][name], record["chance"][name]
            state = "above" if low > chance else "below" if high < chance else "chance"
            words = f"{SKILLS[name]} in {value:.1%} of cases ({low:.1%} – {high:.1%}); guessing gives {chance:.1%}"
            found[state].append({"set": record["dataset"], "words": words})
    return found
