"""LuCA and the cosine head against the equations of the paper, written out in numpy."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model_store.luca import FLOWS, CosineHead, Flow, LuCA, count_parameters

D, B = 32, 5
Array = NDArray[np.float64]
erf = np.vectorize(math.erf)


def random_luca(flow: Flow, seed: int = 0) -> LuCA:
    """Every parameter random, those of the norm too."""
    generator = torch.Generator().manual_seed(seed)
    luca = LuCA(D, flow=flow)
    with torch.no_grad():
        for parameter in luca.parameters():
            parameter.normal_(generator=generator)
    return luca.requires_grad_(False)


def random_z(seed: int = 1, batch: int = B) -> torch.Tensor:
    return 3.0 * torch.randn(batch, D, generator=torch.Generator().manual_seed(seed)) + 0.5


def layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    mean = x.mean(axis=1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * weight + bias


def numpy_luca(luca: LuCA, z: Array) -> Array:
    p = {name: value.numpy().astype(np.float64) for name, value in luca.state_dict().items()}

    def adapter(x: Array) -> Array:
        hidden = x @ p["w1"].T + p["b1"]
        gelu = 0.5 * hidden * (1.0 + erf(hidden / math.sqrt(2.0)))
        return gelu @ p["w2"].T + p["b2"]

    def norm(x: Array) -> Array:
        return layer_norm(x, p["norm_weight"], p["norm_bias"])

    def gate(x: Array) -> Array:
        return 1.0 / (1.0 + np.exp(-np.maximum(x @ p["v1"].T, 0.0) @ p["v2"].T))

    match luca.flow:
        case "tosca":
            a = norm(z + adapter(z))
            return a * gate(a)
        case "tosca_r":
            return z * gate(z) + norm(adapter(z))
        case "adapter":
            return norm(adapter(z))
        case "calibrator":
            return z * gate(z)


def test_tosca_flow_has_149808_parameters_at_768_features() -> None:
    assert count_parameters(LuCA(768)) == 149_808


def test_parameter_counts_follow_from_the_equations() -> None:
    adapter = 2 * 768 * 48 + 48 + 768 + 2 * 768  # W1, W2, b1, b2 and the norm
    calibrator = 2 * 768 * 48
    assert count_parameters(LuCA(768, flow="tosca")) == adapter + calibrator
    assert count_parameters(LuCA(768, flow="tosca_r")) == adapter + calibrator
    assert count_parameters(LuCA(768, flow="adapter")) == adapter
    assert count_parameters(LuCA(768, flow="calibrator")) == calibrator


@pytest.mark.parametrize(
    ("feature_dim", "bottleneck_dim"), [(768, 48), (192, 12), (384, 24), (20, 1), (8, 1)]
)
def test_bottleneck_is_a_sixteenth_of_the_features(feature_dim: int, bottleneck_dim: int) -> None:
    assert LuCA(feature_dim).bottleneck_dim == bottleneck_dim
    assert LuCA(feature_dim).w1.shape == (bottleneck_dim, feature_dim)


@pytest.mark.parametrize("flow", FLOWS)
def test_flow_equals_its_equation(flow: Flow) -> None:
    luca, z_BD = random_luca(flow), random_z()
    expected = numpy_luca(luca, z_BD.numpy().astype(np.float64))
    np.testing.assert_allclose(luca(z_BD).numpy(), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("flow", FLOWS)
def test_a_row_of_a_batch_equals_the_row_alone(flow: Flow) -> None:
    luca, z_BD = random_luca(flow), random_z()
    alone_BD = torch.cat([luca(z_BD[b : b + 1]) for b in range(B)])
    torch.testing.assert_close(luca(z_BD), alone_BD, rtol=1e-5, atol=1e-5)


def test_the_four_flows_are_four_different_functions() -> None:
    outputs = [random_luca(flow)(random_z()) for flow in FLOWS]
    for i, one in enumerate(outputs):
        for other in outputs[i + 1 :]:
            assert not torch.allclose(one, other, atol=1e-2)


def test_identity_start_gives_half_the_layer_norm() -> None:
    luca = LuCA(D)
    luca.initialise(torch.Generator().manual_seed(0), identity=True)
    z_BD = random_z()
    expected = 0.5 * layer_norm(z_BD.numpy().astype(np.float64), np.ones(D), np.zeros(D))
    np.testing.assert_allclose(luca(z_BD).detach().numpy(), expected, atol=1e-6)


def test_identity_start_can_learn_in_every_matrix() -> None:
    """W2 and V2 are zero, so they get the first gradients; W1 and V1 follow once those have moved."""
    luca = LuCA(D)
    luca.initialise(torch.Generator().manual_seed(0), identity=True)
    target_BD = random_z(seed=2)
    for _ in range(2):
        loss = ((luca(random_z()) - target_BD) ** 2).mean()
        loss.backward()
        with torch.no_grad():
            for parameter in luca.parameters():
                parameter -= 0.1 * parameter.grad
    for name, parameter in luca.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("identity", [False, True])
def test_the_generator_alone_decides_the_weights(flow: Flow, identity: bool) -> None:
    def draw(seed: int) -> dict[str, torch.Tensor]:
        luca = LuCA(D, flow=flow)
        luca.initialise(torch.Generator().manual_seed(seed), identity=identity)
        return luca.state_dict()

    before = torch.random.get_rng_state()
    first, again, other = draw(3), draw(3), draw(4)
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator is left alone"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_initial_weights_fill_the_range_of_their_fan_in() -> None:
    luca = LuCA(256)
    luca.initialise(torch.Generator().manual_seed(0), identity=False)
    for name, fan_in in [("w1", 256), ("v1", 256), ("w2", 16), ("v2", 16)]:
        largest = float(getattr(luca, name).detach().abs().max())
        assert 0.9 * fan_in**-0.5 < largest <= fan_in**-0.5, name


def random_head(num_classes: int = 7, scale: float = 10.0) -> CosineHead:
    head = CosineHead(D, num_classes, scale)
    with torch.no_grad():
        head.weight_KD.normal_(generator=torch.Generator().manual_seed(9))
    return head.requires_grad_(False)


def test_cosine_head_equals_scaled_cosines() -> None:
    head, out_BD = random_head(scale=6.5), random_z()
    x, w = out_BD.numpy().astype(np.float64), head.weight_KD.numpy().astype(np.float64)
    cosine = (x @ w.T) / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(w, axis=1))
    np.testing.assert_allclose(head(out_BD).numpy(), 6.5 * cosine, atol=1e-5)


@pytest.mark.parametrize("factor", [1e-3, 0.5, 7.0, 1e4])
def test_cosine_head_ignores_the_length_of_its_input(factor: float) -> None:
    head, out_BD = random_head(), random_z()
    torch.testing.assert_close(head(factor * out_BD), head(out_BD), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
def test_cosine_head_ignores_the_length_of_its_rows(factor: float) -> None:
    head, longer = random_head(), random_head()
    longer.weight_KD.mul_(factor)
    torch.testing.assert_close(longer(random_z()), head(random_z()), rtol=1e-4, atol=1e-5)


def test_cosine_logits_are_bounded_by_the_scale() -> None:
    head = random_head(scale=4.0)
    aligned_KD = 100.0 * head.weight_KD
    assert float(head(random_z(batch=200)).abs().max()) <= 4.0 + 1e-5
    torch.testing.assert_close(head(aligned_KD).diagonal(), torch.full((7,), 4.0))
    torch.testing.assert_close(head(-aligned_KD).diagonal(), torch.full((7,), -4.0))
