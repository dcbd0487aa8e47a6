"""Run the pipeline for several seeds, as DVC experiments, and show how much its result depends on luck.

python -m commands.replicate --seeds 10                                   the current params, seeds 0 to 9
python -m commands.replicate --seeds 5 -S train.activation=relu           another recipe, as in `dvc exp run`
python -m commands.replicate --seeds 3 --json                             for a program

Each seed is a separate experiment, `NAME-SEED` in `dvc exp show`, run in a temporary folder: the workspace does not
change. A seed that already exists is not run again, so an interrupted command continues if you start it again.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

METRIC = "test_accuracy"
CHANCE = 2.0  # below so many times what a guess has, nothing was learnt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="run seeds 0 to N-1 (default: 10)")
    parser.add_argument("-S", "--set-param", action="append", default=[], metavar="KEY=VALUE", help="as in dvc exp run")
    parser.add_argument("--name", default="replicate", help="name of the experiments, before a hash of what they run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if args.seeds < 1:
        sys.exit(f"error: expected --seeds of at least 1, found {args.seeds}")
    import dvc.api
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from scmrepo.exceptions import SCMError
    from tqdm import tqdm

    try:
        with Repo() as repo:
            # Results do not depend on params and seed alone: another commit has other experiments.
            state = repr((repo.scm.get_rev(), repo.scm.is_dirty() and _patch(), sorted(args.set_param)))
    except (DvcException, SCMError) as error:
        sys.exit(f"error: {error}")
    except FileNotFoundError as error:
        sys.exit(f"error: expected {error.filename}, found none; install it")
    for key in ("user.name", "user.email"):  # DVC commits each experiment
        if subprocess.run(["git", "config", key], capture_output=True).returncode:
            sys.exit(f"error: expected {key} in git's configuration, found none; `git config --global {key} …` sets it")
    name = f"{args.name}-{hashlib.sha256(state.encode()).hexdigest()[:8]}"
    results: dict[int, Mapping[str, Any]] = {}
    for seed in tqdm(range(args.seeds), name, unit="seed", disable=None):
        experiment = f"{name}-{seed}"
        if experiment not in _experiments():
            _run(experiment, seed, args.set_param)
        results[seed] = dvc.api.metrics_show(rev=experiment)
    guess = 1 / len(results[0]["f1"])  # metrics/per_class.json has one of each class
    summary = summarize({seed: metrics[METRIC] for seed, metrics in results.items()}, guess)
    if args.json:
        print(json.dumps({"name": name, "set_param": args.set_param, **summary}, indent=2))
    else:
        show(name, summary)


def _patch() -> bytes:
    return subprocess.run(["git", "diff", "HEAD"], capture_output=True, check=True).stdout


def _experiments() -> set[str]:
    listed = subprocess.run(["dvc", "exp", "list", "--name-only"], capture_output=True, text=True, check=True)
    return set(listed.stdout.split())


def _run(experiment: str, seed: int, set_param: Sequence[str]) -> None:
    changes = [argument for change in (*set_param, f"train.seed={seed}") for argument in ("--set-param", change)]
    command = ["dvc", "exp", "run", "--temp", "--name", experiment, *changes]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        sys.exit("\n".join([f"error: `{' '.join(command)}` failed:", *lines[-5:]]))


def summarize(accuracies: Mapping[int, float], guess: float) -> dict[str, Any]:
    """Mean, standard deviation (n - 1), min and max of the seeds that learned, and how many did not.

    `guess` is the accuracy of a guess, 0..1.
    """
    learned = [accuracy for accuracy in accuracies.values() if accuracy >= CHANCE * guess]
    return {
        METRIC: {str(seed): accuracy for seed, accuracy in accuracies.items()},
        "seeds": len(accuracies),
        "failed_to_learn": len(accuracies) - len(learned),
        "mean": statistics.fmean(learned) if learned else None,
        "standard_deviation": statistics.stdev(learned) if len(learned) > 1 else None,
        "min": min(learned, default=None),
        "max": max(learned, default=None),
    }


def show(name: str, summary: Mapping[str, Any]) -> None:
    """Print the summary as a table, with a line for the README."""
    print("| recipe | seeds | failed to learn | mean | s.d. | min | max |")
    print("|---|---|---|---|---|---|---|")
    values = [summary[key] for key in ("mean", "standard_deviation", "min", "max")]
    cells = [name, summary["seeds"], summary["failed_to_learn"], *("-" if v is None else f"{v:.4f}" for v in values)]
    print(f"| {' | '.join(str(cell) for cell in cells)} |")
    print(f"\n{METRIC}: " + ", ".join(f"seed {seed} {value:.4f}" for seed, value in summary[METRIC].items()))


if __name__ == "__main__":
    main()
