"""The networks of the study."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "ReLU": nn.ReLU, "tanh": nn.Tanh, "GELU": nn.GELU, "SWISH": nn.SiLU,
}  # fmt: skip


class ResidualNetwork(nn.Module):
    """z' = gamma z + b + W s(z) in every layer behind the first."""

    def __init__(self, width: int, depth: int, gamma: float, activation: nn.Module) -> None:
        super().__init__()
        self.gamma, self.activation = gamma, activation
        self.first = nn.Linear(width, width)
        self.branches = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.sums = nn.ModuleList(nn.Identity() for _ in range(depth - 1))  # names for what is measured

    def forward(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        """The last preactivations."""
        z = self.first(x)
        for branch, total in zip(self.branches, self.sums, strict=True):
            z = total(self.gamma * z + branch(self.activation(z)))
        return z


def multilayer(
    activation: type[nn.Module], n_in: int, width: int, depth: int, n_out: int | None = None
) -> nn.Sequential:
    """`depth` layers of weights, all but the last followed by the activation."""
    parts: list[nn.Module] = []
    for layer in range(depth):
        n_next = n_out if n_out is not None and layer == depth - 1 else width
        parts += [nn.Linear(n_in if layer == 0 else width, n_next), activation()]
    return nn.Sequential(*parts[:-1])
