"""The module bank: every active task in memory, immutable, and the answer it gives to a CLS vector.

A bank is built once for a revision and never changed; a request keeps the bank it was admitted with, so
no registration can change an answer half-way. The answer to an image is

    arg max over (task, class) of P(task | x) · P(class | task, x)

and since the second factor is at most 1, a task whose P(task | x) is below the best joint probability
found so far cannot win: modules are evaluated in that order until none can, which is exact.
"""
# B batch, N vectors, K classes (of one task or of all), C classes of one task, T tasks, D features,
# M calibration vectors

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from model_store.blend import Blend, Evidence, fit_blend
from model_store.errors import InvalidRequest, UnknownTask
from model_store.selection import Selection, WhitenedCosine, entropy, task_log_probs
from model_store.statistics import PooledStatistics
from model_store.task_module import TaskModule

# Alternatives less likely than this are not listed, so that a long list never forces every module to run.
MIN_ALTERNATIVE_PROBABILITY = 1e-3
# The blend is fitted on at most this many calibration vectors of all tasks together.
MAX_BLEND_VECTORS = 4096


@dataclass(frozen=True, slots=True)
class Receipt:
    """What answered: enough to compute the same answer again."""

    revision: int
    module_sha256: str
    backbone_fingerprint: str


@dataclass(frozen=True, slots=True)
class Choice:
    task: str
    label: str
    probability: float


@dataclass(frozen=True, slots=True)
class Answer:
    """The most probable (task, label), its calibrated probability, and the runners-up."""

    task: str
    label: str
    confidence: float
    task_probability: float
    alternatives: tuple[Choice, ...]
    receipt: Receipt
    num_modules_evaluated: int


@dataclass(frozen=True)
class ModuleBank:
    """All active tasks of one revision, sorted by name, with what depends on them together."""

    revision: int
    backbone_fingerprint: str
    feature_dim: int
    modules: tuple[TaskModule, ...]
    pooled: PooledStatistics
    device: torch.device
    selector: WhitenedCosine | None
    blend: Blend
    task_of_class_K: Tensor
    first_class: tuple[int, ...]
    _index: dict[str, int] = field(repr=False)

    @classmethod
    def build(
        cls,
        modules: Iterable[TaskModule],
        *,
        revision: int,
        backbone_fingerprint: str,
        feature_dim: int,
        device: torch.device | str = "cpu",
        previous: "ModuleBank | None" = None,
    ) -> "ModuleBank":
        """The bank of `modules`, whose tensors are already on `device`.

        `previous` only saves work: the pooled statistics are then changed by the difference, which is
        exact, so the bank is the same as one built from nothing.
        """
        device = torch.device(device)
        ordered = tuple(sorted(modules, key=lambda module: module.task))
        assert len({module.task for module in ordered}) == len(ordered), "task names are unique in a revision"
        pooled = _pool(ordered, feature_dim, previous)
        sizes = [len(module.labels) for module in ordered]
        first_class = tuple(accumulate(sizes, initial=0))[: len(sizes)]
        selector = None
        if ordered:
            mean_KD = torch.cat([module.statistics.mean_KD.cpu() for module in ordered])
            selector = WhitenedCosine.fit(mean_KD, pooled).to(device)
        bank = cls(
            revision=revision,
            backbone_fingerprint=backbone_fingerprint,
            feature_dim=feature_dim,
            modules=ordered,
            pooled=pooled,
            device=device,
            selector=selector,
            blend=Blend(),
            task_of_class_K=torch.repeat_interleave(
                torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64)
            ).to(device),
            first_class=first_class,
            _index={module.task: i for i, module in enumerate(ordered)},
        )
        return replace(bank, blend=fit_blend(bank._sampled_evidence())) if ordered else bank

    def __len__(self) -> int:
        return len(self.modules)

    def __contains__(self, task: str) -> bool:
        return task in self._index

    def module(self, task: str) -> TaskModule:
        return self.modules[self._find(task)]

    def _find(self, task: str) -> int:
        try:
            return self._index[task]
        except KeyError:
            raise UnknownTask(f"task {task!r} is not active in revision {self.revision}") from None

    # -- answering -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def answer(
        self,
        cls_BD: Tensor,
        *,
        selection: Selection = "lda",
        task: str | None = None,
        top_k: int = 5,
    ) -> list[Answer]:
        """Answer each of [B, D] float32 CLS vectors for itself; with `task`, that module decides."""
        if top_k < 1:
            raise InvalidRequest(f"top_k is {top_k}, at least 1 is needed")
        if not self.modules:
            raise InvalidRequest("no task is registered yet: register a module file first")
        cls_BD = cls_BD.to(self.device, torch.float32)
        if task is not None:
            return self._answer_within(cls_BD, self._find(task), top_k)
        if selection == "entropy":
            return self._answer_by_entropy(cls_BD, top_k)
        score_BK = self._selection_scores(cls_BD)
        return self._search(cls_BD, score_BK, self._task_log_probs(score_BK), top_k)

    def closed_form_answer(self, cls_BD: Tensor) -> tuple[Tensor, Tensor]:
        """([B] task index, [B] class index within the task) by plain LDA: the baseline modules must beat."""
        assert self.selector is not None, "a bank with tasks has a selector"
        best_B = self.selector.lda_scores(cls_BD.to(self.device)).argmax(dim=1)
        task_B = self.task_of_class_K[best_B]
        return task_B, best_B - torch.tensor(self.first_class, device=self.device)[task_B]

    def _selection_scores(self, cls_BD: Tensor) -> Tensor:
        assert self.selector is not None, "a bank with tasks has a selector"
        return self.selector.scores(cls_BD)

    def _task_log_probs(self, score_BK: Tensor) -> Tensor:
        return task_log_probs(self.blend.sharpness * score_BK, self.task_of_class_K, len(self.modules))

    def _classes(self, task_index: int) -> slice:
        start = self.first_class[task_index]
        return slice(start, start + len(self.modules[task_index].labels))

    def _search(
        self,
        cls_BD: Tensor,
        score_BK: Tensor,
        log_task_BT: Tensor,
        top_k: int,
        known: "tuple[int, Tensor] | None" = None,
    ) -> list[Answer]:
        """Evaluate modules in order of P(task | x) until no further one can enter the listed answers.

        `known` replaces one task's head logits by given ones (held-out logits of calibration vectors).
        """
        order_BT = log_task_BT.argsort(dim=1, descending=True, stable=True).tolist()
        task_prob_BT = log_task_BT.exp().tolist()
        found: list[list[tuple[float, int, int]]] = [[] for _ in order_BT]
        num_evaluated = [0] * len(order_BT)
        pending = list(range(len(order_BT)))
        rank = 0
        while pending:
            groups: dict[int, list[int]] = {}
            for b in pending:
                groups.setdefault(order_BT[b][rank], []).append(b)
            for t, rows in sorted(groups.items()):
                logits_NK = (
                    known[1][rows] if known and known[0] == t else self.modules[t].logits(cls_BD[rows])
                )
                log_class_NK = self.blend.class_log_probs(logits_NK, score_BK[rows, self._classes(t)])
                joint_NK = (log_class_NK + log_task_BT[rows, t, None]).exp()
                value_NK, class_NK = joint_NK.topk(min(top_k, joint_NK.shape[1]), dim=1)
                for b, values, classes in zip(rows, value_NK.tolist(), class_NK.tolist(), strict=True):
                    found[b] += [(value, t, k) for value, k in zip(values, classes, strict=True)]
                    found[b] = sorted(found[b], key=lambda entry: (-entry[0], entry[1:]))[:top_k]
                    num_evaluated[b] += 1
            rank += 1
            pending = [
                b
                for b in pending
                if rank < len(self.modules) and task_prob_BT[b][order_BT[b][rank]] > _bar(found[b], top_k)
            ]
        return [
            self._compose(entries, task_prob_BT[b][entries[0][1]], num_evaluated[b])
            for b, entries in enumerate(found)
        ]

    def _answer_within(self, cls_BD: Tensor, t: int, top_k: int) -> list[Answer]:
        log_task_BT = cls_BD.new_full((cls_BD.shape[0], len(self.modules)), -torch.inf, dtype=torch.float64)
        log_task_BT[:, t] = 0.0
        return self._search(cls_BD, self._selection_scores(cls_BD), log_task_BT, top_k)

    def _answer_by_entropy(self, cls_BD: Tensor, top_k: int) -> list[Answer]:
        """As published, per image: every module scores the classes of all tasks on its own output; the
        one with the least entropy answers, over all classes."""
        head_KD = torch.cat([F.normalize(module.head.weight_KD, dim=-1) for module in self.modules])
        best_entropy_B = cls_BD.new_full((cls_BD.shape[0],), torch.inf, dtype=torch.float64)
        best_prob_BK = cls_BD.new_zeros((cls_BD.shape[0], head_KD.shape[0]), dtype=torch.float64)
        winner_B = torch.zeros(cls_BD.shape[0], dtype=torch.int64, device=self.device)
        for t, module in enumerate(self.modules):
            log_prob_BK = module.log_probs_over(cls_BD, head_KD)
            entropy_B = entropy(log_prob_BK)
            better_B = entropy_B < best_entropy_B
            best_entropy_B = torch.where(better_B, entropy_B, best_entropy_B)
            best_prob_BK = torch.where(better_B[:, None], log_prob_BK.exp(), best_prob_BK)
            winner_B = torch.where(better_B, t, winner_B)
        value_BK, class_BK = best_prob_BK.topk(min(top_k, head_KD.shape[0]), dim=1)
        task_BK = self.task_of_class_K[class_BK]
        answers = []
        for b, winner in enumerate(winner_B.tolist()):
            entries = [
                (value, t, k - self.first_class[t])
                for value, t, k in zip(
                    value_BK[b].tolist(), task_BK[b].tolist(), class_BK[b].tolist(), strict=True
                )
            ]
            task_probability = float(best_prob_BK[b, self._classes(entries[0][1])].sum())
            answers.append(self._compose(entries, task_probability, len(self.modules), module_index=winner))
        return answers

    def _compose(
        self,
        entries: Sequence[tuple[float, int, int]],
        task_probability: float,
        num_evaluated: int,
        module_index: int | None = None,
    ) -> Answer:
        choices = [Choice(self.modules[t].task, self.modules[t].labels[k], value) for value, t, k in entries]
        winner = self.modules[entries[0][1] if module_index is None else module_index]
        return Answer(
            task=choices[0].task,
            label=choices[0].label,
            confidence=choices[0].probability,
            task_probability=task_probability,
            alternatives=tuple(c for c in choices[1:] if c.probability >= MIN_ALTERNATIVE_PROBABILITY),
            receipt=Receipt(self.revision, winner.sha256, self.backbone_fingerprint),
            num_modules_evaluated=num_evaluated,
        )

    # -- calibration ---------------------------------------------------------------------------------

    def answer_calibration(self, task: str) -> list[Answer]:
        """Answers on a task's calibration set, each vector treated as unseen by its own task."""
        t = self._find(task)
        calibration = self.modules[t].calibration
        score_MK = self._unseen_scores(t)
        return self._search(
            calibration.cls_MD.float(),
            score_MK,
            self._task_log_probs(score_MK),
            top_k=1,
            known=(t, calibration.held_out_logits_MK),
        )

    def _unseen_scores(self, t: int, rows: Tensor | None = None) -> Tensor:
        """[M, K] selection scores of task t's calibration vectors, without their own contribution."""
        assert self.selector is not None, "a bank with tasks has a selector"
        module = self.modules[t]
        calibration = module.calibration
        rows = torch.arange(len(calibration), device=self.device) if rows is None else rows
        x_ND, label_N = calibration.cls_MD[rows], calibration.label_M[rows]
        count_N = module.statistics.count_K.to(self.device)[label_N]
        inside_N = calibration.in_statistics_M[rows] & (count_N >= 2)
        score_NK = x_ND.new_empty((len(rows), len(self.task_of_class_K)), dtype=torch.float64)
        score_NK[~inside_N] = self.selector.scores(x_ND[~inside_N])
        score_NK[inside_N] = self.selector.leave_one_out_scores(
            x_ND[inside_N], label_N[inside_N] + self.first_class[t], count_N[inside_N]
        )
        return score_NK

    def _sampled_evidence(self) -> list[Evidence]:
        """Calibration vectors of all tasks as if unseen, at most MAX_BLEND_VECTORS together."""
        step = -(-len(self.modules) // MAX_BLEND_VECTORS) or 1
        return [self._evidence(t) for t in range(0, len(self.modules), step)]

    def _evidence(self, t: int) -> Evidence:
        calibration = self.modules[t].calibration
        quota = max(1, MAX_BLEND_VECTORS // len(self.modules))
        size = len(calibration)
        rows = torch.linspace(0, max(0, size - 1), min(quota, size)).round().long().to(self.device)
        return Evidence(
            label_N=calibration.label_M[rows],
            score_NK=self._unseen_scores(t, rows),
            logits_NC=calibration.held_out_logits_MK[rows],
            first_class=self.first_class[t],
        )


def _bar(entries: list[tuple[float, int, int]], top_k: int) -> float:
    """The probability a further answer must exceed to be listed."""
    if top_k == 1:
        return entries[0][0]
    last_listed = entries[-1][0] if len(entries) == top_k else 0.0
    return min(entries[0][0], max(last_listed, MIN_ALTERNATIVE_PROBABILITY))


def _pool(modules: tuple[TaskModule, ...], feature_dim: int, previous: ModuleBank | None) -> PooledStatistics:
    if previous is None:
        return PooledStatistics.empty(feature_dim).add(module.statistics for module in modules)
    before = {module.sha256: module for module in previous.modules}
    after = {module.sha256: module for module in modules}
    added = [module.statistics for sha256, module in after.items() if sha256 not in before]
    removed = [module.statistics for sha256, module in before.items() if sha256 not in after]
    return previous.pooled.add(added).remove(removed)
