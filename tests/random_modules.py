"""Task modules with random content, without training: banks and files to put under a property."""
# K classes, D features, M calibration vectors, N training vectors

import hashlib

import torch
from torch import Tensor

from model_store.backbone import BackboneManifest
from model_store.bank import ModuleBank, TaskModule
from model_store.calibration import CalibrationSet
from model_store.luca import CosineHead, Flow, LuCA
from model_store.module_file import ModuleManifest, write_module
from model_store.preprocess import Preprocessing
from model_store.statistics import fit_class_statistics

FEATURE_DIM = 16


def random_module(
    task: str,
    seed: int = 0,
    *,
    num_classes: int = 3,
    per_class: int = 6,
    num_calibration: int = 6,
    feature_dim: int = FEATURE_DIM,
    spread: float = 1.0,
    luca_weight: float = 1.0,
    closed_form_weight: float = 0.0,
    inside: bool = True,
    flow: Flow = "tosca",
) -> TaskModule:
    """A task of Gaussian clusters with a random module; `spread` widens the clusters until they overlap."""
    generator = torch.Generator().manual_seed(seed)
    mean_KD = torch.randn(num_classes, feature_dim, generator=generator)
    label_N = torch.arange(num_classes).repeat_interleave(per_class)
    cls_ND = mean_KD[label_N] + spread * torch.randn(len(label_N), feature_dim, generator=generator)
    cls_ND = cls_ND.half().float()  # so that calibration vectors are training vectors to the last bit
    luca = LuCA(feature_dim, flow=flow)
    luca.initialise(generator, identity=False)
    head = CosineHead(feature_dim, num_classes, scale=8.0)
    with torch.no_grad():
        head.weight_KD.normal_(generator=generator)
    luca.requires_grad_(False)
    head.requires_grad_(False)
    rows = torch.randperm(len(label_N), generator=generator)[:num_calibration]
    logits_MK = head(luca(cls_ND[rows]))
    return TaskModule(
        task=task,
        labels=tuple(f"{task}-{k}" for k in range(num_classes)),
        sha256=hashlib.sha256(f"{task} {seed} {num_classes} {spread}".encode()).hexdigest(),
        luca=luca,
        head=head,
        luca_weight=luca_weight,
        closed_form_weight=closed_form_weight,
        statistics=fit_class_statistics(cls_ND, label_N, num_classes),
        calibration=CalibrationSet(
            cls_MD=cls_ND[rows].half(),
            label_M=label_N[rows],
            logits_MK=logits_MK,
            held_out_logits_MK=logits_MK.clone(),
            in_statistics_M=torch.full((len(rows),), inside),
        ),
    )


def build_bank(
    modules: list[TaskModule], previous: ModuleBank | None = None, revision: int = 7
) -> ModuleBank:
    return ModuleBank.build(
        modules,
        revision=revision,
        backbone_fingerprint="b" * 64,
        feature_dim=modules[0].luca.feature_dim if modules else FEATURE_DIM,
        previous=previous,
    )


def random_cls(num: int, seed: int = 0, feature_dim: int = FEATURE_DIM) -> Tensor:
    return torch.randn(num, feature_dim, generator=torch.Generator().manual_seed(1000 + seed))


def backbone_manifest(feature_dim: int = FEATURE_DIM, weights: str = "0") -> BackboneManifest:
    """A backbone of the given width that nobody needs to load."""
    return BackboneManifest(
        architecture="vit_tiny_patch16_224",
        feature_dim=feature_dim,
        preprocessing=Preprocessing(
            height=32,
            width=32,
            crop_fraction=0.9,
            interpolation="bicubic",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        weights_sha256=weights * 64,
        source="tests",
    )


def module_bytes(module: TaskModule, backbone: BackboneManifest | None = None, **fields: object) -> bytes:
    """The module file of a TaskModule; `fields` replace those of its manifest."""
    backbone = backbone or backbone_manifest(module.luca.feature_dim)
    manifest = {
        "task": module.task,
        "labels": module.labels,
        "backbone_fingerprint": backbone.fingerprint,
        "feature_dim": module.luca.feature_dim,
        "bottleneck_dim": module.luca.bottleneck_dim,
        "flow": module.luca.flow,
        "luca_weight": module.luca_weight,
        "closed_form_weight": module.closed_form_weight,
    }
    return write_module(
        ModuleManifest.model_validate(manifest | fields),
        module.luca,
        module.head,
        module.statistics,
        module.calibration,
    )
