"""The linearised Laplace approximation by laplace-torch, at given weights.

Runs in `.venv-peers-bayes`, called by `run_peer`. Reads x, y, new, the matrices and biases W0, b0, W1, ...
of a tanh network, noise variance, prior precision, the structure of the Hessian, and whether biases are
columns of their matrices (laplace-torch gives biases a factor of their own otherwise); writes mean and
variance ``(new, outputs)`` of the noise-free function, log_marginal, and seconds of fit and of prediction.
"""

import sys
import time
from unittest.mock import MagicMock

import numpy as np
import torch

# laplace-torch brings torchvision for torchmetrics' image metrics, which nothing here uses; where that is
# built for another torch it fails to register its operators. Mocks stand in for it.
sys.modules |= {f"torchvision{part}": MagicMock() for part in ("", ".models", ".transforms")}
from laplace import Laplace  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402


class AppendOne(nn.Module):
    """Puts a one behind the features, so that the bias can be a column of the next matrix."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(h, (0, 1), value=1.0)


def main() -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    given = np.load(sys.argv[1])
    x, y, new = (torch.from_numpy(given[name]) for name in ("x", "y", "new"))
    layers = []
    for number in range(sum(name.startswith("W") for name in given.files)):
        matrix, bias = (torch.from_numpy(given[f"{kind}{number}"]) for kind in "Wb")
        if given["homogeneous"]:
            linear = nn.Linear(matrix.shape[1] + 1, matrix.shape[0], bias=False)
            linear.weight.data = torch.cat([matrix, bias[:, None]], 1)
            layers.append(AppendOne())
        else:
            linear = nn.Linear(matrix.shape[1], matrix.shape[0])
            linear.weight.data, linear.bias.data = matrix, bias
        layers += [linear, nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    start = time.perf_counter()
    laplace = Laplace(
        model,
        "regression",
        subset_of_weights="all",
        hessian_structure=str(given["structure"]),
        sigma_noise=float(given["s2"]) ** 0.5,
        prior_precision=float(given["delta"]),
    )
    laplace.fit(DataLoader(TensorDataset(x, y), batch_size=len(x)))
    middle = time.perf_counter()
    mean, variance = laplace(new)
    end = time.perf_counter()
    np.savez(
        sys.argv[2],
        mean=mean.detach().numpy(),
        variance=variance.detach().diagonal(dim1=-2, dim2=-1).numpy(),
        log_marginal=float(laplace.log_marginal_likelihood()),
        fit_seconds=middle - start,
        seconds=end - middle,
    )


if __name__ == "__main__":
    main()
