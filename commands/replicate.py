"""Run the pipeline for several seeds, as DVC experiments, and show how much its result depends on luck.

python -m commands.replicate --seeds 10                                   the current params, seeds 0 to 9
python -m commands.replicate --seeds 5 -S train.activation=relu           another recipe, as in `dvc exp run`
python -m commands.replicate --seeds 8 --jobs 2 -S train.threads=1        two at a time
python -m commands.replicate --seeds 50 --ray 10.0.0.1:6379               on a Ray cluster, see docs/scale.md
python -m commands.replicate --seeds 3 --json                             for a program

Each seed is a separate experiment, `NAME-SEED` in `dvc exp show`, run in a temporary folder: the workspace does not
change. A seed that already exists is not run again, so an interrupted command continues if you start it again.
"""

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Mapping
from typing import Any

from commands.trials import Trial, add_arguments, check_name, experiments, open_place, read, read_baseline

METRIC = "test_accuracy"
CHANCE = 2.0  # below so many times what a guess has, nothing was learnt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="run seeds 0 to N-1 (default: 10)")
    parser.add_argument("-S", "--set-param", action="append", default=[], metavar="KEY=VALUE", help="as in dvc exp run")
    add_arguments(parser)
    parser.add_argument("--name", default="replicate", help="name of the experiments, before a hash of what they run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if args.seeds < 1:
        sys.exit(f"error: expected --seeds of at least 1, found {args.seeds}")
    check_name(args.name)
    from tqdm import tqdm

    baseline = read_baseline()
    # Results do not depend on params and seed alone: another commit has other experiments.
    state = repr((baseline.rev, baseline.patch or False, args.set_param))
    name = f"{args.name}-{hashlib.sha256(state.encode()).hexdigest()[:8]}"
    seeds = {f"{name}-{seed}": seed for seed in range(args.seeds)}
    trials = (Trial(one, (*args.set_param, f"train.seed={seed}")) for one, seed in seeds.items())
    try:
        with open_place(baseline, args) as place, tqdm(total=args.seeds, desc=name, unit="seed", disable=None) as bar:
            for trial, reason in place.run(trials):
                if reason:
                    sys.exit(f"error: {trial.name} failed: {reason}")
                bar.update()
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(130)
    revs = experiments(baseline.folder, baseline.rev)
    # Unlike DVC's metrics_show, read fetches what a cluster has pushed.
    results = {seed: json.loads(read("metrics/evaluate.json", one, revs[one])) for one, seed in seeds.items()}
    classes = json.loads(read("metrics/per_class.json", f"{name}-0", revs[f"{name}-0"]))["f1"]
    summary = summarize({seed: metrics[METRIC] for seed, metrics in results.items()}, 1 / len(classes))
    if args.json:
        print(json.dumps({"name": name, "set_param": args.set_param, **summary}, indent=2))
    else:
        show(name, summary)


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
