"""Save a checkpoint with random weights in bf16, for several comparisons: `random_model.py SHAPE FOLDER`."""

import sys
from pathlib import Path

import torch
from contest import VOCABULARY, save_random_model

if __name__ == "__main__":
    _, shape, folder = sys.argv
    save_random_model(Path(folder), shape, VOCABULARY[shape], torch.bfloat16)
