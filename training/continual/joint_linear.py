"""The upper reference: one multinomial logistic regression on the training pictures of all tasks so far."""
# N training pictures, C columns, D features

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from training.continual.method import ScoringMethod, TrainingRows
from training.continual.tasks import ContinualTask

PENALTIES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)  # of ½‖W‖² beside the mean cross-entropy, strongest first
_HELD_OUT = 5  # every fifth picture of a class chooses the penalty
_MAX_STEPS = 150


class JointLinear(ScoringMethod):
    """Not a continual method: it keeps every training vector and fits anew. Each feature is brought to zero
    mean and unit variance; the penalty is chosen on a fifth of the training pictures."""

    kind = "probability"

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.penalty: float | None = None
        self._seed = seed
        self._rows = TrainingRows()
        self._fitted: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def add(self, task: ContinualTask) -> None:
        self._rows.add(task)
        self._fitted = None

    def scores(self, cls_ND: Tensor) -> Tensor:
        if self._fitted is None:
            self._fitted = self._fit(self._rows.vectors, self._rows.columns)
        mean_D, deviation_D, weight_CD, bias_C = self._fitted
        return torch.softmax(F.linear((cls_ND - mean_D) / deviation_D, weight_CD, bias_C).double(), dim=1)

    def _fit(self, x_ND: Tensor, class_N: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean_D, deviation_D = x_ND.mean(dim=0), x_ND.std(dim=0, correction=0).clamp_min(1e-6)
        x_ND = (x_ND - mean_D) / deviation_D
        num_classes = len(self.columns.label_C)
        out_N = _hold_out(class_N, torch.Generator().manual_seed(self._seed))
        losses: dict[float, float] = {}
        start: tuple[Tensor, Tensor] | None = None
        for penalty in PENALTIES:
            start = fit_logistic_regression(x_ND[~out_N], class_N[~out_N], num_classes, penalty, start)
            losses[penalty] = float(F.cross_entropy(F.linear(x_ND[out_N], *start), class_N[out_N]))
        self.penalty = min(losses, key=lambda penalty: losses[penalty])
        return mean_D, deviation_D, *fit_logistic_regression(x_ND, class_N, num_classes, self.penalty, start)

    @property
    def size_bytes(self) -> int:
        return 4 * (self._rows.vectors.numel() + len(self.columns.label_C) * self._rows.vectors.shape[1])


def fit_logistic_regression(
    x_ND: Tensor,
    class_N: Tensor,
    num_classes: int,
    penalty: float,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(weights [C, D], biases [C]) that minimise mean cross-entropy + ½·penalty·‖W‖², by L-BFGS."""
    weight_CD, bias_C = start or (x_ND.new_zeros(num_classes, x_ND.shape[1]), x_ND.new_zeros(num_classes))
    weight_CD, bias_C = weight_CD.clone().requires_grad_(), bias_C.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [weight_CD, bias_C], max_iter=_MAX_STEPS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(F.linear(x_ND, weight_CD, bias_C), class_N)
        value = value + penalty / 2.0 * (weight_CD**2).sum()
        torch.autograd.backward(value)
        return value

    optimiser.step(loss)
    return weight_CD.detach(), bias_C.detach()


def _hold_out(class_N: Tensor, generator: torch.Generator) -> Tensor:
    """[N] bool: a fifth of every class that has at least two pictures."""
    out_N = torch.zeros_like(class_N, dtype=torch.bool)
    for k in class_N.unique().tolist():
        rows = (class_N == k).nonzero().squeeze(1)
        if len(rows) >= 2:
            rows = rows[torch.randperm(len(rows), generator=generator)]
            out_N[rows[: -(-len(rows) // _HELD_OUT)]] = True
    return out_N
