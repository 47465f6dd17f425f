"""From images in folders and archives to one dataset that the fast loaders read, and its manifest."""

from tools.convert.convert import convert

__all__ = ["convert"]
