"""Texts without the padding behind them: the embeddings of the whole context, from towers of any kind."""

from __future__ import annotations

import open_clip
import pytest
import torch

from pipeline.evaluate.short_texts import encode_texts
from tests.pipeline.towers import PLAIN

LENGTHS = [3, 5, 1, 4]
CONTEXT, END = 12, 49

TOWERS = {
    "plain": {},
    "plain, end by its id": {"pool_type": "eos", "eos_id": END - 1},
    "bidirectional": {"no_causal_mask": True},
    "read off at the last place": {"pool_type": "last"},
    "read off at the first place": {"pool_type": "first"},
}


def built(text_cfg, kind):
    torch.manual_seed(0)
    cfg = {**PLAIN, "text_cfg": {**PLAIN["text_cfg"], "context_length": CONTEXT, **text_cfg}}
    towers = kind(**cfg).eval().double()
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)  # biases and all, so that every token counts
    return towers


def tokens():
    """Random texts of LENGTHS; behind each the end, then what is not looked at."""
    torch.manual_seed(1)
    token_BL = torch.randint(1, END - 1, (len(LENGTHS), CONTEXT))
    for row, length in zip(token_BL, LENGTHS, strict=True):
        row[length] = END
        row[length + 1 :] = 0
    token_BL[1, LENGTHS[1]] = END - 1
    return token_BL


def lengths_seen(towers):
    """The lengths of what the text tower is given from now on."""
    seen = []
    embedding = towers.token_embedding if isinstance(towers, open_clip.CLIP) else towers.text.token_embedding
    embedding.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[1]))
    return seen


@torch.no_grad()
@pytest.mark.parametrize("kind", [open_clip.CLIP, open_clip.CustomTextCLIP])
@pytest.mark.parametrize("name", TOWERS)
def test_embeddings_are_those_of_the_whole_context(name, kind):
    towers, token_BL = built(TOWERS[name], kind), tokens()
    whole = towers.encode_text(token_BL, normalize=True)
    state = {key: value.clone() for key, value in towers.state_dict().items()}
    seen = lengths_seen(towers)
    torch.testing.assert_close(encode_texts(towers, token_BL), whole, rtol=0, atol=1e-12)
    assert (whole[0] - whole[1]).abs().max() > 1e-3
    assert seen == [6 if "plain" in name else CONTEXT]
    # The towers are as they were, and texts that fill the context go through.
    torch.testing.assert_close(towers.encode_text(token_BL, normalize=True), whole, rtol=0, atol=0)
    assert all(torch.equal(value, state[key]) for key, value in towers.state_dict().items())
    token_BL[2] = torch.arange(CONTEXT) + END - CONTEXT + 1
    torch.testing.assert_close(
        encode_texts(towers, token_BL), towers.encode_text(token_BL, normalize=True), rtol=0, atol=1e-12
    )


@torch.no_grad()
def test_a_tower_with_a_class_token_behind_the_text_gets_everything():
    towers, token_BL = built({"embed_cls": True}, open_clip.CustomTextCLIP), tokens()
    whole = towers.encode_text(token_BL, normalize=True)
    torch.testing.assert_close(encode_texts(towers, token_BL), whole, rtol=0, atol=0)
