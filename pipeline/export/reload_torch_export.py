"""Runs exported programs on what lies in another folder: python FILE FOLDER INPUTS; see parity.compare.

Run as a script in a process of its own, with torch and numpy only.
"""

import sys
from pathlib import Path

import numpy as np
import torch


def main(folder: Path, inputs: Path) -> None:
    """Embed pixels.npy and tokens.npy: one by itself, then the others together."""
    found = {}
    for output, tower, name in (("images", "image", "pixels"), ("texts", "text", "tokens")):
        module = torch.export.load(folder / f"{tower}.pt2").module()
        rows = torch.from_numpy(np.load(inputs / f"{name}.npy"))
        with torch.inference_mode():
            found[output] = torch.cat([module(part) for part in (rows[:1], rows[1:])]).numpy()
    np.savez(inputs / "found.npz", images=found["images"], texts=found["texts"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
