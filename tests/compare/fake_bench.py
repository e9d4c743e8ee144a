"""A bench whose contenders do what contenders do at their worst: raise, hang, eat memory, die, and return
nonsense.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from paperback.compare.bench import Bench, Contender, Metric
from paperback.errors import DataError

PAUSE = "PAPERBACK_TEST_PAUSE"  # seconds that "slow" contenders take, so that a test can interrupt them


def load(path, target, budget, seed):
    if path is None:
        return [1.0, 2.0, 3.0]
    if path.suffix != ".csv":
        raise DataError(f"{path} is not a CSV file; give one.")
    return [float(line) for line in path.read_text().split()[1:]]


def always(data):
    return None


def never(data):
    return "it takes images only"


def broken(data):
    raise RuntimeError("applies is broken")


def evaluate(contender, data, budget, seed, out):
    return contender.build(data, budget, seed)(out)


def good(quality, cost):
    def build(data, budget, seed):
        def run(out: Path):
            (out / "config.json").write_text("{}")
            print(f"fitting with seed {seed}")
            return {
                "loss": quality + 0.01 * seed,
                "accuracy": 1 - quality,
                "size": None,
                "fit_seconds": cost * (1 + seed),
            }

        return run

    return build


def slow(quality):
    def build(data, budget, seed):
        def run(out: Path):
            # A child of its own, as a data loader would be: it must die with the job.
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            (out / "child.pid").write_text(str(child.pid))
            time.sleep(float(os.environ.get(PAUSE, "0")))
            child.kill()
            child.wait()
            return good(quality, 1.0)(data, budget, seed)(out)

        return run

    return build


def raises(data, budget, seed):
    raise ValueError("the matrix is\nsingular")


def hangs(data, budget, seed):
    time.sleep(600)


def eats_memory(data, budget, seed):
    hoard = []
    for _ in range(200):
        hoard.append(bytearray(b"x" * 20_000_000))
        time.sleep(0.02)


def kills_itself(data, budget, seed):
    os.kill(os.getpid(), signal.SIGKILL)


def crashes(data, budget, seed):
    os.kill(os.getpid(), signal.SIGSEGV)


def exits(data, budget, seed):
    os._exit(3)


def returns(**metrics):
    full = {"loss": 1.0, "accuracy": 0.5, "size": 10.0, "fit_seconds": 1.0}
    return lambda data, budget, seed: lambda out: {k: v for k, v in (full | metrics).items() if v != "absent"}


def kills_its_parent_once(data, budget, seed):
    """On Ray: kills the Ray worker that runs the job, the first time."""
    mark = Path(os.environ["PAPERBACK_TEST_MARK"])
    if not mark.exists():
        mark.write_text("killed")
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
    return good(0.3, 1.0)(data, budget, seed)


METRICS = (
    Metric("loss", "loss", "nats", better="lower", primary=True),
    Metric("accuracy", "accuracy", better="higher"),
    Metric("size", "size on disk", "B", better="lower", cost=False),
    Metric("fit_seconds", "seconds to fit", "s", better="lower", cost=True),
)


def contender(name, build, kind="method", applies=always):
    return Contender(name, name.replace("-", " "), kind, applies, build)


BASELINE = contender("plain", good(0.9, 0.1), "baseline")


def bench(*contenders, **settings):
    return Bench("density", METRICS, (BASELINE, *contenders), load, evaluate, **settings)


HEALTHY = bench(
    contender("sharp", good(0.2, 30.0)), contender("brisk", good(0.205, 2.0)), seconds={"quick": 5.0}
)
SLOW = bench(contender("slow-a", slow(0.5)), contender("slow-b", slow(0.4)))
SICK = bench(
    contender("raises", raises),
    contender("kills-itself", kills_itself),
    contender("crashes", crashes),
    contender("exits", exits),
    contender("nan", returns(loss=float("nan"))),
    contender("wrong-keys", returns(loss="absent", los=1.0)),
    contender("no-number", returns(loss="a lot")),
    contender("no-primary", returns(loss=None)),
    contender("images-only", good(0.1, 1.0), applies=never),
    contender("broken-applies", good(0.1, 1.0), applies=broken),
)
HANGS = bench(contender("hangs", hangs))
EATS = bench(contender("eats-memory", eats_memory))
LOST = bench(contender("lost", kills_its_parent_once), contender("kept", good(0.4, 1.0)))
