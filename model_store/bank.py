"""The module bank: every active task in memory, immutable, and the answer it gives to a CLS vector.

A bank is built once for a revision and never changed; a request keeps the bank it was admitted with, so
no registration can change an answer half-way. The answer to an image is

    arg max over (task, class) of P(task | x) · P(class | task, x)

added over the tasks of a label space, and found by the exact search of `model_store.joint`.
"""
# B batch, N vectors, K classes (of one task or of all), C classes of one task, T tasks, D features,
# M calibration vectors

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from model_store.answers import Answer, Choice, Receipt
from model_store.blend import Blend, Evidence, fit_blend
from model_store.class_means import ClassMeans
from model_store.conformal import conformal_p_values, coverage_threshold
from model_store.epoch import Epoch
from model_store.errors import InvalidRequest, UnknownTask
from model_store.joint import MIN_ALTERNATIVE_PROBABILITY, Entry, Found, JointModel, KnownLogits
from model_store.known_vectors import sample_evidence, unseen_scores
from model_store.label_spaces import LabelSpaces
from model_store.published_rule import least_uncertain
from model_store.selection import (
    MAX_DENSE_CLASSES,
    Metric,
    Selection,
    WhitenedCosine,
)
from model_store.statistics import PooledStatistics
from model_store.task_module import ActiveModule, TaskModule
from model_store.weighing import TaskWeighing

_CPU = torch.device("cpu")
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
    modules: tuple[ActiveModule, ...]
    spaces: LabelSpaces
    epoch: Epoch | None
    pooled: PooledStatistics  # of its tasks, or in an epoch of those that began it
    device: torch.device
    selector: WhitenedCosine | None
    blend: Blend
    task_of_class_K: Tensor
    true_probability_N: Tensor  # what calibration vectors, as if unseen, gave their true labels; ascending
    signers: Mapping[str, str]  # trusted signers by SHA-256 of the module
    _index: dict[str, int] = field(repr=False)
    # Filled when a task first answers, by digest of its module: a function of the rest, so that sharing it
    # between threads is safe, and between banks that score the task alike.
    _known_vectors: dict[str, _KnownVectors] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def build(
        cls,
        modules: Iterable[ActiveModule],
        *,
        revision: int,
        backbone_fingerprint: str,
        feature_dim: int,
        device: torch.device | str = "cpu",
        epoch: Epoch | None = None,
        pooled: PooledStatistics | None = None,
        previous: "ModuleBank | None" = None,
        recall: Callable[[str], TaskModule] | None = None,
        signers: Mapping[str, str] | None = None,
    ) -> "ModuleBank":
        """The bank of `modules`, whose tensors are already on `device`.

        With an `epoch`, what depends on all tasks together is taken from it. The rest only saves work, and
        the bank is the same without: `pooled` are the sums over the modules' statistics; the sums of
        `previous` are changed by the difference, which is exact, and `recall` gives modules by digest that
        are no longer among its own.
        """
        device = torch.device(device)
        ordered = tuple(sorted(modules, key=lambda module: module.task))
        assert len({module.task for module in ordered}) == len(ordered), "task names are unique in a revision"
        is_continued = previous is not None and epoch is not None and previous.epoch is epoch
        if epoch is not None:
            pooled = epoch.pooled
        elif pooled is None:
            pooled = _pool(ordered, feature_dim, previous, recall)
        sizes = [len(module.labels) for module in ordered]
        basis = previous.selector if previous is not None and is_continued else None
        selector = None
        if ordered:
            sha256s = epoch.sha256s if epoch else None
            selector = WhitenedCosine.fit(
                ClassMeans.of([module.mean_KD for module in ordered], [module.sha256 for module in ordered]),
                basis.metric.to(_CPU) if basis else Metric.fit(pooled, feature_dim, sha256s=sha256s),
                epoch.centre_D if epoch else None,
                max_dense_classes=MAX_DENSE_CLASSES if device.type == "cpu" else None,
                previous=basis,
            ).to(device)
        no_probabilities = torch.empty(0, dtype=torch.float64)
        known_vectors = {}
        if previous is not None and _have_equal_scores(basis, selector):
            active = {module.sha256 for module in ordered}
            known = dict(previous._known_vectors)  # a copy in one step: others are adding to it
            known_vectors = {sha256: vectors for sha256, vectors in known.items() if sha256 in active}
        bank = cls(
            revision=revision,
            backbone_fingerprint=backbone_fingerprint,
            feature_dim=feature_dim,
            modules=ordered,
            spaces=LabelSpaces.arrange(ordered, device),
            epoch=epoch,
            pooled=pooled,
            device=device,
            selector=selector,
            blend=epoch.blend if epoch else Blend(),
            task_of_class_K=torch.repeat_interleave(
                torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64)
            ).to(device),
            true_probability_N=(epoch.true_probability_N if epoch else no_probabilities).to(device),
            signers=dict(signers or {}),
            _index={module.task: i for i, module in enumerate(ordered)},
            _known_vectors=known_vectors,
        )
        return bank._calibrated() if ordered and epoch is None else bank

    def begin_epoch(self) -> Epoch:
        """What its tasks say together, for the revisions after it. It must be in no epoch itself."""
        assert self.epoch is None and self.selector is not None, "a bank with tasks, whose own all is"
        return Epoch(
            pooled=self.pooled,
            centre_D=self.selector.centre_D.cpu(),
            blend=self.blend,
            true_probability_N=self.true_probability_N.cpu(),
            sha256s=frozenset(module.sha256 for module in self.modules),
        )

    @property
    def scores_tasks_apart(self) -> bool:
        """Whether each task has the same scores whatever others are active: in an epoch, unless it began with
        fewer classes than features."""
        return self.epoch is not None and self.selector is not None and self.selector.metric.spans_all

    def among(self, tasks: Iterable[str]) -> "ModuleBank":
        """The bank of some of its tasks alone, in its epoch. Raises UnknownTask."""
        assert self.scores_tasks_apart, "among fewer its tasks would have other scores"
        return ModuleBank.build(
            [self.module(task) for task in tasks],
            revision=self.revision,
            backbone_fingerprint=self.backbone_fingerprint,
            feature_dim=self.feature_dim,
            device=self.device,
            epoch=self.epoch,
            previous=self,
            signers=self.signers,
        )

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

    def module(self, task: str) -> ActiveModule:
        """Raises UnknownTask."""
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
        every_label: bool = False,
        coverage: float | None = None,
        abstain_level: float = 0.0,
        on_stage: Callable[[Stage], None] = lambda _: None,
    ) -> list[Answer]:
        """Answer each of [B, D] float32 CLS vectors for itself; with `task`, that module decides.

        With `task` and `every_label` all its labels are listed, however improbable, whatever `top_k` is.
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
        threshold = None if coverage is None else self.coverage_threshold(coverage, selection, task)
        least_listed = MIN_ALTERNATIVE_PROBABILITY
        if task is not None:
            t = self._find(task)
            if every_label:
                top_k, least_listed = len(self.modules[t].labels), 0.0
            joint, log_task_BT = self._joint_within(t), self._certain_of(t, cls_BD)
            score_BK = self._weighing.scores_of([t], cls_BD)
        elif selection == "entropy":
            return self._answer_by_entropy(cls_BD, top_k, abstain_level, on_stage)
        else:
            joint = self._joint
            score_BK, log_task_BT = self._weighing.weigh(cls_BD, threshold)
        on_stage("selected")
        found = joint.search(cls_BD, score_BK, log_task_BT, top_k, threshold)
        on_stage("evaluated")
        winners = [one.entries[0].task for one in found]
        winner_B = torch.tensor(winners, dtype=torch.int64, device=self.device)
        task_prob_B = log_task_BT.gather(1, winner_B[:, None]).exp().squeeze(1).tolist()
        p_values = self._p_values(score_BK, winners)
        return [
            self._compose(
                one, task_probability, p_value, top_k, threshold, abstain_level, least_listed=least_listed
            )
            for one, task_probability, p_value in zip(found, task_prob_B, p_values, strict=True)
        ]

    def coverage_threshold(
        self, coverage: float, selection: Selection = "lda", task: str | None = None
    ) -> float:
        """The least probability in a prediction set. Raises InvalidRequest and UnknownTask."""
        if task is not None:
            return coverage_threshold(self._known_vectors_of(self._find(task)).true_probability_M, coverage)
        if selection == "entropy":
            raise InvalidRequest("prediction sets are calibrated for selection 'lda', not for 'entropy'")
        return coverage_threshold(self.true_probability_N, coverage)

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
        return [self.modules[t].task for t in self._weighing.neighbours(self._find(task), num)]

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
        return replace(self._joint, spaces=self.spaces.alone(t))

    def _p_values(self, score_BK: Tensor, winners: Sequence[int]) -> list[float]:
        """How typical each picture is of the task that answers it: conformal, by its best selection score."""
        p_values_B: dict[int, list[float]] = {}
        for t in set(winners):
            best_B = score_BK[:, self._classes(t)].amax(dim=1)
            p_values_B[t] = conformal_p_values(best_B, self._known_vectors_of(t).best_score_M).tolist()
        return [p_values_B[t][b] for b, t in enumerate(winners)]

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
        p_values = self._p_values(score_BK, task_BK[:, 0].tolist())
        answers = []
        for b, module_index in enumerate(rule.module_B.tolist()):
            entries = tuple(
                Entry(value, t, k - self.first_class[t])
                for value, t, k in zip(
                    value_BK[b].tolist(), task_BK[b].tolist(), class_BK[b].tolist(), strict=True
                )
            )
            of_task = rule.prob_BK[b, self._classes(entries[0].task)].sum()
            task_probability = float(of_task.clamp(max=1.0))  # the sum may round to more
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
        least_listed: float = MIN_ALTERNATIVE_PROBABILITY,
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
            alternatives=tuple(one for one in others[: top_k - 1] if one.probability >= least_listed),
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
        calibration = self.modules[t].whole().calibration
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
        cls_ND = self.modules[t].whole().calibration.cls_MD[evidence.row_N].float()
        prob_NL, _ = self._joint.label_probs(
            space, cls_ND, evidence.score_NK, log_task_NT, KnownLogits(t, evidence.logits_NC)
        )
        position_C = space.position_C[space.members.index(t)]
        return prob_NL.gather(1, position_C[evidence.label_N][:, None]).squeeze(1)

    def prepare(self, task: str) -> None:
        """Compute now what the task's first answer would have to wait for. Answers do not change."""
        self._known_vectors_of(self._find(task))

    @torch.inference_mode()
    def _known_vectors_of(self, t: int) -> _KnownVectors:
        sha256 = self.modules[t].sha256
        if sha256 not in self._known_vectors:
            module = self.modules[t].whole()
            calibration = module.calibration
            assert self.selector is not None, "a bank with tasks has a selector"
            score_MC = unseen_scores(self.selector, module, t, own_classes=True)
            log_class_MC = self.blend.class_log_probs(calibration.held_out_logits_MK, score_MC)
            true_probability_M = log_class_MC.gather(1, calibration.label_M[:, None]).squeeze(1).exp()
            self._known_vectors[sha256] = _KnownVectors(
                score_MC.amax(dim=1).sort().values, true_probability_M.sort().values
            )
        return self._known_vectors[sha256]


def _have_equal_scores(before: WhitenedCosine | None, after: WhitenedCosine | None) -> bool:
    """Whether classes of both have the same scores to the last bit, with one metric and one centre. Whoever
    is screened has norms of float32."""
    if before is None or after is None:
        return False
    return after.metric.spans_all and (before.screen is None) == (after.screen is None)


def _pool(
    modules: tuple[ActiveModule, ...],
    feature_dim: int,
    previous: ModuleBank | None,
    recall: Callable[[str], TaskModule] | None,
) -> PooledStatistics:
    """The exact sums over modules, by what differs from those that `previous` is pooled over."""
    if previous is None:
        return PooledStatistics.empty(feature_dim).add(module.whole().statistics for module in modules)
    before = {module.sha256: module for module in previous.modules}
    pooled_over = set(before) if previous.epoch is None else previous.epoch.sha256s
    after = {module.sha256: module for module in modules}

    def gone(sha256: str) -> TaskModule:
        if sha256 in before:
            return before[sha256].whole()
        assert recall is not None, "modules that an epoch began with and that are gone must be recalled"
        return recall(sha256)

    added = (module.whole().statistics for sha256, module in after.items() if sha256 not in pooled_over)
    removed = (gone(sha256).statistics for sha256 in sorted(pooled_over - after.keys()))
    return previous.pooled.add(added).remove(removed)
