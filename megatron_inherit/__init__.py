"""Makes a small base language model out of a large one and pretrains it at cluster scale."""

__version__ = "0.1.0"
