"""A program of its own: FFCV's writer on an image folder, as its users call it; prints the seconds it took.

Arguments: folder, dataset to write, max side, JPEG quality, worker processes. Importing is not counted.
"""

import sys
import time

from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from torchvision.datasets import ImageFolder


def main(folder: str, dataset: str, max_side: str, quality: str, workers: str) -> float:
    """Convert; returns seconds of wall time."""
    start = time.perf_counter()
    image = RGBImageField(write_mode="jpg", max_resolution=int(max_side), jpeg_quality=int(quality))
    writer = DatasetWriter(dataset, {"image": image, "label": IntField()}, num_workers=int(workers))
    writer.from_indexed_dataset(ImageFolder(folder))
    return time.perf_counter() - start


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
