"""The exact search for the most probable (task, label): modules run only while one could still matter.

The joint probability of a task and one of its labels is P(task | x) · P(class | task, x), added over the
tasks of a label space. Since the second factor is at most 1, a space whose probability is below the best
joint found so far cannot win: spaces are evaluated in that order until none can, which is exact.
"""
# B batch, N rows evaluated together, K classes of all tasks, L labels of one space, T tasks, S spaces

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model_store.blend import Blend
from model_store.label_spaces import LabelSpace, LabelSpaces
from model_store.task_module import ActiveModule

# Alternatives less likely than this are not listed, so that a long list never forces every module to run.
MIN_ALTERNATIVE_PROBABILITY = 1e-3


class Entry(NamedTuple):
    """One candidate: its joint probability, the task that contributes most, and the label's class there."""

    probability: float
    task: int
    label: int


class KnownLogits(NamedTuple):
    """Logits that stand in for a task's own: the held-out ones of its calibration vectors."""

    task: int
    logits_BK: Tensor


@dataclass(frozen=True, slots=True)
class Found:
    """The candidates of one image, most probable first: the best `top_k`, and all at or above the
    threshold."""

    entries: tuple[Entry, ...]
    num_modules_evaluated: int


@dataclass(frozen=True, slots=True)
class JointModel:
    """P(task, label | x) of a set of tasks, from closed-form scores and from their modules."""

    modules: tuple[ActiveModule, ...]
    spaces: LabelSpaces
    first_class: tuple[int, ...]
    blend: Blend

    def classes(self, t: int) -> slice:
        """Where the classes of task `t` stand among all."""
        return slice(self.first_class[t], self.first_class[t] + len(self.modules[t].labels))

    def label_probs(
        self,
        space: LabelSpace,
        cls_ND: Tensor,
        score_NK: Tensor,
        log_task_NT: Tensor,
        known: KnownLogits | None = None,
    ) -> tuple[Tensor, Tensor]:
        """([N, L] joint probabilities of a space's labels, [N, L] the task that contributes most)."""

        def of_task(t: int) -> Tensor:
            if known is not None and known.task == t:
                logits_NC = known.logits_BK
            else:
                logits_NC = self.modules[t].whole().logits(cls_ND)
            log_class_NC = self.blend.class_log_probs(logits_NC, score_NK[:, self.classes(t)])
            return (log_class_NC + log_task_NT[:, t, None]).exp()

        if len(space.members) == 1:
            joint_NC = of_task(space.members[0])
            return joint_NC, torch.full(joint_NC.shape, space.members[0], device=joint_NC.device)
        prob_NL = log_task_NT.new_zeros(len(cls_ND), len(space.labels))
        best_NL = log_task_NT.new_full(prob_NL.shape, -1.0)
        task_NL = torch.full(prob_NL.shape, space.members[0], device=prob_NL.device)
        for t, position_C in zip(space.members, space.position_C, strict=True):
            joint_NC = of_task(t)
            prob_NL[:, position_C] += joint_NC
            better_NC = joint_NC > best_NL[:, position_C]
            task_NL[:, position_C] = torch.where(better_NC, t, task_NL[:, position_C])
            best_NL[:, position_C] = torch.where(better_NC, joint_NC, best_NL[:, position_C])
        return prob_NL.clamp_(max=1.0), task_NL  # the sum may round to more

    def search(
        self,
        cls_BD: Tensor,
        score_BK: Tensor,
        log_task_BT: Tensor,
        top_k: int,
        threshold: float | None = None,
        known: KnownLogits | None = None,
    ) -> list[Found]:
        """Evaluate spaces in order of their probability until no further one can enter the listed answers."""
        prob_BS = self.space_probs(log_task_BT)
        candidates = _in_order(prob_BS, self.least_listed(prob_BS, threshold))
        found: list[list[Entry]] = [[] for _ in candidates]
        num_evaluated = [0] * len(candidates)
        pending = list(range(len(candidates)))
        rank = 0
        while pending:
            groups: dict[int, list[int]] = {}
            for b in pending:
                groups.setdefault(candidates[b][rank].space, []).append(b)
            for s, rows in sorted(groups.items()):
                space = self.spaces[s]
                row_N = torch.tensor(rows)
                stand_in = KnownLogits(known.task, known.logits_BK[row_N]) if known else None
                prob_NL, task_NL = self.label_probs(
                    space, cls_BD[row_N], score_BK[row_N], log_task_BT[row_N], stand_in
                )
                for b, entries in zip(
                    rows, self._entries(space, prob_NL, task_NL, top_k, threshold), strict=True
                ):
                    found[b] = _keep(found[b] + entries, top_k, threshold)
                    num_evaluated[b] += len(space.members)
            rank += 1
            pending = [
                b
                for b in pending
                if rank < len(candidates[b])
                and _may_enter(candidates[b][rank].probability, found[b], top_k, threshold)
            ]
        return [Found(tuple(one), num) for one, num in zip(found, num_evaluated, strict=True)]

    def space_probs(self, log_task_BT: Tensor) -> Tensor:
        """[B, S] probability of each label space."""
        return self.spaces.probabilities(log_task_BT.exp())

    def least_listed(self, prob_BS: Tensor, threshold: float | None) -> Tensor:
        """[B] a bound: of a space less probable than this, no label can be listed.

        The best label of the most probable space has at least an equal share of it, and alternatives must
        be likelier than the best label or than MIN_ALTERNATIVE_PROBABILITY.
        """
        top_B, space_B = prob_BS.max(dim=1)
        bound_B = (top_B / self.spaces.num_labels_S[space_B]).clamp_max(MIN_ALTERNATIVE_PROBABILITY)
        return bound_B if threshold is None else bound_B.clamp_max(threshold)

    def _entries(
        self, space: LabelSpace, prob_NL: Tensor, task_NL: Tensor, top_k: int, threshold: float | None
    ) -> Iterable[list[Entry]]:
        num_listed = min(top_k, prob_NL.shape[1])
        if threshold is not None:
            num_listed = max(num_listed, int((prob_NL >= threshold).sum(dim=1).max()))
        value_NV, label_NV = prob_NL.topk(num_listed, dim=1)
        for values, labels, tasks in zip(
            value_NV.tolist(), label_NV.tolist(), task_NL.gather(1, label_NV).tolist(), strict=True
        ):
            yield [
                Entry(
                    value, t, self.modules[t].labels.index(space.labels[k]) if len(space.members) > 1 else k
                )
                for value, k, t in zip(values, labels, tasks, strict=True)
            ]


class _Candidate(NamedTuple):
    space: int
    probability: float


def _in_order(prob_BS: Tensor, least_B: Tensor) -> list[list[_Candidate]]:
    """For each image the spaces not less probable, the most probable first; of equals the first."""
    candidates: list[list[_Candidate]] = [[] for _ in range(len(prob_BS))]
    row_N, space_N = (~(prob_BS < least_B[:, None])).nonzero(as_tuple=True)
    for b, s, probability in zip(
        row_N.tolist(), space_N.tolist(), prob_BS[row_N, space_N].tolist(), strict=True
    ):
        candidates[b].append(_Candidate(s, probability))
    for one in candidates:
        one.sort(key=lambda candidate: -candidate.probability)
    return candidates


def _keep(entries: list[Entry], top_k: int, threshold: float | None) -> list[Entry]:
    entries = sorted(entries, key=lambda entry: (-entry.probability, entry.task, entry.label))
    num_kept = top_k
    if threshold is not None:
        num_kept = max(top_k, sum(entry.probability >= threshold for entry in entries))
    return entries[:num_kept]


def _may_enter(
    space_probability: float, entries: Sequence[Entry], top_k: int, threshold: float | None
) -> bool:
    """Whether a label of a space this probable could still be listed."""
    if threshold is not None and space_probability >= threshold:
        return True
    best = entries[0].probability
    if top_k == 1:
        return space_probability > best
    last_listed = entries[top_k - 1].probability if len(entries) >= top_k else 0.0
    return space_probability > min(best, max(last_listed, MIN_ALTERNATIVE_PROBABILITY))
