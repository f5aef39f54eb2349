"""The methods by the names of the command line."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from model_store.backbone import BackboneManifest
from model_store.errors import InvalidRequest
from training.continual.class_means import Lda, SimpleCil
from training.continual.joint_linear import JointLinear
from training.continual.mahalanobis import FeCam
from training.continual.method import Method
from training.continual.modules import BatchedTosca, ModuleMethod, ModuleTrainer, Tosca
from training.continual.random_ridge import PUBLISHED_WIDTH, RanPac


@dataclass(frozen=True)
class Workshop:
    """What methods are made from in one run: shared modules and the options of the command line."""

    trainer: ModuleTrainer
    ranpac_width: int = PUBLISHED_WIDTH

    @classmethod
    def open(cls, backbone: BackboneManifest, ranpac_width: int = PUBLISHED_WIDTH) -> "Workshop":
        return cls(ModuleTrainer(backbone), ranpac_width)


@dataclass(frozen=True, slots=True)
class MethodEntry:
    make: Callable[[Workshop, int], Method]
    told_task: bool = False  # answers with the true task given
    about: str = ""


def _reference(workshop: Workshop, seed: int) -> Method:
    return Tosca(workshop.trainer, "reference", "entropy", seed)


def _default(workshop: Workshop, seed: int) -> Method:
    return ModuleMethod(workshop.trainer, "default", "lda", seed)


METHODS: dict[str, MethodEntry] = {
    "default": MethodEntry(_default, about="the product"),
    "default_oracle": MethodEntry(_default, told_task=True, about="the product, true task given"),
    "simplecil": MethodEntry(lambda _, __: SimpleCil(), about="cosine to class means"),
    "lda": MethodEntry(lambda _, __: Lda(), about="linear discriminant analysis"),
    "ranpac": MethodEntry(lambda w, seed: RanPac(w.ranpac_width, seed), about="ridge on random features"),
    "fecam": MethodEntry(lambda _, __: FeCam(), about="Mahalanobis distance of each class"),
    "joint_linear": MethodEntry(lambda _, seed: JointLinear(seed), about="logistic regression on everything"),
    "tosca_reference": MethodEntry(_reference, about="TOSCA, entropy of each image"),
    "tosca_reference_batched_sorted": MethodEntry(
        lambda w, seed: BatchedTosca(w.trainer, "reference", "entropy", seed, "sorted"),
        about="TOSCA as published: class-sorted batches leak the task",
    ),
    "tosca_reference_batched_shuffled": MethodEntry(
        lambda w, seed: BatchedTosca(w.trainer, "reference", "entropy", seed, "shuffled"),
        about="TOSCA, batches of strangers",
    ),
    "tosca_reference_oracle": MethodEntry(_reference, told_task=True, about="TOSCA, true task given"),
}


def check_methods(names: Iterable[str]) -> tuple[str, ...]:
    """The names, each once; raises InvalidRequest for one that does not exist."""
    chosen = tuple(dict.fromkeys(names))
    for name in chosen:
        if name not in METHODS:
            raise InvalidRequest(f"unknown method {name!r}: expected some of {', '.join(METHODS)}")
    if not chosen:
        raise InvalidRequest(f"no method named: expected some of {', '.join(METHODS)}")
    return chosen
