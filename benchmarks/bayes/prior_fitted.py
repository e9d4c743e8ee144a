"""Prior-fitted networks beside MCMC and beside the form of the authors' training.

    python benchmarks/bayes/prior_fitted.py [--network FOLDER] [--steps 4000] [--tasks 1000]

1. Time and loss of a prediction after five rows of a Gaussian process with hyper-priors: the network, HMC
   (ours, one chain for each data set, all in one batch), the NUTS of Pyro (one data set after the other, in
   an environment of its own: `tools/setup-peers bayes`), MLE-II by gpytorch, and the exact quadrature. The
   bar: 200 times as fast as MCMC, at most 0.12 nats from the truth, for one data set and for many.
2. Data sets per second in training, the same sizes and the same prior, against a direct transcription of the
   authors' network: attention of all rows on all rows under a mask, normalisation behind each block. The bar
   is 1. Their package (`pfns`) wants weights from the network for its ready models and an older torch for
   its training, so their algorithm is written out here.

All times are of the processor, one thread. Without --network the network of the study's second part is
trained first, two minutes on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from peers import run_peer
from torch import Tensor, nn

from paperback.bayes.prior_fitted import PriorFittedTransformer, priors
from paperback.bayes.prior_fitted.training import draw_tasks
from paperback.bayes.studies.prior_fitted.fixed import QUERIES, fitted
from paperback.bayes.studies.prior_fitted.rivals import LogNormalGP, fit_mle2
from paperback.training import generator, seeded

ROWS = 5
Task = tuple[Tensor, Tensor, Tensor]
GP = LogNormalGP()


def fastest(work: Callable[[], object], repeats: int) -> float:
    """The least seconds of several runs."""
    return min(timed(work)[0] for _ in range(repeats))


def timed(work: Callable[[], object]) -> tuple[float, object]:
    """Seconds of the processor, which do not depend on what else the machine does, and what came out."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def against_mcmc(network: PriorFittedTransformer, n_tasks: int) -> None:
    """Times and losses on the same data sets."""
    x, y = GP.prior()(n_tasks, ROWS + QUERIES, generator(0, "benchmark"))
    task, truth = (x[:, :ROWS], y[:, :ROWS], x[:, ROWS:]), y[:, ROWS:].double()
    one = (task[0][:1], task[1][:1], task[2][:1])

    def network_law(some: Task) -> torch.distributions.Distribution:
        with torch.no_grad():
            return network.law(network(*some))

    def hmc_law(some: Task) -> torch.distributions.Distribution:
        chains = GP.sample_posterior(some[0], some[1], generator=generator(0, "hmc"))
        return GP.predict_from(chains.samples, *some)

    def losses(law: object) -> Tensor:
        assert isinstance(law, torch.distributions.Distribution)
        return -law.log_prob(truth)

    def each(law: Callable[[Task], object], some: Task, repeats: int) -> float:
        return fastest(lambda: law(some), repeats) / len(some[0])

    query = (task[0], task[1], task[2][:, :1])
    exact = GP.exact(*task)
    best = losses(exact)
    print(f"{ROWS} rows, {n_tasks} data sets: milliseconds for each, and times the network's; gap in nats")
    times: dict[str, tuple[float | None, float | None, float, float]] = {}
    models = {"network": network_law, "HMC, 500 draws": hmc_law, "quadrature": lambda some: GP.exact(*some)}
    for name, law in models.items():
        repeats = 10 if name == "network" else 1
        gap = float((losses(law(task)) - best).mean())
        times[name] = (each(law, task, repeats), each(law, query, repeats), each(law, one, 5 * repeats), gap)
    few = min(20, n_tasks)
    seconds, fits = timed(lambda: [fit_mle2(task[0][i], task[1][i], task[2][i], GP) for i in range(few)])
    assert isinstance(fits, list)
    gaps = [float((-fit.log_prob(truth[i]) - best[i]).mean()) for i, fit in enumerate(fits)]
    times[f"MLE-II ({few} data sets)"] = (None, None, seconds / few, sum(gaps) / few)
    few = min(2, n_tasks)
    peer = run_peer(
        "pyro_gp_nuts.py", x=task[0][:few].numpy(), y=task[1][:few].numpy(), draws=500, burn_in=200,
        lengthscale=GP.lengthscale, outputscale=GP.outputscale, noise=GP.noise,
    )  # fmt: skip
    if isinstance(peer, str):
        print(f"NUTS of Pyro: {peer}")
    else:
        nuts = GP.predict_from(torch.as_tensor(peer["samples"]), *(part[:few] for part in task))
        gap = float((-nuts.log_prob(truth[:few]) - best[:few]).mean())
        times[f"NUTS of Pyro ({few} data sets)"] = (None, None, float(peer["seconds"].mean()), gap)
    ours = times["network"]
    for name, (many, single, alone, gap) in times.items():
        print(
            f"{name:28s} in a batch, {QUERIES} queries {_against(many, ours[0])}   1 query "
            f"{_against(single, ours[1])}   alone {_against(alone, ours[2])}   gap {gap:+.3f}"
        )


def _against(seconds: float | None, ours: float | None) -> str:
    """Milliseconds, and the ratio to the network's."""
    if seconds is None or ours is None:
        return "         -        "
    return f"{1e3 * seconds:9.3f} ({seconds / ours:6.0f})"


# -- training ------------------------------------------------------------------------------------------------


class MaskedTransformer(nn.Module):
    """The authors' network in their form, transcribed: torch's encoder on context and queries together.

    Sizes and head are those of the network it stands beside.
    """

    def __init__(self, network: PriorFittedTransformer, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed_x, self.embed_y = nn.Linear(network.num_features, width), nn.Linear(1, width)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        for block in self.encoder.layers:
            for last in (block.self_attn.out_proj, block.linear2):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
        bars = len(network.borders) - 1
        self.decoder = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, bars))

    def forward(self, context_x: Tensor, context_y: Tensor, x: Tensor) -> Tensor:
        """Logits of the queries' bars."""
        n, total = context_x.shape[1], context_x.shape[1] + x.shape[1]
        tokens = self.embed_x(torch.cat([context_x, x], 1))
        tokens = torch.cat([tokens[:, :n] + self.embed_y(context_y[..., None]), tokens[:, n:]], 1)
        hidden = torch.ones(total, total, dtype=torch.bool)
        hidden[:, :n] = False
        hidden.fill_diagonal_(False)
        return self.decoder(self.encoder(tokens, mask=hidden)[:, n:])


def training_throughput(most_rows: int, queries: int, batch_size: int, steps: int) -> None:
    """Data sets per second of forward, backward and Adam, drawing from the prior included."""
    prior = priors.GP(1, lengthscale=0.2, noise=0.01)
    with seeded(0, "throughput"):
        ours = PriorFittedTransformer(1, d_model=64, layers=4, heads=4, max_context=most_rows, n_bars=100)
        theirs = MaskedTransformer(ours, 64, 4, 4)
    optimizers = {id(model): torch.optim.Adam(model.parameters(), fused=True) for model in (ours, theirs)}

    def run(model: nn.Module) -> None:
        draws = generator(0, "same tasks")
        for _ in range(steps):
            tasks = draw_tasks(ours, prior, batch_size, queries, "weighted", draws)
            loss = ours.negative_log_likelihood(
                model(tasks.context_x, tasks.context_y, tasks.x), tasks.y
            ).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[id(model)].step()
            optimizers[id(model)].zero_grad()

    seconds: dict[str, list[float]] = {"ours": [], "masked": []}
    for _ in range(4):  # turn by turn, so that a busy machine hits both
        seconds["ours"].append(fastest(lambda: run(ours), 1))
        seconds["masked"].append(fastest(lambda: run(theirs), 1))
    rates = {name: batch_size * steps / min(each[1:]) for name, each in seconds.items()}
    print(
        f"training on {most_rows} + {queries} rows: {rates['ours']:.0f} data sets per second, masked form "
        f"{rates['masked']:.0f}; ratio {rates['ours'] / rates['masked']:.2f} (the bar is 1)"
    )


def main() -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", help="folder of a network fitted to LogNormalGP().prior()")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--tasks", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    training_throughput(20, 20, 32, 30)
    training_throughput(200, 100, 8, 10)
    training_throughput(800, 200, 2, 6)
    if arguments.network:
        network = PriorFittedTransformer.from_pretrained(arguments.network)
    else:
        network = fitted(GP.prior(), arguments.steps, 0, lr=4e-3, d_model=32)
    against_mcmc(network, arguments.tasks)


if __name__ == "__main__":
    main()
