"""Selection scores of vectors that are part of the class statistics, each as if it were not.

Taking x out of a class of n images moves the class mean from μ to μ − r/(n−1) with r = x − μ, the centre of
all K class means by a K-th of that, and lowers the scatter by n/(n−1)·r·rᵀ. The scores without x follow from
low-rank updates of those with it, exactly but for the sphere inside the covariance, which stays.
"""
# N vectors, K classes, C classes asked for, S classes of the vectors, D features

import torch
from torch import Tensor

from model_store.errors import InvalidModule
from model_store.selection import ClassSpan, WhitenedCosine, whitened_cosine

# A vector that is nearly the whole spread along its own residual leaves a singular covariance behind.
_MIN_REMAINDER = 1e-6


def leave_one_out_scores(
    discriminant: WhitenedCosine,
    x_ND: Tensor,
    class_N: Tensor,
    count_N: Tensor,
    task: int | None = None,
    in_metric: bool = True,
) -> Tensor:
    """[N, C] float64 scores of [N, D] vectors without their own contribution, over the classes of all tasks
    or of one.

    `class_N` is the vector's own class among all, which must be one of those, and `count_N` that class's
    image count, at least 2. Vectors of a task that came after the metric was fixed are only in their own
    class's mean, not `in_metric`. With P = S⁻¹, solved = P·r and Sherman–Morrison
    P' = P + gain·solved·solvedᵀ, every product aᵀP'r is `stretch` times aᵀPr. Raises InvalidModule.
    """
    own_N = torch.arange(len(x_ND), device=x_ND.device)
    step_N = 1.0 / (count_N.double() - 1.0)
    # Every offset and the vector move by shift·r.
    shift_N = step_N / discriminant.metric.num_classes * in_metric
    shifted_ND = x_ND.double() - discriminant.centre_D
    classes, offset_CD = discriminant.classes(task), discriminant.offsets(task)
    own_class_N = class_N - (classes.start or 0)
    residual_ND = shifted_ND - offset_CD[own_class_N]
    solved_ND = residual_ND @ discriminant.metric.precision_DD
    spread_N = (residual_ND * solved_ND).sum(dim=1)
    weight_N = discriminant.metric.outer_weight * count_N.double() * step_N * in_metric
    gain_N = weight_N / (1.0 - weight_N * spread_N).clamp_min(_MIN_REMAINDER)
    stretch_N = 1.0 + gain_N * spread_N
    along_x_N = (shifted_ND * solved_ND).sum(dim=1)

    along_NC = solved_ND @ offset_CD.T
    move_NC = shift_N[:, None].expand_as(along_NC).clone()  # how far along r each offset moves
    move_NC[own_N, own_class_N] -= step_N
    # x − c is r and the own class's offset, and those are few.
    seen_S, position_N = own_class_N.unique(return_inverse=True)
    query_ND = solved_ND + (offset_CD[seen_S] @ discriminant.metric.precision_DD)[position_N]
    projection_NC = (
        query_ND @ offset_CD.T
        + (gain_N * along_x_N)[:, None] * along_NC
        + stretch_N[:, None] * (move_NC * along_x_N[:, None] + shift_N[:, None] * along_NC)
        + (stretch_N * shift_N * spread_N)[:, None] * move_NC
    )
    norm_NC = (
        discriminant.norm_K[classes]
        + gain_N[:, None] * along_NC**2
        + stretch_N[:, None] * move_NC * (2.0 * along_NC + move_NC * spread_N[:, None])
    )
    whole_N = (
        (query_ND * shifted_ND).sum(dim=1)
        + gain_N * along_x_N**2
        + stretch_N * shift_N * (2.0 * along_x_N + shift_N * spread_N)
    )
    inside_N = whole_N
    if discriminant.span is not None:
        inside_N = _inside(
            discriminant,
            discriminant.span,
            shifted_ND + shift_N[:, None] * residual_ND,
            residual_ND,
            class_N,
            step_N,
            shift_N,
            spread_N,
            gain_N,
        )
    return whitened_cosine(projection_NC, norm_NC, inside_N, whole_N)


def _inside(
    discriminant: WhitenedCosine,
    span: ClassSpan,
    moved_ND: Tensor,
    residual_ND: Tensor,
    class_N: Tensor,
    step_N: Tensor,
    shift_N: Tensor,
    spread_N: Tensor,
    gain_N: Tensor,
) -> Tensor:
    """[N] squared norms inside the span of the class means that are left.

    It is pᵀG⁻¹p with p the products of the image with the class offsets and G = L·Lᵀ the offsets' Gram
    matrix. Without x, G becomes L·(I + V·M·Vᵀ)·Lᵀ with two columns V = L⁻¹[u, b]: u the products of r with
    the offsets and b the moves of the offsets along r; Woodbury inverts it. Both columns are orthogonal to
    the constant vector, along which G is only its ridge. Raises InvalidModule where rounding leaves nothing
    to invert.
    """
    stretch_N = 1.0 + gain_N * spread_N
    first_NK = residual_ND @ span.basis_DK  # L⁻¹u
    move_NK = shift_N[:, None].repeat(1, discriminant.num_classes)
    move_NK[torch.arange(len(class_N), device=class_N.device), class_N] -= step_N
    second_NK = torch.linalg.solve_triangular(span.gram_root_KK, move_NK.T, upper=False).T  # L⁻¹b
    along_N = ((moved_ND @ discriminant.metric.precision_DD) * residual_ND).sum(dim=1)
    product_NK = (
        moved_ND @ span.basis_DK
        + (gain_N * along_N)[:, None] * first_NK
        + (stretch_N * along_N)[:, None] * second_NK
    )
    column_NK2 = torch.stack([first_NK, second_NK], dim=2)
    one_N = torch.ones_like(spread_N)
    inverse_N22 = torch.stack([-spread_N, one_N, one_N, -gain_N / stretch_N], dim=1).view(-1, 2, 2)  # M⁻¹
    small_N22 = inverse_N22 + column_NK2.mT @ column_NK2
    overlap_N2 = (column_NK2.mT @ product_NK[:, :, None]).squeeze(2)
    correction_N2, singular_N = torch.linalg.solve_ex(small_N22, overlap_N2)
    if bool(singular_N.any()):
        raise InvalidModule("a calibration vector is too far from its class mean to be taken out of it")
    inside_N: Tensor = (product_NK**2).sum(dim=1) - (overlap_N2 * correction_N2).sum(dim=1)
    return inside_N.clamp_min(0.0)
