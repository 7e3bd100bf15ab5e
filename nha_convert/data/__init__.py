"""From a recipe's sources to training items and held-out text, the same on every run of the same recipe.

Item i of a stage depends on (seed, stage, i) alone: nothing has to be replayed to resume, and no global random state
is read.
"""

from .held_out import held_out_tokens, recall_filler
from .rows import PackedDataset
from .sources import HELD_OUT_EVERY, SPLITS, texts
from .stage_data import training_dataset
from .token_file import TokenStream
from .tokens import token_stream
from .windows import WindowDataset

__all__ = [
    "HELD_OUT_EVERY",
    "SPLITS",
    "PackedDataset",
    "TokenStream",
    "WindowDataset",
    "held_out_tokens",
    "recall_filler",
    "texts",
    "token_stream",
    "training_dataset",
]
