"""The model card of an exported file: what it is, where it comes from, what it is good for, how to go back.

`X.card.json` holds the facts, `X.card.md` the same for readers, in Hugging Face's layout: a Markdown text
after a block of YAML (https://github.com/huggingface/hub-docs/blob/main/modelcard.md), so that it can be a
repository's README.md. One card is for all files of that stem that were exported from the same checkpoint.

No figure is in it without the run or the evaluation that made it, each by its checksum; what is not known it
says so.
"""

from tools.model_card.card import write_card
from tools.model_card.owner import OwnerTexts, read_owner_texts

__all__ = ["OwnerTexts", "read_owner_texts", "write_card"]
