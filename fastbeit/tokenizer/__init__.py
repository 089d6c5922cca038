"""Image tokenizers: DALL-E's discrete VAE, converted safely, and one's own, trained here.

``load_tokenizer("dall-e" | "demo" | path)`` gives a frozen ``Tokenizer``;
``python -m fastbeit.tokenizer.convert`` turns the published pickles into safetensors;
``python -m fastbeit.tokenizer.train`` trains a new one on a folder of images.
"""

from fastbeit.tokenizer.dvae import DvaeConfig
from fastbeit.tokenizer.files import load_tokenizer, save_tokenizer
from fastbeit.tokenizer.tokenizer import Tokenizer

__all__ = ["DvaeConfig", "Tokenizer", "load_tokenizer", "save_tokenizer"]
