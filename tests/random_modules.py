"""Task modules with random content, without training: banks and files to put under a property."""
# K classes, D features, M calibration vectors, N training vectors

import dataclasses
import hashlib

import torch
from torch import Tensor

from model_store.backbone import BackboneManifest
from model_store.bank import ModuleBank
from model_store.calibration import CalibrationSet
from model_store.landmarks import LandmarkRidge, Standardisation
from model_store.luca import CosineHead, Flow, LuCA
from model_store.manifest import ModuleManifest
from model_store.module_file import round_weights, write_module
from model_store.preprocess import Preprocessing
from model_store.statistics import fit_class_statistics
from model_store.task_module import TaskModule

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
    ridge_weight: float = 1.0,
    standardised: bool = True,
    inside: bool = True,
    flow: Flow = "tosca",
) -> TaskModule:
    """A task of Gaussian clusters with random experts; `spread` widens the clusters until they overlap."""
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
    rows = torch.randperm(len(label_N), generator=generator)[:num_calibration]
    luca.requires_grad_(False)
    head.requires_grad_(False)
    standardisation = Standardisation.fit(cls_ND)
    ridge = LandmarkRidge(
        kernel_weight_MK=torch.randn(len(rows), num_classes, generator=generator),
        linear_weight_DK=torch.randn(feature_dim, num_classes, generator=generator),
    )
    module = TaskModule(
        task=task,
        labels=tuple(f"{task}-{k}" for k in range(num_classes)),
        sha256=hashlib.sha256(f"{task} {seed} {num_classes} {spread}".encode()).hexdigest(),
        standardisation=standardisation if standardised else None,
        luca=luca,
        head=head,
        ridge=round_weights(luca, head, ridge),
        luca_weight=luca_weight,
        ridge_weight=ridge_weight if standardised else 0.0,
        statistics=fit_class_statistics(cls_ND, label_N, num_classes),
        calibration=CalibrationSet(
            cls_MD=cls_ND[rows].half(),
            label_M=label_N[rows],
            logits_MK=torch.empty(0),
            held_out_logits_MK=torch.empty(0),
            in_statistics_M=torch.full((len(rows),), inside),
        ),
    )
    logits_MK = module.logits(cls_ND[rows]).clone()
    return with_calibration(module, logits_MK=logits_MK, held_out_logits_MK=logits_MK.clone())


def with_calibration(module: TaskModule, **tensors: Tensor) -> TaskModule:
    """The module with some tensors of its calibration set replaced."""
    return dataclasses.replace(module, calibration=dataclasses.replace(module.calibration, **tensors))


def without_calibration(module: TaskModule) -> TaskModule:
    """The module without calibration vectors, and so without landmarks."""
    empty = {
        field.name: getattr(module.calibration, field.name)[:0]
        for field in dataclasses.fields(CalibrationSet)
    }
    ridge = dataclasses.replace(
        module.ridge,
        kernel_weight_MK=module.ridge.kernel_weight_MK[:0],
    )
    return dataclasses.replace(with_calibration(module, **empty), ridge=ridge)


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
        "standardised": module.standardisation is not None,
        "luca_weight": module.luca_weight,
        "ridge_weight": module.ridge_weight,
    }
    return write_module(ModuleManifest.model_validate(manifest | fields), module)
