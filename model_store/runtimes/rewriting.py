"""A model as it is exported: written for the engines that run its graph."""

from torch import nn

from model_store.preprocess import Preprocessing
from model_store.runtimes.byte_patches import byte_patches
from model_store.runtimes.cls_block import for_cls_alone
from model_store.runtimes.narrow_sums import narrow_sums
from model_store.runtimes.split_attention import split_attention


def rewritten(model: nn.Module, preprocessing: Preprocessing) -> nn.Module:
    """The model, whose vectors are the same but for rounding; parts that are not plain stay as they are."""
    model = narrow_sums(for_cls_alone(model))
    return split_attention(byte_patches(model, preprocessing))
