"""Information estimators beside their peers, on the same arrays.

    python benchmarks/theory/adaptive_information.py [--peer-python PATH]

The peers are `npeet-plus` (the maintained release of NPEET: KSG and discrete states), `infomeasure` and `dit`
(discrete states). They live in an environment of their own, `tools/setup-peers theory`, so that their
dependencies touch nothing. Without it scikit-learn alone is the peer, and the script says so. It runs there
too, as ``--as-peer``, on arrays that ours wrote. Printed are both values, their difference, both times and
the ratio (above 1: ours is faster). Bars: discrete information agrees to 1e-12 bits, and adaptive binning
of 4,096 x 10 activations takes at most 20 ms.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PEER_PYTHON = Path(__file__).resolve().parents[2] / ".venv-peers-theory" / "bin" / "python"
INPUTS, UNITS, CLASSES = 4096, 10, 4
BAR_MS, BAR_BITS = 20.0, 1e-12

EBAB, DISCRETE = "EBAB with H(T), 4,096 x 10", "discrete I(T;Y), 4,096"
NEIGHBOURS, WITH_LABELS = "KSG, 2,000 x (1 + 1)", "KSG with labels, 2,000 x 1"

Result = dict[str, tuple[float, float]]  # task -> value in bits, seconds


def fastest(work: Callable[[], float], repeats: int) -> tuple[float, float]:
    """What came out, and the least seconds of several runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        value = float(work())
        seconds.append(time.perf_counter() - start)
    return value, min(seconds)


def ours(T: NDArray, y: NDArray, states: NDArray, x: NDArray, t: NDArray, labels: NDArray) -> Result:
    """Our estimates."""
    from paperback.theory.information import (
        AdaptiveBins,
        Sample,
        discrete_mutual_information,
        ksg,
        ksg_with_labels,
    )

    return {
        EBAB: fastest(lambda: AdaptiveBins().estimate(Sample(T, y)).xt, 20),
        DISCRETE: fastest(lambda: discrete_mutual_information(states, y), 20),
        NEIGHBOURS: fastest(lambda: ksg(x, t), 3),
        WITH_LABELS: fastest(lambda: ksg_with_labels(t, labels), 3),
    }


def by_sklearn(states: NDArray, y: NDArray, t: NDArray, labels: NDArray) -> Result:
    """scikit-learn's: discrete scores and the scalar nearest-neighbour estimator."""
    from sklearn.feature_selection import mutual_info_classif
    from sklearn.metrics import mutual_info_score

    def with_labels() -> float:
        found = mutual_info_classif(t, labels, discrete_features=False, random_state=0)
        return float(found[0]) / math.log(2)

    return {
        DISCRETE: fastest(lambda: mutual_info_score(states, y) / math.log(2), 5),
        WITH_LABELS: fastest(with_labels, 3),
    }


def peers(given: Path) -> dict[str, Result]:
    """In the peers' interpreter: what they make of the same arrays."""
    import dit
    import infomeasure
    import npeet_plus

    arrays = np.load(given)
    states, y, x, t = (arrays[name] for name in ("states", "y", "x", "t"))

    def by_dit() -> float:
        pairs, counts = np.unique(np.stack([states, y], 1), axis=0, return_counts=True)
        joint = dit.Distribution([tuple(map(int, pair)) for pair in pairs], list(counts / len(y)))
        return dit.shannon.mutual_information(joint, [0], [1])

    return {
        "npeet-plus": {
            DISCRETE: fastest(lambda: npeet_plus.midd(states[:, None], y[:, None]), 3),
            NEIGHBOURS: fastest(lambda: npeet_plus.mi(x, t, k=3), 3),
        },
        "infomeasure": {
            DISCRETE: fastest(
                lambda: infomeasure.mutual_information(states, y, approach="discrete", base=2), 3
            ),
            NEIGHBOURS: fastest(
                lambda: infomeasure.mutual_information(
                    x[:, 0], t[:, 0], approach="metric", k=3, base=2, noise_level=1e-10
                ),
                1,
            ),
        },
        "dit": {DISCRETE: fastest(by_dit, 1)},
    }


def run_peers(python: str, **arrays: NDArray) -> dict[str, Result]:
    """The other interpreter's results; none if it cannot be run, with the reason."""
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "given.npz"
        np.savez(given, **arrays)
        done = subprocess.run(
            [python, __file__, "--as-peer", str(given)], capture_output=True, text=True, check=False
        )
    if done.returncode:
        print(f"peers not run: {done.stderr.strip().splitlines()[-1]}")
        return {}
    found: dict[str, Result] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run both sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--peer-python", default=str(PEER_PYTHON), help="interpreter that has npeet-plus, infomeasure and dit"
    )
    parser.add_argument("--as-peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_peer is not None:
        print(json.dumps(peers(options.as_peer)))
        return
    rng = np.random.default_rng(0)
    T = np.maximum(rng.standard_normal((INPUTS, UNITS)), 0).astype(np.float32)
    y = (T.sum(1) // 2).astype(np.int64) % CLASSES
    states = np.digitize(T[:, :3], [0.2, 0.6, 1.2]) @ np.array([1, 4, 16])  # 64 states, each often
    x = rng.standard_normal((2000, 1))
    t = 0.8 * x + 0.6 * rng.standard_normal((2000, 1))
    labels = (x[:, 0] > 0).astype(np.int64)
    own = ours(T, y, states, x, t, labels)
    others = {"scikit-learn": by_sklearn(states, y, t, labels)}
    if not Path(options.peer_python).exists():
        print(f"npeet-plus, infomeasure and dit not run: there is no {options.peer_python}.")
    else:
        others |= run_peers(options.peer_python, states=states, y=y, x=x, t=t)
    report(own, others)


def report(own: Result, others: dict[str, Result]) -> None:
    """The table, and whether the bars are reached."""
    for task, (value, seconds) in own.items():
        print(f"{task:28s} paperback     {value:.12f} bits {1e3 * seconds:9.2f} ms")
        for peer, found in others.items():
            if task in found:
                bits, taken = found[task]
                print(
                    f"{'':28s} {peer:13s} {bits:.12f} bits {1e3 * taken:9.2f} ms   "
                    f"difference {abs(bits - value):.1e}, ratio {taken / seconds:.1f}"
                )
    agrees = max(abs(found[DISCRETE][0] - own[DISCRETE][0]) for found in others.values())
    milliseconds = 1e3 * own[EBAB][1]
    print(
        f"discrete agreement {agrees:.1e} (bar {BAR_BITS:.0e}): {'held' if agrees <= BAR_BITS else 'MISSED'}"
    )
    print(f"EBAB {milliseconds:.1f} ms (bar {BAR_MS:.0f}): {'held' if milliseconds <= BAR_MS else 'MISSED'}")


if __name__ == "__main__":
    main()
