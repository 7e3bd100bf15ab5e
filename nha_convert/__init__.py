"""Convert trained softmax-attention language models into Native Hybrid Attention models."""

__version__ = "0.1.0"
