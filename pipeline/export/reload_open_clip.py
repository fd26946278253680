"""Loads an exported folder as any user would, and embeds what lies in another: python FILE FOLDER INPUTS.

Run as a script in a process of its own, so that nothing of this pipeline is loaded: what comes out is open_clip's.
"""

import json
import sys
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image


def main(folder: Path, inputs: Path) -> None:
    """Embed the images and texts with the exported model, preprocessing and tokenizer."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    images = torch.stack([preprocess(Image.open(path)) for path in sorted(inputs.glob("*.png"))])
    tokens = tokenize(json.loads((inputs / "texts.json").read_text(encoding="utf-8")))
    model.eval()
    zero = torch.zeros(())
    with torch.inference_mode():
        found = {
            "images": model.encode_image(images, normalize=True),
            "texts": model.encode_text(tokens, normalize=True),
            "tokens": tokens,
            "logits": torch.stack([model.logit_scale, zero if model.logit_bias is None else model.logit_bias]),
        }
    np.savez(inputs / "found.npz", **{name: tensor.numpy() for name, tensor in found.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
