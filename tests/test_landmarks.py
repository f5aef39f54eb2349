"""The landmark ridge against ridge regressions solved again and again without one picture."""
# N pictures, M landmarks, K classes, D features

import numpy as np
import pytest
import torch

from model_store.landmarks import (
    _JITTER,
    RIDGES,
    SHARPNESS,
    LandmarkRidge,
    RidgeFit,
    Standardisation,
    fit_landmark_ridges,
)

D, K = 9, 3


def unit_vectors(num: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label_N = torch.arange(num) % K
    mean_KD = torch.randn(K, D, generator=generator)
    x_ND = mean_KD[label_N] + 0.7 * torch.randn(num, D, generator=generator)
    return torch.nn.functional.normalize(x_ND, dim=1), label_N


def numpy_features(x: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """[k(x, L) · k(L, L)^(−1/2), x] with k = exp(SHARPNESS · (cos − 1))."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(SHARPNESS * (a @ b.T - 1.0))

    values, vectors = np.linalg.eigh(kernel(landmarks, landmarks))
    whiten = vectors @ np.diag((np.maximum(values, 0) + _JITTER) ** -0.5)
    return np.concatenate([kernel(x, landmarks) @ whiten, x], axis=1)


def ridge_weights(features: np.ndarray, targets: np.ndarray, penalty: float) -> np.ndarray:
    return np.linalg.solve(features.T @ features + penalty * np.eye(features.shape[1]), features.T @ targets)


def fit_one(unit_ND: torch.Tensor, label_N: torch.Tensor, landmark_MD: torch.Tensor) -> RidgeFit:
    [fit] = fit_landmark_ridges(unit_ND, label_N, K, landmark_MD, [0.3])
    return fit


def targets_of(labels: np.ndarray) -> np.ndarray:
    return np.eye(K)[labels] - 1.0 / K


def test_standardised_vectors_have_length_one() -> None:
    cls_ND = 5.0 * torch.randn(30, D, generator=torch.Generator().manual_seed(0)) + 2.0
    torch.testing.assert_close(Standardisation.fit(cls_ND)(cls_ND).norm(dim=1), torch.ones(30))


def test_standardisation_equals_its_formula() -> None:
    cls_ND = torch.randn(30, D, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, D + 1)
    x = cls_ND.double().numpy()
    expected = (x - x.mean(axis=0)) / np.sqrt(x.std(axis=0))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(Standardisation.fit(cls_ND)(cls_ND).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("num", [1, 2, 10])
def test_features_that_never_vary_stay_finite(num: int) -> None:
    cls_ND = torch.randn(num, D, generator=torch.Generator().manual_seed(0))
    cls_ND[:, 0] = 3.0
    for given in (cls_ND, torch.full((num, D), 3.0)):
        assert Standardisation.fit(given)(given).isfinite().all()


def test_scores_equal_the_ridge_regression_with_each_penalty() -> None:
    unit_ND, label_N = unit_vectors()
    landmark_MD = unit_ND[::3]
    fits = fit_landmark_ridges(unit_ND, label_N, K, landmark_MD)
    assert [fit.penalty for fit in fits] == list(RIDGES)
    x, landmarks = unit_ND.double().numpy(), landmark_MD.double().numpy()
    query_BD, _ = unit_vectors(10, seed=1)
    for fit in fits:
        weights = ridge_weights(numpy_features(x, landmarks), targets_of(label_N.numpy()), fit.penalty)
        expected = numpy_features(query_BD.double().numpy(), landmarks) @ weights
        np.testing.assert_allclose(
            fit.expert.scores(query_BD, landmark_MD).numpy(), expected, rtol=1e-3, atol=1e-3
        )


def test_leaving_one_out_equals_fitting_without_it() -> None:
    unit_ND, label_N = unit_vectors()
    landmark_MD = unit_ND[::3]
    fit = fit_one(unit_ND, label_N, landmark_MD)
    features = numpy_features(unit_ND.double().numpy(), landmark_MD.double().numpy())
    targets = targets_of(label_N.numpy())
    for i in range(len(label_N)):
        others = np.arange(len(label_N)) != i
        expected = features[i] @ ridge_weights(features[others], targets[others], fit.penalty)
        np.testing.assert_allclose(fit.left_out_NK[i].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_left_out_scores_do_not_know_their_own_label() -> None:
    unit_ND, label_N = unit_vectors()
    lied_N = label_N.clone()
    lied_N[5] = (lied_N[5] + 1) % K
    honest_NK = fit_one(unit_ND, label_N, unit_ND[::3]).left_out_NK
    lied_NK = fit_one(unit_ND, lied_N, unit_ND[::3]).left_out_NK
    torch.testing.assert_close(honest_NK[5], lied_NK[5], rtol=0, atol=1e-5)
    assert not torch.allclose(honest_NK[8], lied_NK[8], atol=1e-4)


def test_separable_classes_score_highest_for_themselves() -> None:
    unit_KD = torch.eye(D)[:K]
    unit_ND = torch.nn.functional.normalize(unit_KD.repeat(8, 1) + 0.01 * torch.randn(8 * K, D), dim=1)
    landmark_MD = unit_ND[:6]
    fit = fit_one(unit_ND, torch.arange(K).repeat(8), landmark_MD)
    assert fit.expert.scores(unit_ND, landmark_MD).argmax(dim=1).tolist() == list(range(K)) * 8
    assert fit.left_out_NK.argmax(dim=1).tolist() == list(range(K)) * 8


@pytest.mark.parametrize("num_landmarks", [0, 1])
def test_few_landmarks_leave_the_linear_part(num_landmarks: int) -> None:
    unit_ND, label_N = unit_vectors()
    landmark_MD = unit_ND[:num_landmarks]
    fit = fit_one(unit_ND, label_N, landmark_MD)
    assert fit.expert.scores(unit_ND, landmark_MD).isfinite().all() and fit.left_out_NK.isfinite().all()
    assert (fit.expert.scores(unit_ND, landmark_MD).argmax(dim=1) == label_N).double().mean() > 0.8


def test_equal_landmarks_stay_finite() -> None:
    unit_ND, label_N = unit_vectors()
    landmark_MD = unit_ND[:1].expand(20, -1)
    fit = fit_one(unit_ND, label_N, landmark_MD)
    assert fit.expert.scores(unit_ND, landmark_MD).isfinite().all() and fit.left_out_NK.isfinite().all()


def test_without_weights_every_class_scores_nothing() -> None:
    unit_ND, _ = unit_vectors()
    ridge = LandmarkRidge(torch.zeros(4, K), torch.zeros(D, K))
    assert not ridge.scores(unit_ND, unit_ND[:4]).any()
