"""Towers that tests take as fixtures."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.pipeline.towers import (
    BERT,
    CONFIGS,
    PLAIN,
)


@pytest.fixture
def bert(tmp_path) -> dict[str, Any]:
    """A model whose text tower is Hugging Face's, described by a folder."""
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BERT))
    text_cfg = {"hf_model_name": str(folder), "context_length": 8, "hf_pooler_type": "cls_pooler"}
    return {**PLAIN, "text_cfg": text_cfg}


@pytest.fixture
def config(request, bert) -> dict[str, Any]:
    return bert if request.param == "bert" else CONFIGS[request.param]
