"""Ridgeline: measures what an LLM server really does, and holds it against what theory predicts."""

__version__ = "0.1.0"
