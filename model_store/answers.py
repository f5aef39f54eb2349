"""What a bank says about one picture."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Receipt:
    """What answered: enough to compute the same answer again, and who vouched for the module if signatures
    are checked."""

    revision: int
    module_sha256: str
    backbone_fingerprint: str
    signer: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    task: str
    label: str
    probability: float


@dataclass(frozen=True, slots=True)
class Answer:
    """The most probable (task, label), its calibrated probability, and the runners-up.

    Of tasks that share a label space, the probabilities of a label are added and `task` is the one that
    contributes most. `p_value` is the share of the task's own known pictures that look no more typical of
    it than this one; at or below the abstain level the picture is `abstained` on. `prediction_set` holds
    every label that the coverage asked for cannot rule out, most probable first; it may be empty.
    """

    task: str
    label: str
    confidence: float
    task_probability: float
    alternatives: tuple[Choice, ...]
    p_value: float
    abstained: bool
    prediction_set: tuple[Choice, ...] | None
    receipt: Receipt
    num_modules_evaluated: int
