"""LuCA: the adapter and calibrator that TOSCA puts on the final CLS token, and the cosine head.

Source: Yildirim, Gok Yildirim, Vanschoren, "Unlocking [CLS] Features for Continual Post-Training"
(TMLR 2026, arXiv 2502.14762).
"""
# B batch, D features, R bottleneck (D / 16), K classes

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

Flow = Literal["tosca", "tosca_r", "adapter", "calibrator"]
FLOWS: tuple[Flow, ...] = get_args(Flow)
BOTTLENECK_RATIO = 16


class LuCA(nn.Module):
    """One task's module: [B, D] CLS vectors in, [B, D] recalibrated features out.

    With adapter(z) = W2·GELU(W1·z + b1) + b2 and gate(x) = sigmoid(V2·ReLU(V1·x)):

    - `tosca`       a = LayerNorm(z + adapter(z));  a ⊙ gate(a)          (the default)
    - `tosca_r`     z ⊙ gate(z) + LayerNorm(adapter(z))
    - `adapter`     LayerNorm(adapter(z))
    - `calibrator`  z ⊙ gate(z)

    The parameter names are those of the equations, and those of the module file. Parameters may rest in
    float16; the arithmetic is float32.
    """

    def __init__(self, feature_dim: int, bottleneck_dim: int | None = None, flow: Flow = "tosca") -> None:
        super().__init__()
        bottleneck_dim = bottleneck_dim or max(1, feature_dim // BOTTLENECK_RATIO)
        self.flow = flow
        self.feature_dim = feature_dim
        self.bottleneck_dim = bottleneck_dim
        if flow != "calibrator":
            self.w1 = nn.Parameter(torch.zeros(bottleneck_dim, feature_dim))
            self.b1 = nn.Parameter(torch.zeros(bottleneck_dim))
            self.w2 = nn.Parameter(torch.zeros(feature_dim, bottleneck_dim))
            self.b2 = nn.Parameter(torch.zeros(feature_dim))
            self.norm_weight = nn.Parameter(torch.ones(feature_dim))
            self.norm_bias = nn.Parameter(torch.zeros(feature_dim))
        if flow != "adapter":
            self.v1 = nn.Parameter(torch.zeros(bottleneck_dim, feature_dim))
            self.v2 = nn.Parameter(torch.zeros(feature_dim, bottleneck_dim))

    def initialise(self, generator: torch.Generator, *, identity: bool) -> None:
        """Draw the weights from `generator`, uniform in ±1/sqrt(fan-in).

        With `identity` the second matrices W2 and V2 start at zero, so that the module starts as
        LayerNorm(z) / 2 and learns only a departure from the frozen feature.
        """
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.startswith("norm"):
                    continue
                if identity and name in ("w2", "b2", "v2"):
                    parameter.zero_()
                    continue
                fan_in = self.bottleneck_dim if name in ("w2", "b2", "v2") else self.feature_dim
                bound = fan_in**-0.5
                parameter.uniform_(-bound, bound, generator=generator)

    def forward(self, z_BD: Tensor) -> Tensor:
        if self.flow == "tosca":
            a_BD = self._norm(z_BD + self._adapter(z_BD))
            return a_BD * self._gate(a_BD)
        if self.flow == "tosca_r":
            return z_BD * self._gate(z_BD) + self._norm(self._adapter(z_BD))
        if self.flow == "adapter":
            return self._norm(self._adapter(z_BD))
        return z_BD * self._gate(z_BD)

    def _adapter(self, z_BD: Tensor) -> Tensor:
        hidden_BR = F.gelu(F.linear(z_BD, self.w1.float(), self.b1.float()))
        return F.linear(hidden_BR, self.w2.float(), self.b2.float())

    def _norm(self, x_BD: Tensor) -> Tensor:
        return F.layer_norm(x_BD, (self.feature_dim,), self.norm_weight.float(), self.norm_bias.float())

    def _gate(self, x_BD: Tensor) -> Tensor:
        return torch.sigmoid(F.linear(F.relu(F.linear(x_BD, self.v1.float())), self.v2.float()))


class CosineHead(nn.Module):
    """logit_k = σ · cos(out, w_k), with the scale σ learnt by each task for itself."""

    def __init__(self, feature_dim: int, num_classes: int, scale: float = 10.0) -> None:
        super().__init__()
        self.weight_KD = nn.Parameter(torch.zeros(num_classes, feature_dim))
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, out_BD: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(out_BD, dim=-1), self.directions())

    def directions(self) -> Tensor:
        """[K, D] float32 unit vectors of the classes."""
        return F.normalize(self.weight_KD.float(), dim=-1)


def matrix_names(flow: Flow) -> tuple[str, ...]:
    """The parameters of a flow that are matrices: nearly all of its numbers, and the ones made sparse."""
    adapter = () if flow == "calibrator" else ("w1", "w2")
    return adapter if flow == "adapter" else (*adapter, "v1", "v2")


def count_parameters(module: nn.Module) -> int:
    """Number of learnable scalars; 149,808 for the `tosca` flow at D = 768."""
    return sum(parameter.numel() for parameter in module.parameters())
