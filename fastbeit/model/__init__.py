"""BEiT: encoder, masked-image-modelling head, classifier."""

from fastbeit.model.backends import Backends
from fastbeit.model.classifier import BeitClassifier
from fastbeit.model.config import BeitConfig
from fastbeit.model.mim import BeitForMim
from fastbeit_kernels import MimLoss

__all__ = ["Backends", "BeitClassifier", "BeitConfig", "BeitForMim", "MimLoss"]
