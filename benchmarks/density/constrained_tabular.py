"""The constraint layer beside its peers, on the same rows.

    python benchmarks/density/constrained_tabular.py [--rows 10000] [--repeats 5]

1. Correcting 10,000 rows of diamonds that break rules between columns:
   - our layer;
   - Euclidean projection by cvxpylayers, on fewer rows, scaled up to all of them;
   - Dykstra's alternating projections, batched, our own: the Euclidean reference without a solver;
   - the paper's procedure as a direct implementation has it, with an object per constraint and term (ours).
2. The share of the layer in sampling a table from our VAE.
3. A generator of another library behind `guard`: ctgan's TVAE, violations and seconds.
   SDV's own constraints compare a column with another or a number; rules with coefficients, such as
   z >= 0.275 (x + y), cannot be written in them, so there is nothing to time on these rules.

cvxpylayers and ctgan run in an environment of their own, `tools/setup-peers density`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from peers import run_peer
from torch import Tensor

from paperback.data import tables
from paperback.data.table_files import is_numeric
from paperback.density.constrained_tabular import (
    ConstrainedTabular,
    ConstraintLayer,
    LinearConstraints,
    guard,
)
from paperback.density.studies.constrained_tabular import DIAMONDS

CVX_ROWS = 200  # rows that the solver is given; its time is linear in them


def seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def broken_rows(rules: LinearConstraints, n: int) -> tuple[pd.DataFrame, Tensor]:
    """Diamonds with noise on their numbers, so that many of them break a rule."""
    frame = tables.diamonds(0, target=None).train.x
    frame = frame.loc[rules.complies(frame)].iloc[:n].reset_index(drop=True)
    values = rules.values(frame)
    noise = np.random.default_rng(0).normal(size=values.shape) * 0.3 * values.std(axis=0)
    return frame, torch.from_numpy(values + noise)


# -- peers --------------------------------------------------------------------------------------------------


def dykstra(rows: Tensor, A: Tensor, b: Tensor, scale: Tensor, sweeps: int = 200) -> Tensor:
    """Euclidean projection in units of each column's spread, half-space by half-space."""
    normals, x = A * scale, rows / scale
    norms = (normals**2).sum(1)
    corrections = torch.zeros(len(A), *x.shape, dtype=x.dtype)
    for _ in range(sweeps):
        before = x
        for k in range(len(A)):
            y = x + corrections[k]
            short = (-(y @ normals[k] + b[k])).clamp_min(0) / norms[k]
            x = y + short[:, None] * normals[k]
            corrections[k] = y - x
        if float((x - before).abs().max()) < 1e-9:
            break
    return x * scale


def one_constraint_at_a_time(rows: Tensor, levels: list) -> Tensor:
    """The paper's procedure with one object per constraint and term, as a direct implementation has it."""
    x = rows.clone()
    names = [level.column for level in levels]
    for level in levels:
        column = names.index(level.column)
        for side, choose, clamp in (
            (level.lower, torch.amax, torch.maximum),
            (level.upper, torch.amin, torch.minimum),
        ):
            if not side:
                continue
            bounds = []
            for row in side:
                total = torch.full((len(x),), float(row.constant), dtype=x.dtype)
                for name, weight in row.weights.items():
                    if name != level.column:
                        total = total + float(weight) * x[:, names.index(name)]
                bounds.append(-total / float(row.weights[level.column]))
            x = x.clone()
            x[:, column] = clamp(x[:, column], choose(torch.stack(bounds), 0))
    return x


# -- the comparisons ----------------------------------------------------------------------------------------


def bench_layer(rows: int, repeats: int) -> None:
    rules = LinearConstraints.parse(DIAMONDS)
    _, broken = broken_rows(rules, rows)
    A, b, _ = rules.arrays
    scale = broken.std(0)
    layer = ConstraintLayer(rules)
    levels = rules.levels(rules.columns)

    def line(name: str, run: Callable[[Tensor], Tensor], given: Tensor, repeats: int) -> float:
        with torch.no_grad():
            corrected = run(given)
            took = seconds(lambda: run(given), repeats)
        report(name, took, given, corrected)
        return took

    def report(name: str, took: float, given: Tensor, corrected: Tensor) -> None:
        violating = rules.violation_rate(pd.DataFrame(corrected.numpy(), columns=rules.columns), 1e-6)
        moved = float((((corrected - given) / scale) ** 2).sum(1).sqrt().mean())
        print(
            f"   {name:36s} {1e3 * took:12.2f} ms   violating {violating:.4f}   mean move {moved:.3f} spreads"
        )

    before = rules.violation_rate(pd.DataFrame(broken.numpy(), columns=rules.columns), 1e-6)
    print(
        f"1. {len(broken):,} rows, {len(rules)} rules, {len(A)} inequalities; {before:.2f} of the rows "
        "break one"
    )
    ours = line("paperback's layer", layer, broken, repeats)
    plain = line("one constraint at a time", lambda x: one_constraint_at_a_time(x, levels), broken, repeats)
    euclid = line(
        "Dykstra, Euclidean", lambda x: dykstra(x, torch.from_numpy(A), torch.from_numpy(b), scale), broken, 1
    )
    print(f"   ratios: one at a time {plain / ours:.1f}, Dykstra {euclid / ours:.0f}")
    some = broken[:CVX_ROWS]
    peer = run_peer("cvxpylayers_projection.py", A=A * scale.numpy(), b=b, rows=(some / scale).numpy())
    if isinstance(peer, str):
        print(f"   cvxpylayers: {peer}")
        return
    took = float(peer["seconds"]) * len(broken) / len(some)
    projected = torch.from_numpy(peer["projected"]) * scale
    report(f"cvxpylayers, from {CVX_ROWS} rows", took, some, projected)
    print(f"   ratio: cvxpylayers {took / ours:.0f} (the bar is 50)")


def bench_sampling(rows: int, repeats: int) -> None:
    rules = LinearConstraints.parse(DIAMONDS)
    frame, _ = broken_rows(rules, rows)
    model = ConstrainedTabular("vae", rules, "guardrail").fit(frame, progress=False, epochs=20)
    plain = ConstrainedTabular("vae", None, "off", columns=model.encoding.to_list())
    plain.load_state_dict(model.state_dict())
    raw = torch.from_numpy(rules.values(plain.sample(rows)))
    whole = seconds(lambda: model.sample(rows), repeats)
    with torch.no_grad():
        part = seconds(lambda: model.layer(raw), repeats)
    print(
        f"2. sampling {rows:,} rows {1e3 * whole:.1f} ms, the layer in it {1e3 * part:.2f} ms: "
        f"{part / whole:.1%}"
    )


def bench_guard(rows: int) -> None:
    print("3. TVAE of the package ctgan, 20 epochs, alone and behind guard()")
    rules = LinearConstraints.parse(DIAMONDS)
    frame, _ = broken_rows(rules, rows)
    columns = {
        f"column:{name}": frame[name].to_numpy(float if is_numeric(frame[name]) else str) for name in frame
    }
    peer = run_peer("ctgan_tvae.py", discrete=["cut", "color", "clarity"], epochs=20, rows=rows, **columns)
    if isinstance(peer, str):
        print(f"   {peer}")
        return
    fitted, sampled = float(peer["fit_seconds"]), float(peer["sample_seconds"])
    drawn = pd.DataFrame({name: peer[f"column:{name}"] for name in frame})
    guarded = guard(lambda n: drawn.iloc[:n], rules, decimals={"carat": 2, "x": 2, "y": 2, "z": 2})
    start = time.perf_counter()
    corrected = guarded(rows)
    guarding = time.perf_counter() - start
    print(f"   violating {rules.violation_rate(drawn):.3f} -> {rules.violation_rate(corrected):.3f}")
    print(
        f"   fit {fitted:.1f} s, sample {1e3 * sampled:.0f} ms, guard with compiling {1e3 * guarding:.0f} ms"
    )
    start = time.perf_counter()
    ConstrainedTabular("vae", None, "off").fit(frame, progress=False, epochs=20)
    ours = time.perf_counter() - start
    print(f"   our VAE, the same epochs: fit {ours:.1f} s; ratio {fitted / ours:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench_layer(arguments.rows, arguments.repeats)
    bench_sampling(arguments.rows, arguments.repeats)
    bench_guard(arguments.rows)


if __name__ == "__main__":
    main()
