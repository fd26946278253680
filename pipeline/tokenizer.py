"""Captions → token ids behind one call: by a SentencePiece model, open_clip's byte-pair encoding, or Hugging Face's.

All are called as `tokenize(texts) -> (B, L) int64`, L = context length, and cut what is too long.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from data_prep.record import DataError
from pipeline.model import check_tokenizer

# What a run keeps of its tokenizer, in RUN/tokenizer.
FILES = {"sentencepiece": "sentencepiece.model", "huggingface": "huggingface", "open_clip": ""}
# Words whose ids open_clip's tokenizer keeps at hand.
REMEMBERED = 100_000


class TokenizerError(DataError):
    """A tokenizer that is missing, or that does not fit the text tower."""


class Tokenizer(Protocol):
    """What the loader, the evaluators and the export need of a tokenizer."""

    context_length: int
    vocab_size: int
    pad_id: int

    @property
    def end_id(self) -> int | None:
        """What stands behind a text."""
        ...

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B,) texts → (B, L) int64."""
        ...


@dataclass
class SentencePieceTokenizer:
    """bos, pieces, eos, then padding; texts are cleaned as open_clip's HFTokenizer cleans them."""

    path: Path
    context_length: int
    pieces: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        import sentencepiece
        from open_clip.tokenizer import get_clean_fn

        if not self.path.is_file():
            raise TokenizerError(
                f"{self.path}: no SentencePiece model there. `python -m data_prep vocabulary DATA --out FILE` makes "
                "one; the recipe names it in tokenizer.path."
            )
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise TokenizerError(f"{self.path}: not a SentencePiece model ({error}).") from None
        self.vocab_size: int = self.pieces.vocab_size()
        self.pad_id, self.bos_id, self.end_id = self.pieces.pad_id(), self.pieces.bos_id(), self.pieces.eos_id()
        if min(self.pad_id, self.bos_id, self.end_id) < 0:
            raise TokenizerError(
                f"{self.path}: has no pad, bos or eos piece (ids {self.pad_id}, {self.bos_id}, {self.end_id}). "
                "Train it with `python -m data_prep vocabulary`, which reserves them."
            )
        self._clean = get_clean_fn("whitespace")

    def __call__(self, texts: Sequence[str]) -> Tensor:
        pieces = self.pieces.encode([cleaned(text, self._clean) for text in texts])
        return padded(pieces, self.context_length, self.bos_id, self.end_id, self.pad_id)


@dataclass
class OpenClipTokenizer:
    """open_clip's SimpleTokenizer, the byte-pair encoding of the original CLIP."""

    context_length: int

    def __post_init__(self) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self.simple = SimpleTokenizer(context_length=self.context_length)
        self.vocab_size: int = self.simple.vocab_size
        self._start, self.end_id = self.simple.all_special_ids[:2]
        self.pad_id = 0
        self._ids: dict[str, list[int]] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        ids = [self._encode(text) for text in texts]
        return padded(ids, self.context_length, self._start, self.end_id, self.pad_id)

    def _encode(self, text: str) -> list[int]:
        """SimpleTokenizer's ids, word by word, so that a word that has been seen costs a look-up."""
        ids: list[int] = []
        for word in self.simple.pat.findall(cleaned(text, self.simple.clean_fn).lower()):
            ids += self._ids.get(word) or self._ids_of(word)
        return ids

    def _ids_of(self, word: str) -> list[int]:
        if len(self._ids) >= REMEMBERED:
            self._ids.clear()
            self.simple.cache.clear()  # it would grow for as long as there are new words
        letters = "".join(self.simple.byte_encoder[byte] for byte in word.encode("utf-8"))
        self._ids[word] = [self.simple.encoder[piece] for piece in self.simple.bpe(letters).split(" ")]
        return self._ids[word]


@dataclass
class HuggingFaceTokenizer:
    """What belongs to a Hugging Face text tower, such as BERT's; used as open_clip's HFTokenizer uses it."""

    path: Path
    context_length: int

    def __post_init__(self) -> None:
        from open_clip.tokenizer import get_clean_fn

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it tells of forked loader processes otherwise
        self.theirs = _from_huggingface(str(self.path))
        if self.theirs.pad_token_id is None:
            raise TokenizerError(f"{self.path}: has no token to pad with. Choose another tokenizer.path.")
        self.vocab_size: int = len(self.theirs)
        ends = self.theirs.sep_token_id, self.theirs.eos_token_id
        self.end_id: int | None = next((end for end in ends if end is not None), None)
        self.pad_id: int = self.theirs.pad_token_id
        self._clean = get_clean_fn("whitespace")

    def __call__(self, texts: Sequence[str]) -> Tensor:
        clean = [cleaned(text, self._clean) for text in texts]
        limits = {"max_length": self.context_length, "padding": "max_length", "truncation": True}
        ids: Tensor = self.theirs(clean, return_tensors="pt", **limits).input_ids
        return ids


def _from_huggingface(name: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise TokenizerError(
            "tokenizer.kind huggingface needs transformers: pip install 'clip-pipeline[hf]'."
        ) from None
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise TokenizerError(
            f"tokenizer.path {name!r}: no tokenizer of Hugging Face's there ({str(error).splitlines()[0]}). Give a "
            "name on its hub, or a folder that holds one."
        ) from error


def cleaned(text: str, clean: Callable[[str], str]) -> str:
    """What open_clip's `clean` makes of a text, at once where that is only to even out blanks.

    ftfy and html.unescape, a third of the time that tokenising takes, leave printable ASCII without & as it is.
    """
    plain = text.isascii() and text.isprintable() and "&" not in text
    return " ".join(text.split()) if plain else clean(text)


def padded(pieces: Sequence[list[int]], length: int, start: int, end: int, pad: int) -> Tensor:
    """(B, length) int64: start, ids, end, then padding; what is too long is cut before the end."""
    token_BL = np.full((len(pieces), length), pad, dtype=np.int64)
    for row, ids in enumerate(pieces):
        ids = [start, *ids[: length - 2], end]
        token_BL[row, : len(ids)] = ids
    return torch.from_numpy(token_BL)


def load(kind: str, path: Path, model_cfg: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a recipe, checked against open_clip's model_cfg.

    Args:
        kind: as in the recipe.
        path: the recipe's, or what a run has kept (`kept`).
        model_cfg: with the text tower that it is for.

    Raises:
        TokenizerError: it is missing or malformed.
        ModelError: its ids outnumber the embedding, or the tower would take a token for the text that is not its end.
    """
    context_length = int(model_cfg["text_cfg"].get("context_length", 77))
    makers: dict[str, Callable[[], Tokenizer]] = {
        "sentencepiece": lambda: SentencePieceTokenizer(path, context_length),
        "huggingface": lambda: HuggingFaceTokenizer(path, context_length),
        "open_clip": lambda: OpenClipTokenizer(context_length),
    }
    tokenizer = makers[kind]()
    check_tokenizer(model_cfg, vocab_size=tokenizer.vocab_size, end_id=tokenizer.end_id, pad_id=tokenizer.pad_id)
    return tokenizer


def kept(kind: str, folder: Path) -> Path:
    """Where in RUN/tokenizer a tokenizer is."""
    return folder / FILES[kind]


def store(kind: str, path: Path, folder: Path) -> Path:
    """Copy what a run's tokenizer needs into `folder`, and return the path to load it from."""
    folder.mkdir(parents=True, exist_ok=True)
    target = kept(kind, folder)
    if kind == "sentencepiece" and path != target:
        if not path.is_file():
            raise TokenizerError(f"{path or 'tokenizer.path'}: no such file. The recipe names it in tokenizer.path.")
        shutil.copyfile(path, target)
    if kind == "huggingface":
        _from_huggingface(str(path)).save_pretrained(target)
    return target
