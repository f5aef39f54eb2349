"""One module per task: the product itself, and TOSCA as published, per image and per batch."""
# N pictures, C columns, B batch, T tasks, D features

import time
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from model_store.answers import Answer
from model_store.backbone import BackboneManifest
from model_store.bank import ModuleBank
from model_store.module_file import ModuleFile, read_module
from model_store.selection import Selection, entropy
from training.continual.method import Columns, Predictions, decide
from training.continual.tasks import ContinualTask
from training.recipes import RecipeName
from training.trainer import train_task

PUBLISHED_BATCH = 48
BatchOrder = Literal["sorted", "shuffled"]


class _Trained(NamedTuple):
    file: ModuleFile
    seconds: float


class ModuleTrainer:
    """Trains tasks with the product's trainer, each once, whatever number of methods reads its module."""

    def __init__(self, backbone: BackboneManifest) -> None:
        self.backbone = backbone
        self._trained: dict[tuple[str, ...], _Trained] = {}

    def train(self, task: ContinualTask, recipe: RecipeName, seed: int) -> tuple[_Trained, float]:
        """The module, and the seconds saved because it was there already."""
        size = str(len(task.train.label_N))
        key = (recipe, str(seed), task.name, task.train.data_sha256, size, *task.train.labels)
        if key in self._trained:
            return self._trained[key], self._trained[key].seconds
        started = time.monotonic()
        data = train_task(
            task.name, task.train, self.backbone, recipe=recipe, seed=seed, label_space=task.label_space
        ).data
        self._trained[key] = _Trained(read_module(data), time.monotonic() - started)
        return self._trained[key], 0.0


@dataclass
class ModuleMethod:
    """The product: its trainer, its module files, its bank."""

    trainer: ModuleTrainer
    recipe: RecipeName
    selection: Selection
    seed: int

    def __post_init__(self) -> None:
        self.saved_s = 0.0
        self.columns = Columns()
        self._trained: list[_Trained] = []
        self._bank: ModuleBank | None = None
        self._column: dict[tuple[str, str], int] = {}

    def learn(self, task: ContinualTask) -> None:
        trained, saved_s = self.trainer.train(task, self.recipe, self.seed)
        self.saved_s += saved_s
        for label in task.train.labels:
            self._column[task.name, label] = len(self._column)
        self.columns = self.columns.extended(task.label_K)
        self._trained.append(trained)
        self._bank = None

    @property
    def bank(self) -> ModuleBank:
        if self._bank is None:
            self._bank = ModuleBank.build(
                [one.file.module for one in self._trained],
                revision=len(self._trained),
                backbone_fingerprint=self.trainer.backbone.fingerprint,
                feature_dim=self.trainer.backbone.feature_dim,
            )
        return self._bank

    @property
    def size_bytes(self) -> int:
        return sum(one.file.size_bytes for one in self._trained)

    def predict(self, cls_ND: Tensor) -> Predictions:
        answers = self.bank.answer(cls_ND, selection=self.selection, top_k=len(self._column))
        return self._read(answers, torch.ones(len(self._column), dtype=torch.bool))

    def predict_within(self, cls_ND: Tensor, task: int) -> Predictions:
        name = self._trained[task].file.module.task
        answers = self.bank.answer(cls_ND, task=name, top_k=len(self._column))
        return self._read(answers, self.columns.task_C == task)

    def prediction_sets(self, cls_ND: Tensor, coverage: float) -> list[frozenset[int]]:
        label_C = self.columns.label_C.tolist()
        return [
            frozenset(label_C[self._column[one.task, one.label]] for one in answer.prediction_set or ())
            for answer in self.bank.answer(cls_ND, top_k=1, coverage=coverage)
        ]

    def p_values(self, cls_ND: Tensor) -> Tensor:
        return torch.tensor([answer.p_value for answer in self.bank.answer(cls_ND, top_k=1)])

    def _read(self, answers: list[Answer], possible_C: Tensor) -> Predictions:
        """Answers list all but the least probable choices; what is missing to 1 is spread over the rest."""
        prob_NC = torch.full((len(answers), len(possible_C)), torch.nan, dtype=torch.float64)
        for prob_C, answer in zip(prob_NC, answers, strict=True):
            prob_C[self._column[answer.task, answer.label]] = answer.confidence
            for choice in answer.alternatives:
                prob_C[self._column[choice.task, choice.label]] = choice.probability
        unlisted_NC = prob_NC.isnan() & possible_C
        prob_NC = prob_NC.nan_to_num(nan=0.0)
        missing_N = (1.0 - prob_NC.sum(dim=1)).clamp_min(0.0) / unlisted_NC.sum(dim=1).clamp_min(1)
        return decide(torch.where(unlisted_NC, missing_N[:, None], prob_NC), self.columns, "probability")


@dataclass
class Tosca(ModuleMethod):
    """TOSCA with recipe "reference" and selection "entropy", for each image alone (Yildirim, Gok Yildirim,
    Vanschoren, TMLR 2026, arXiv 2502.14762). With the task given LuCA and its head answer by themselves,
    without the closed form that the product's bank adds within a task."""

    def predict_within(self, cls_ND: Tensor, task: int) -> Predictions:
        module = self._trained[task].file.module
        prob_NC = cls_ND.new_zeros(len(cls_ND), len(self._column), dtype=torch.float64)
        logits_NK = module.head(module.luca_output(cls_ND)).double()
        prob_NC[:, self.columns.task_C == task] = torch.softmax(logits_NK, dim=1)
        return decide(prob_NC, self.columns, "probability")


@dataclass
class BatchedTosca(Tosca):
    """As the published code answers: entropies averaged over PUBLISHED_BATCH pictures choose one module for
    all of them. `sorted` takes the pictures as they come, sorted by class as the published test loader has
    them, so that the batch gives the task away; `shuffled` mixes them first, as strangers' requests would.
    """

    batch_order: BatchOrder = "sorted"
    batch_size: int = PUBLISHED_BATCH

    def predict(self, cls_ND: Tensor) -> Predictions:
        order_N = torch.arange(len(cls_ND))
        if self.batch_order == "shuffled":
            order_N = torch.randperm(len(cls_ND), generator=torch.Generator().manual_seed(self.seed))
        prob_NC = torch.cat([self._answer_batch(cls_ND[rows]) for rows in order_N.split(self.batch_size)])
        return decide(prob_NC[order_N.argsort()], self.columns, "probability")

    def _answer_batch(self, cls_BD: Tensor) -> Tensor:
        head_CD = torch.cat([one.file.module.head.directions() for one in self._trained])
        best_entropy, best_BC = torch.inf, torch.empty(0)
        for module in (one.file.module for one in self._trained):
            cosine_BC = (module.directions(cls_BD) @ head_CD.T).double()
            log_prob_BC = torch.log_softmax(module.head.scale * cosine_BC, dim=1)
            uncertainty = float(entropy(log_prob_BC).mean())
            if uncertainty < best_entropy:
                best_entropy, best_BC = uncertainty, log_prob_BC.exp()
        return best_BC
