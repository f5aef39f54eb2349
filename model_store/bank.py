"""The module bank: every active task in memory, immutable, and the answer it gives to a CLS vector.

A bank is built once for a revision and never changed; a request keeps the bank it was admitted with, so
no registration can change an answer half-way. The answer to an image is

    arg max over (task, class) of P(task | x) · P(class | task, x)

added over the tasks of a label space, and found by the exact search of `model_store.joint`.
"""
# B batch, N vectors, K classes (of one task or of all), C classes of one task, T tasks, D features,
# M calibration vectors

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from model_store.answers import Answer, Choice, Receipt
from model_store.blend import Blend, Evidence, fit_blend
from model_store.class_means import ClassMeans
from model_store.conformal import conformal_p_values, coverage_threshold
from model_store.errors import InvalidRequest, UnknownTask
from model_store.joint import MIN_ALTERNATIVE_PROBABILITY, Entry, Found, JointModel, KnownLogits
from model_store.known_vectors import sample_evidence, unseen_scores
from model_store.label_spaces import LabelSpaces
from model_store.published_rule import least_uncertain
from model_store.selection import (
    MAX_DENSE_CLASSES,
    Selection,
    WhitenedCosine,
)
from model_store.statistics import PooledStatistics
from model_store.task_module import TaskModule
from model_store.weighing import TaskWeighing

Stage = Literal["selected", "evaluated"]  # tasks are weighed, modules have run


@dataclass(frozen=True, slots=True)
class _KnownVectors:
    """What one task's calibration vectors get as if unseen, ascending: the best selection score among its
    own classes, and the probability of the true class with the task known."""

    best_score_M: Tensor
    true_probability_M: Tensor


@dataclass(frozen=True)
class ModuleBank:
    """All active tasks of one revision, sorted by name, with what depends on them together."""

    revision: int
    backbone_fingerprint: str
    feature_dim: int
    modules: tuple[TaskModule, ...]
    spaces: LabelSpaces
    pooled: PooledStatistics
    device: torch.device
    selector: WhitenedCosine | None
    blend: Blend
    task_of_class_K: Tensor
    true_probability_N: Tensor  # what calibration vectors, as if unseen, gave their true labels; ascending
    signers: Mapping[str, str]  # trusted signers by SHA-256 of the module
    _index: dict[str, int] = field(repr=False)
    # Filled when a task first answers: a function of the rest, so that sharing it between threads is safe.
    _known_vectors: dict[int, _KnownVectors] = field(default_factory=dict, repr=False, compare=False)

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
        signers: Mapping[str, str] | None = None,
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
        selector = None
        if ordered:
            means = ClassMeans.of([module.statistics.mean_KD for module in ordered])
            max_dense_classes = MAX_DENSE_CLASSES if device.type == "cpu" else None
            selector = WhitenedCosine.fit(means, pooled, max_dense_classes=max_dense_classes).to(device)
        bank = cls(
            revision=revision,
            backbone_fingerprint=backbone_fingerprint,
            feature_dim=feature_dim,
            modules=ordered,
            spaces=LabelSpaces.arrange(ordered, device),
            pooled=pooled,
            device=device,
            selector=selector,
            blend=Blend(),
            task_of_class_K=torch.repeat_interleave(
                torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64)
            ).to(device),
            true_probability_N=torch.empty(0, dtype=torch.float64, device=device),
            signers=dict(signers or {}),
            _index={module.task: i for i, module in enumerate(ordered)},
        )
        return bank._calibrated() if ordered else bank

    def __len__(self) -> int:
        return len(self.modules)

    def __contains__(self, task: str) -> bool:
        return task in self._index

    @property
    def first_class(self) -> tuple[int, ...]:
        """Where the classes of each task begin among all."""
        return () if self.selector is None else self.selector.means.first_class

    @property
    def is_screened(self) -> bool:
        """Whether there are so many classes that only those that may matter are scored exactly."""
        return self.selector is not None and self.selector.screen is not None

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
        coverage: float | None = None,
        abstain_level: float = 0.0,
        on_stage: Callable[[Stage], None] = lambda _: None,
    ) -> list[Answer]:
        """Answer each of [B, D] float32 CLS vectors for itself; with `task`, that module decides.

        With `coverage` in (0, 1) every answer carries the prediction set that holds the true label with
        that probability. A picture is abstained on when its p-value is at most `abstain_level`, or the
        level of the answering task where its module states one. `on_stage` is told the end of each stage,
        for callers who have a clock. Raises InvalidRequest and UnknownTask.
        """
        if top_k < 1:
            raise InvalidRequest(f"top_k is {top_k}, at least 1 is needed")
        if not self.modules:
            raise InvalidRequest("no task is registered yet: register a module file first")
        cls_BD = cls_BD.to(self.device, torch.float32)
        threshold = None
        if task is not None:
            t = self._find(task)
            if coverage is not None:
                threshold = coverage_threshold(self._known_vectors_of(t).true_probability_M, coverage)
            joint, log_task_BT = self._joint_within(t), self._certain_of(t, cls_BD)
            score_BK = self._weighing.scores_of([t], cls_BD)
        elif selection == "entropy":
            if coverage is not None:
                raise InvalidRequest("prediction sets are calibrated for selection 'lda', not for 'entropy'")
            return self._answer_by_entropy(cls_BD, top_k, abstain_level, on_stage)
        else:
            if coverage is not None:
                threshold = coverage_threshold(self.true_probability_N, coverage)
            joint = self._joint
            score_BK, log_task_BT = self._weighing.weigh(cls_BD, threshold)
        on_stage("selected")
        found = joint.search(cls_BD, score_BK, log_task_BT, top_k, threshold)
        on_stage("evaluated")
        winner_B = torch.tensor([one.entries[0].task for one in found], dtype=torch.int64, device=self.device)
        task_prob_B = log_task_BT.gather(1, winner_B[:, None]).exp().squeeze(1).tolist()
        p_values = self._p_values(score_BK, winner_B)
        return [
            self._compose(one, task_probability, p_value, top_k, threshold, abstain_level)
            for one, task_probability, p_value in zip(found, task_prob_B, p_values, strict=True)
        ]

    def closed_form_answer(self, cls_BD: Tensor) -> tuple[Tensor, Tensor]:
        """([B] task index, [B] class index within the task) by plain LDA: the baseline modules must beat."""
        assert self.selector is not None, "a bank with tasks has a selector"
        best_B = self.selector.lda_scores(cls_BD.to(self.device)).argmax(dim=1)
        task_B = self.task_of_class_K[best_B]
        return task_B, best_B - torch.tensor(self.first_class, device=self.device)[task_B]

    def answers_for(self, answer: Answer, task: str) -> bool:
        """Whether an answer speaks for `task`: it chose it, or another task of its label space."""
        if answer.task == task:
            return True
        space = self.module(task).label_space
        return space is not None and self.module(answer.task).label_space == space

    def neighbours(self, task: str, num: int) -> list[str]:
        """The other tasks whose classes look most like those of `task`, at most `num`, the likest first."""
        return [self.modules[t].task for t in self._weighing.neighbours(self._find(task))[:num]]

    @property
    def _joint(self) -> JointModel:
        return JointModel(self.modules, self.spaces, self.first_class, self.blend)

    @property
    def _weighing(self) -> TaskWeighing:
        assert self.selector is not None, "a bank with tasks has a selector"
        return TaskWeighing(self.selector, self._joint, self.task_of_class_K)

    def _classes(self, t: int) -> slice:
        return self._joint.classes(t)

    def _certain_of(self, t: int, cls_BD: Tensor) -> Tensor:
        """[B, T] log-probabilities of a task that the client has named."""
        log_task_BT = cls_BD.new_full((cls_BD.shape[0], len(self.modules)), -torch.inf, dtype=torch.float64)
        log_task_BT[:, t] = 0.0
        return log_task_BT

    def _joint_within(self, t: int) -> JointModel:
        """The joint model of task `t` alone, whatever space it belongs to."""
        alone = LabelSpaces.alone(t, self.modules[t], len(self.modules), self.device)
        return replace(self._joint, spaces=alone)

    def _p_values(self, score_BK: Tensor, winner_B: Tensor) -> list[float]:
        """How typical each picture is of the task that answers it: conformal, by its best selection score."""
        p_value_B = torch.ones(len(winner_B), dtype=torch.float64, device=self.device)
        for t in winner_B.unique().tolist():
            rows = (winner_B == t).nonzero().squeeze(1)
            best_N = score_BK[rows, self._classes(t)].max(dim=1).values
            p_value_B[rows] = conformal_p_values(best_N, self._known_vectors_of(t).best_score_M)
        return p_value_B.tolist()

    def _answer_by_entropy(
        self, cls_BD: Tensor, top_k: int, abstain_level: float, on_stage: Callable[[Stage], None]
    ) -> list[Answer]:
        """The published rule. It answers over the classes of all tasks; label spaces play no part."""
        on_stage("selected")
        rule = least_uncertain(self.modules, cls_BD)
        on_stage("evaluated")
        value_BK, class_BK = rule.prob_BK.topk(min(top_k, rule.prob_BK.shape[1]), dim=1)
        task_BK = self.task_of_class_K[class_BK]
        score_BK = self._weighing.scores_of(task_BK[:, 0].unique().tolist(), cls_BD)
        p_values = self._p_values(score_BK, task_BK[:, 0])
        answers = []
        for b, module_index in enumerate(rule.module_B.tolist()):
            entries = tuple(
                Entry(value, t, k - self.first_class[t])
                for value, t, k in zip(
                    value_BK[b].tolist(), task_BK[b].tolist(), class_BK[b].tolist(), strict=True
                )
            )
            task_probability = float(rule.prob_BK[b, self._classes(entries[0].task)].sum())
            found = Found(entries, len(self.modules))
            answers.append(
                self._compose(found, task_probability, p_values[b], top_k, None, abstain_level, module_index)
            )
        return answers

    def _compose(
        self,
        found: Found,
        task_probability: float,
        p_value: float,
        top_k: int,
        threshold: float | None,
        abstain_level: float,
        module_index: int | None = None,
    ) -> Answer:
        best, *others = (self._choice(entry) for entry in found.entries)
        answering = self.modules[found.entries[0].task]
        level = abstain_level if answering.abstain_level is None else answering.abstain_level
        module_sha256 = (answering if module_index is None else self.modules[module_index]).sha256
        prediction_set = None
        if threshold is not None:
            prediction_set = tuple(one for one in (best, *others) if one.probability >= threshold)
        return Answer(
            task=best.task,
            label=best.label,
            confidence=best.probability,
            task_probability=task_probability,
            alternatives=tuple(
                one for one in others[: top_k - 1] if one.probability >= MIN_ALTERNATIVE_PROBABILITY
            ),
            p_value=p_value,
            abstained=p_value <= level,
            prediction_set=prediction_set,
            receipt=Receipt(
                self.revision,
                module_sha256,
                self.backbone_fingerprint,
                self.signers.get(module_sha256),
            ),
            num_modules_evaluated=found.num_modules_evaluated,
        )

    def _choice(self, entry: Entry) -> Choice:
        module = self.modules[entry.task]
        return Choice(module.task, module.labels[entry.label], entry.probability)

    # -- calibration ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def answer_calibration(self, task: str, row_M: Tensor | None = None) -> list[Answer]:
        """Answers on a task's calibration set or some of its rows, each vector treated as unseen by its own
        task."""
        t = self._find(task)
        calibration = self.modules[t].calibration
        row_M = torch.arange(len(calibration), device=self.device) if row_M is None else row_M
        score_MK, log_task_MT = self._weighing.weigh_unseen(t, row_M)
        known = KnownLogits(t, calibration.held_out_logits_MK[row_M])
        found = self._joint.search(calibration.cls_MD[row_M].float(), score_MK, log_task_MT, 1, known=known)
        return [
            self._compose(one, float(log_task_MT[m, one.entries[0].task].exp()), 1.0, 1, None, 0.0)
            for m, one in enumerate(found)
        ]

    def _calibrated(self) -> "ModuleBank":
        """With the blend fitted on calibration vectors as if unseen, and what it makes of their labels."""
        assert self.selector is not None, "a bank with tasks has a selector"
        evidence = sample_evidence(self.selector, self.modules)
        bank = replace(self, blend=fit_blend(evidence, self.spaces.number_labels()))
        log_task_NT = bank._weighing.log_probs(torch.cat([one.score_NK for one in evidence])).double()
        parts = log_task_NT.split([len(one.row_N) for one in evidence])
        probabilities = [bank._true_probabilities(*one) for one in zip(evidence, parts, strict=True)]
        return replace(bank, true_probability_N=torch.cat(probabilities).sort().values)

    @torch.inference_mode()
    def _true_probabilities(self, evidence: Evidence, log_task_NT: Tensor) -> Tensor:
        """[N] joint probability that the bank gives the true label of vectors as if unseen."""
        t = evidence.task
        space = self.spaces.of_task(t)
        cls_ND = self.modules[t].calibration.cls_MD[evidence.row_N].float()
        prob_NL, _ = self._joint.label_probs(
            space, cls_ND, evidence.score_NK, log_task_NT, KnownLogits(t, evidence.logits_NC)
        )
        position_C = space.position_C[space.members.index(t)]
        return prob_NL.gather(1, position_C[evidence.label_N][:, None]).squeeze(1)

    @torch.inference_mode()
    def _known_vectors_of(self, t: int) -> _KnownVectors:
        if t not in self._known_vectors:
            calibration = self.modules[t].calibration
            assert self.selector is not None, "a bank with tasks has a selector"
            score_MC = unseen_scores(self.selector, self.modules[t], t, own_classes=True)
            log_class_MC = self.blend.class_log_probs(calibration.held_out_logits_MK, score_MC)
            true_probability_M = log_class_MC.gather(1, calibration.label_M[:, None]).squeeze(1).exp()
            self._known_vectors[t] = _KnownVectors(
                score_MC.amax(dim=1).sort().values, true_probability_M.sort().values
            )
        return self._known_vectors[t]


def _pool(modules: tuple[TaskModule, ...], feature_dim: int, previous: ModuleBank | None) -> PooledStatistics:
    if previous is None:
        return PooledStatistics.empty(feature_dim).add(module.statistics for module in modules)
    before = {module.sha256: module for module in previous.modules}
    after = {module.sha256: module for module in modules}
    added = [module.statistics for sha256, module in after.items() if sha256 not in before]
    removed = [module.statistics for sha256, module in before.items() if sha256 not in after]
    return previous.pooled.add(added).remove(removed)
