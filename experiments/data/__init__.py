"""Inputs of the experiments that need no network: running text for language models, digits for an image model."""

from experiments.data.digits import Digits, load_digits
from experiments.data.text import Text, load_text, text_tokens, token_windows

__all__ = ["Digits", "Text", "load_digits", "load_text", "text_tokens", "token_windows"]
