"""Hyper-parameters of a Gaussian process by Pyro's NUTS, one data set after the other.

Runs in `.venv-peers-bayes`, called by `run_peer`. Reads x ``(tasks, n, 1)``, y ``(tasks, n)``, draws,
burn_in, lengthscale and outputscale (median, standard deviation of the logarithm) and noise; writes samples
of the two logarithms ``(draws, tasks, 2)`` and seconds ``(tasks,)``.
"""

import sys
import time

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS


def main() -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    given = np.load(sys.argv[1])
    scales = torch.as_tensor(np.stack([given["lengthscale"], given["outputscale"]]))
    noise, samples, seconds = float(given["noise"]), [], []
    for x, y in zip(given["x"], given["y"], strict=True):
        squared = torch.as_tensor(x - x.T).double().square()
        targets, eye = torch.as_tensor(y).double(), torch.eye(len(y))

        def model(squared=squared, targets=targets, eye=eye):
            logs = pyro.sample("logs", dist.Normal(scales[:, 0].log(), scales[:, 1]).to_event(1))
            length, variance = logs.exp()
            covariance = variance * torch.exp(-squared / (2 * length.square())) + noise * eye
            pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(targets), covariance), obs=targets)

        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        start = time.process_time()
        chain = MCMC(NUTS(model), int(given["draws"]), int(given["burn_in"]), disable_progbar=True)
        chain.run()
        seconds.append(time.process_time() - start)
        samples.append(chain.get_samples()["logs"].numpy())
    np.savez(sys.argv[2], samples=np.stack(samples, 1), seconds=np.array(seconds))


if __name__ == "__main__":
    main()
