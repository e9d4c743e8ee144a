"""A hidden Chow-Liu tree by spflow: seconds of structure, of each step of EM, of inference, and the result.

Runs in `.venv-peers-density`, called by `run_peer`. Reads train, test, latents, levels, steps; writes
structure_seconds, seconds (of each step), test_log_prob (after each step, natural), inference_seconds.
"""

import math
import sys
import time

import numpy as np
import torch
from spflow.learn.expectation_maximization import expectation_maximization
from spflow.zoo.hclt import learn_hclt_categorical


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    given = np.load(sys.argv[1])
    train, test = torch.from_numpy(given["train"]).float(), torch.from_numpy(given["test"]).float()
    start = time.perf_counter()
    model = learn_hclt_categorical(
        train, num_hidden_cats=int(given["latents"]), num_cats=int(given["levels"]), init="random"
    )
    structure_seconds = time.perf_counter() - start

    def score() -> float:
        with torch.no_grad():
            return float(model.log_likelihood(test).flatten(1).mean())

    # One call with all steps, as a user would make it, to see where it stops by itself; then each step on its
    # own, since it stops at the first step in which the likelihood does not rise.
    seconds, scores, train_scores, stopped = [], [score()], [], 0
    for step in range(int(given["steps"])):
        start = time.perf_counter()
        train_scores.append(float(expectation_maximization(model, train, max_steps=1)[0]))
        seconds.append(time.perf_counter() - start)
        scores.append(score())
        if not stopped and step and train_scores[-1] <= train_scores[-2]:
            stopped = step + 1  # here a call with all steps would have ended
        if not math.isfinite(scores[-1]):
            break
    inference = []
    for _ in range(7):
        start = time.perf_counter()
        score()
        inference.append(time.perf_counter() - start)
    np.savez(
        sys.argv[2],
        structure_seconds=structure_seconds,
        seconds=np.array(seconds),
        test_log_prob=np.array(scores),
        train_log_prob=np.array(train_scores),
        stopped=stopped,
        inference_seconds=min(inference),
    )


if __name__ == "__main__":
    main()
