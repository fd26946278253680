"""Captions → token ids: a SentencePiece model or open_clip's byte-pair encoding behind one call.

Both are called as `tokenize(texts) -> (B, L) int64`, L = context length, and cut what is too long.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from data_prep.record import DataError

MODEL_FILE = "sentencepiece.model"


class TokenizerError(DataError):
    """A tokenizer that is missing, or that does not fit the text tower."""


class Tokenizer(Protocol):
    """What the loader, the evaluators and the export need of a tokenizer."""

    context_length: int
    vocab_size: int

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
        self.pad_id, self.bos_id, self.eos_id = self.pieces.pad_id(), self.pieces.bos_id(), self.pieces.eos_id()
        if min(self.pad_id, self.bos_id, self.eos_id) < 0:
            raise TokenizerError(
                f"{self.path}: has no pad, bos or eos piece (ids {self.pad_id}, {self.bos_id}, {self.eos_id}). "
                "Train it with `python -m data_prep vocabulary`, which reserves them."
            )
        self._clean = get_clean_fn("whitespace")

    def __call__(self, texts: Sequence[str]) -> Tensor:
        token_BL = torch.full((len(texts), self.context_length), self.pad_id, dtype=torch.int64)
        for row, ids in enumerate(self.pieces.encode([self._clean(text) for text in texts])):
            ids = [self.bos_id, *ids[: self.context_length - 2], self.eos_id]
            token_BL[row, : len(ids)] = torch.tensor(ids)
        return token_BL


@dataclass
class OpenClipTokenizer:
    """open_clip's SimpleTokenizer, the byte-pair encoding of the original CLIP."""

    context_length: int

    def __post_init__(self) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self._encode = SimpleTokenizer(context_length=self.context_length)
        self.vocab_size: int = self._encode.vocab_size

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self._encode(list(texts))


def load(kind: str, path: Path, text_cfg: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a recipe, checked against open_clip's text_cfg.

    Raises:
        TokenizerError: the model file is missing or malformed, its pieces outnumber the embedding, or the tower
            would pool a token that is not the end of the text.
    """
    context_length = int(text_cfg.get("context_length", 77))
    if kind == "open_clip":
        tokenizer: Tokenizer = OpenClipTokenizer(context_length)
    else:
        tokenizer = sentencepiece = SentencePieceTokenizer(path, context_length)
        _check_pooling(sentencepiece, text_cfg)
    embeddings = int(text_cfg.get("vocab_size", 49408))
    if tokenizer.vocab_size > embeddings:
        raise TokenizerError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the text tower {embeddings} embeddings. "
            f"Set model.config.text_cfg.vocab_size to {tokenizer.vocab_size}, or train a smaller vocabulary."
        )
    return tokenizer


def store(kind: str, path: Path, folder: Path) -> Path:
    """Copy what a run's tokenizer needs into `folder`, and return the path to load it from."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / MODEL_FILE
    if kind == "sentencepiece" and path != target:
        if not path.is_file():
            raise TokenizerError(f"{path or 'tokenizer.path'}: no such file. The recipe names it in tokenizer.path.")
        shutil.copyfile(path, target)
    return target


def _check_pooling(tokenizer: SentencePieceTokenizer, text_cfg: dict[str, Any]) -> None:
    # open_clip's default, argmax, takes the largest id for the end of the text; in SentencePiece it is any piece.
    pool, eos, pad = text_cfg.get("pool_type", "argmax"), text_cfg.get("eos_id", 2), text_cfg.get("pad_id", 0)
    if pool != "eos" or eos != tokenizer.eos_id or pad != tokenizer.pad_id:
        raise TokenizerError(
            f"model.config.text_cfg has pool_type {pool!r}, eos_id {eos}, pad_id {pad}; with this SentencePiece model "
            f"it must be pool_type: eos, eos_id: {tokenizer.eos_id}, pad_id: {tokenizer.pad_id}, or a wrong token "
            "would stand for the text."
        )
