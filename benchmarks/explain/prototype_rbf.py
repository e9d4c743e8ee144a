"""The prototype network beside its peers: accuracy, certified accuracy and seconds to fit the digits.

    python benchmarks/explain/prototype_rbf.py [--peer-python /path/to/python]

`tools/setup-peers explain` puts the peers into an environment of their own:

1. prototorch 0.7.6, by the group of the paper's authors: GLVQ, and the original CBC from its parts
   (`cbcc`, gaussian detections), both trained by the loop that its examples have: Adam, batches of 128,
   80 epochs, prototypes from the same k-means.
2. sklearn-lvq 1.1.1: GLVQ by L-BFGS. It is of 2020 and fails with the scipy that scikit-learn 1.9 needs ("x0
   must only have one dimension"); the line comes back where it runs.
3. scikit-learn's SVC, the ceiling of accuracy.

All get the same 1,257 training and 540 test images in 0..1. Certified: right, with an L2 radius of 0.5, for
prototypes by the triangle inequality ("closed") and by the best certificate known ("best"). The ratio at the
end is seconds of the peer over seconds of the network. The authors' shallow code is not public.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.svm import SVC

from paperback.data import images
from paperback.explain.baselines import GLVQ
from paperback.explain.prototype_rbf import RBFPrototypeClassifier

PEER_PYTHON = Path(__file__).resolve().parents[2] / ".venv-peers-explain" / "bin" / "python"
PER_CLASS, RADIUS, EPOCHS = 4, 0.5, 80

PEER = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import numpy as np, torch
from prototorch.core.competitions import cbcc
from prototorch.core.distances import euclidean_distance
from prototorch.core.losses import glvq_loss, margin_loss
torch.set_num_threads(1)
folder, epochs = sys.argv[1], int(sys.argv[2])
data = np.load(folder + "/data.npz")
x, y = torch.tensor(data["x"]).float(), torch.tensor(data["y"])
test, means = torch.tensor(data["test"]).float(), torch.tensor(data["means"]).float()
owners = torch.tensor(data["owners"])
hot, result = torch.nn.functional.one_hot(y, 10).float(), {}

def fit(parameters, loss):
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    start = time.perf_counter()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            loss(rows).backward()
            optimizer.step()
    return time.perf_counter() - start

w = means.clone().requires_grad_()
seconds = fit([w], lambda r: glvq_loss(euclidean_distance(x[r], w) ** 2, y[r], owners).mean())
with torch.no_grad():
    predicted = owners[euclidean_distance(test, w).argmin(1)]
result["prototorch GLVQ"] = {
    "seconds": seconds, "predicted": predicted.tolist(), "prototypes": w.detach().tolist()
}

w = means.clone().requires_grad_()
reasoning = torch.rand(len(w), 10, 2)
reasoning[..., 0] = 0.1 + 0.8 * (owners[:, None] == torch.arange(10))
reasoning.requires_grad_()
detect = lambda rows: torch.exp(-euclidean_distance(rows, w) ** 2 / 2)
seconds = fit([w, reasoning], lambda r: margin_loss(cbcc(detect(x[r]), reasoning), hot[r], 0.3).mean())
with torch.no_grad():
    predicted = cbcc(detect(test), reasoning).argmax(1)
result["prototorch CBC"] = {"seconds": seconds, "predicted": predicted.tolist()}

from sklearn_lvq import GlvqModel
try:
    model = GlvqModel(prototypes_per_class=len(owners) // 10, random_state=0)
    start = time.perf_counter()
    model.fit(data["x"], data["y"])
    seconds = time.perf_counter() - start
    result["sklearn-lvq GLVQ"] = {
        "seconds": seconds, "predicted": model.predict(data["test"]).tolist(), "prototypes": model.w_.tolist()
    }
except Exception as error:
    result["sklearn-lvq GLVQ"] = {"failed": f"{type(error).__name__}: {error}"}
print(json.dumps(result))
"""

Array = NDArray[Any]


def digits() -> tuple[Array, Array, Array, Array]:
    """Training and test rows with labels."""
    data = images.digits(0, n_val=0, n_test=540)
    train, test = (np.asarray(part.x.flatten(1), dtype=float) / 16 for part in (data.train, data.test))
    return train, data.train.y.numpy(), test, data.test.y.numpy()


def nearest_radii(prototypes: Array, owners: Array, test: Array, truth: Array) -> Array:
    """(d- - d+) / 2 of a nearest-prototype rule."""
    distances = np.linalg.norm(test[:, None] - prototypes, axis=2)
    own = owners == truth[:, None]
    return (np.where(own, np.inf, distances).min(1) - np.where(own, distances, np.inf).min(1)) / 2


def timed(fit: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the seconds of the quickest of three runs."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = fit()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def ours(train: Array, labels: Array, test: Array, truth: Array) -> list[dict[str, Any]]:
    """The network with and without negative reasoning, GLVQ of the wing, SVC."""
    rows = []
    for name, model in {
        "network, robust": RBFPrototypeClassifier(PER_CLASS, margin=1.0),
        "network, presence only": RBFPrototypeClassifier(PER_CLASS, margin=1.0, negative=False),
    }.items():
        fitted, seconds = timed(lambda model=model: model.fit(train, labels))
        row = {"model": name, "seconds": seconds, "accuracy": fitted.score(test, truth)}
        row["closed"] = np.mean(fitted.certify(test, truth, tight=False) >= RADIUS)
        rows.append(row | {"best": np.mean(fitted.certify(test, truth) >= RADIUS)})
    fitted, seconds = timed(lambda: GLVQ(PER_CLASS).fit(train, labels))
    owners = fitted.classes_.repeat(PER_CLASS)
    closed = np.mean(nearest_radii(fitted.prototypes_, owners, test, truth) >= RADIUS)
    best = np.mean(fitted.certify(test, truth) >= RADIUS)
    rows.append({"model": "GLVQ of paperback", "seconds": seconds, "accuracy": fitted.score(test, truth),
                 "closed": closed, "best": best})  # fmt: skip
    machine, seconds = timed(lambda: SVC(C=10).fit(train, labels))
    return [*rows, {"model": "SVC", "seconds": seconds, "accuracy": machine.score(test, truth)}]


def peers(python: Path, train: Array, labels: Array, test: Array, truth: Array) -> list[dict[str, Any]]:
    """What the peers' environment measured; a line that says so where there is none."""
    if not python.exists():
        print(f"no peers: {python} is not there; run tools/setup-peers explain.")
        return []
    means = [KMeans(PER_CLASS, n_init=1, random_state=0).fit(train[labels == c]) for c in range(10)]
    start = np.concatenate([found.cluster_centers_ for found in means])
    owners = np.arange(10).repeat(PER_CLASS)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(folder + "/data.npz", x=train, y=labels, test=test, means=start, owners=owners)
        command = [str(python), "-c", PEER, folder, str(EPOCHS)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"the peers failed: {done.stderr.strip().splitlines()[-1]}")
        return []
    rows = []
    for name, found in json.loads(done.stdout.splitlines()[-1]).items():
        if "failed" in found:
            print(f"{name} does not run: {found['failed']}")
            continue
        row = {"model": name, "seconds": found["seconds"], "accuracy": np.mean(found["predicted"] == truth)}
        if "prototypes" in found:
            radii = nearest_radii(np.array(found["prototypes"]), owners, test, truth)
            row["closed"] = np.mean(radii >= RADIUS)
        rows.append(row)
    return rows


def main() -> None:
    """Print one line for each model and the ratio of seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = digits()
    RBFPrototypeClassifier(1, epochs=1).fit(*data[:2])  # what torch imports at its first step is not timed
    rows = ours(*data) + peers(arguments.peer_python, *data)
    print(f"{'model':24s} {'seconds':>8s} {'accuracy':>9s} {'closed':>7s} {'best':>7s} {'ratio':>7s}")
    for row in rows:
        shares = [f"{row[key]:7.3f}" if key in row else "      -" for key in ("closed", "best")]
        ratio = row["seconds"] / rows[0]["seconds"]
        print(
            f"{row['model']:24s} {row['seconds']:8.2f} {row['accuracy']:9.3f} {' '.join(shares)} {ratio:7.2f}"
        )


if __name__ == "__main__":
    main()
