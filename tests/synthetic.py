"""Features made up for tests, and where the demo's real pictures and store lie."""

import os
from pathlib import Path

import torch

from training.features import LabelledFeatures

DEMO_STORE = os.environ.get("TOSCA_STORE", ".tosca/store")
DEMO_PICTURES = Path(".tosca/demo")


def make_features(
    name: str = "shapes",
    *,
    num_classes: int = 3,
    per_class: int = 12,
    num_test: int = 4,
    feature_dim: int = 192,
    seed: int = 0,
    spread: float = 0.5,
) -> LabelledFeatures:
    """Synthetic clusters in place of CLS vectors, with a train and a test split."""
    generator = torch.Generator().manual_seed(seed)
    mean_KD = torch.randn(num_classes, feature_dim, generator=generator) + 3.0 * torch.randn(
        1, feature_dim, generator=generator
    )
    label_N = torch.arange(num_classes).repeat_interleave(per_class + num_test)
    noise_ND = spread * torch.randn(len(label_N), feature_dim, generator=generator)
    splits = (["train"] * per_class + ["test"] * num_test) * num_classes
    return LabelledFeatures(
        name=name,
        labels=tuple(f"{name}-{k}" for k in range(num_classes)),
        cls_ND=mean_KD[label_N] + noise_ND,
        label_N=label_N,
        splits=tuple(splits),
        data_sha256="0" * 64,
        skipped=(),
        num_computed=0,
    )
