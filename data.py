"""Datasets: official files on disk -> lists of paths, labels, boxes, parts; photos -> uint8 tensors; and toy birds that need no files.

Order: splits -> photos to tensors -> batches -> folders and ImageNet -> the papers' datasets -> re-identification -> toy birds.
"""
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image


@dataclass
class Split:
    """One split as parallel lists; what a dataset does not have is None.

    Boxes are xyxy, half-open, in pixels of the photo on disk, and may reach over its edge.
    """

    paths: list  # str of a file; for the toy "birds/train/17"
    labels: list  # int class (re-identification: identity) per image
    boxes: np.ndarray | None = None  # (n, 4) float32 object boxes
    parts: np.ndarray | None = None  # (n, P, 4) float32 part boxes; a part that is not visible is nan
    part_names: tuple = ()  # P names
    signature: tuple = ()  # P bools: does this part carry the class (toy: yes or decoy; CUB: all yes)
    cameras: list | None = None  # re-identification: int camera per image
    query: list | None = None  # re-identification test: True for queries, False for the gallery
    images: list | None = None  # toy: the drawn images (H, W, 3) uint8; else photos are opened from paths

    def __len__(self):
        return len(self.paths)


@dataclass
class Splits:
    """train, test and optionally val, and the class names in label order."""

    train: Split
    test: Split
    classes: list
    val: Split | None = None
    note: str = ""  # printed before training: counts and version
