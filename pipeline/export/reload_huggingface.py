"""Loads an exported folder as any user would, and embeds what lies in another: python FILE FOLDER INPUTS.

Run as a script in a process of its own, so that nothing of this pipeline is loaded: what it writes is transformers'.
INPUTS holds texts.json, images 0000.png, 0001.png …, and pixels.npy, what open_clip's transform makes of them;
found.npz is written beside them, of those pixels, with what the folder's own processor makes of the images.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor


def main(folder: Path, inputs: Path) -> None:
    """Embed the pixels and the texts with the exported model and tokenizer, and process the images."""
    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    texts = json.loads((inputs / "texts.json").read_text(encoding="utf-8"))
    tokens = processor(text=texts, padding="max_length", truncation=True, return_tensors="pt")
    images = [Image.open(path) for path in sorted(inputs.glob("*.png"))]
    with torch.inference_mode():
        pixels = torch.from_numpy(np.load(inputs / "pixels.npy"))
        image_BD = model.get_image_features(pixel_values=pixels).pooler_output
        text_BD = model.get_text_features(**tokens).pooler_output
    found = {
        "images": torch.nn.functional.normalize(image_BD, dim=-1).numpy(),
        "texts": torch.nn.functional.normalize(text_BD, dim=-1).numpy(),
        "tokens": tokens.input_ids.numpy(),
        "logits": np.array([model.logit_scale.item(), 0.0]),
        "transformers_pixels": processor(images=images, return_tensors="np").pixel_values,
    }
    np.savez(inputs / "found.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
