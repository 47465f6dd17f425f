"""From a folder of images to one FFCV dataset file and its manifest."""

from tools.convert.convert import convert

__all__ = ["convert"]
