"""Search for better params: Optuna chooses them, and each trial is a DVC experiment, `NAME-7` in `dvc exp show`.

python -m commands.sweep --trials 40 -S 'train.lr=tag(log,interval(1e-3,1e-1))' -S 'train.batch_size=choice(32,64,128)'
python -m commands.sweep --trials 20 --jobs 2 -S train.threads=1 -S 'train.lr=interval(0.001,0.05)' --name lr
python -m commands.sweep --sampler grid -S 'train.seed=range(0,3)' -S train.activation=sigmoid,relu --name grid
python -m commands.sweep --trials 9 --metric metrics/train.json:validation_loss -S 'train.epochs=range(1,6)' --md

-S has Hydra's sweep syntax, as in `dvc exp run`: choice(a,b), a,b, range(start,stop,step), interval(low,high),
int(interval(low,high)), tag(log,interval(low,high)); one value is set for all trials. Trials run in temporary folders:
the workspace does not change. The same command goes on after an interruption, and runs nothing if all trials are there;
a larger --trials adds some.
"""

import argparse
import contextlib
import hashlib
import json
import math
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from commands.trials import Baseline, Here, Trial, experiments, read_baseline

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

METRIC = "metrics/train.json:validation_accuracy"
FOLDER = Path(".dvc", "tmp", "sweeps")  # DVC keeps .dvc/tmp out of git
SHOWN = 10  # rows of the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--trials", type=int, metavar="N", help="trials in all; for a grid, all combinations by default"
    )
    parser.add_argument(
        "-S", "--set-param", action="append", default=[], metavar="KEY=VALUES", help="as in dvc exp run"
    )
    parser.add_argument("--metric", default=METRIC, metavar="FILE:KEY", help=f"to choose by (default: {METRIC})")
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument("--maximize", action="store_true", help="high is best (default: by the metric's name)")
    direction.add_argument("--minimize", action="store_true", help="low is best")
    parser.add_argument("--sampler", choices=("tpe", "random", "grid"), default="tpe", help="default: tpe")
    parser.add_argument("--name", default="sweep", help="name of the sweep, and of its experiments (default: sweep)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trials at a time (default: 1)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--md", action="store_true", help="print Markdown")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # Optuna's, of what is experimental
    space = read_space(args.set_param)
    check(args, space)
    baseline = read_baseline()
    check_params(baseline.folder, args.set_param, space)
    check_metric(baseline.folder, args.metric)
    folder = baseline.folder / FOLDER / args.name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            result = Sweep(args, space, baseline, folder).run()
    except Timeout:
        sys.exit(f"error: expected to run sweep {args.name} alone, found a command that runs it; wait, or use --name")
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    if args.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        show(result, args.md)
    if result["best"] is None:
        sys.exit(f"error: expected a trial that succeeds, found none of {len(result['trials'])}")


# Input


def read_space(arguments: list[str]) -> "dict[str, BaseDistribution]":
    """The params that vary, with what Optuna chooses from. Exits if an argument is not Hydra's syntax."""
    from dvc.exceptions import DvcException
    from dvc.utils.cli_parse import to_path_overrides
    from dvc.utils.hydra import to_hydra_overrides
    from hydra.core.override_parser.types import ChoiceSweep, RangeSweep
    from hydra.errors import HydraException
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    space: dict[str, BaseDistribution] = {}
    for argument in arguments:
        key = argument.partition("=")[0]
        try:
            (overrides,) = to_path_overrides([argument]).values()
            (override,) = to_hydra_overrides(overrides)
            if not override.is_sweep_override():
                continue
            if not override.is_interval_sweep() and not isinstance(override.value(), RangeSweep | ChoiceSweep):
                raise ValueError("a pattern of files is not a space of params")
            if key in space:
                sys.exit(f"error: expected one space for {key}, found two; remove one -S {key}=…")
            sweep: Any = override.value()
            if override.is_interval_sweep():
                whole = isinstance(sweep.start, int) and isinstance(sweep.end, int)
                kind = IntDistribution if whole else FloatDistribution
                space[key] = kind(sweep.start, sweep.end, log="log" in sweep.tags)
            elif override.is_range_sweep():
                values = list(sweep.range())
                kind = IntDistribution if all(isinstance(value, int) for value in values) else FloatDistribution
                space[key] = kind(min(values), max(values), step=abs(sweep.step))
            else:
                space[key] = CategoricalDistribution([*dict.fromkeys(override.sweep_string_iterator())])
        except (DvcException, HydraException, ValueError, AttributeError) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            sys.exit(
                f"error: expected a value or a space such as choice(a,b) or interval(0,1), found {argument}: {reason}"
            )
    return space


def check(args: argparse.Namespace, space: "Mapping[str, BaseDistribution]") -> None:
    """Exit if the options do not fit together, or if no param varies; set the direction and the number of trials."""
    from dvc_mlflow.ui import HIGHER, LOWER

    if not space:
        sys.exit("error: expected a param that varies, found none; for example -S 'train.lr=interval(0.001,0.1)'")
    if not re.fullmatch(r"[\w-]+", args.name):
        sys.exit(f"error: expected a --name of letters, digits, _ and -, found {args.name}")
    path, _, key = args.metric.rpartition(":")
    if not path or not key:
        sys.exit(f"error: expected --metric FILE:KEY, such as {METRIC}, found {args.metric}")
    if not args.maximize and not args.minimize:
        args.maximize, args.minimize = (bool(re.search(pattern, key.lower())) for pattern in (HIGHER, LOWER))
        if args.maximize == args.minimize:
            sys.exit(f"error: expected --maximize or --minimize, found neither, and {key} does not say which")
    if args.sampler == "grid":
        grid = math.prod(len(values_of(key, one)) for key, one in space.items())
        args.trials = min(args.trials or grid, grid)
    for option in ("trials", "jobs"):
        value = getattr(args, option)
        if value is None or value < 1:
            sys.exit(f"error: expected --{option} of at least 1, found {'none' if value is None else value}")
    if "test" in key.lower():
        print(f"note: {key} chooses the best trial, so it is no estimate of how good that trial is", file=sys.stderr)


def values_of(key: str, space: "BaseDistribution") -> list[Any]:
    """The values of a space that a grid can go through. Exits if there is no end of them."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(space, CategoricalDistribution):
        return list(space.choices)
    step = getattr(space, "step", None)
    if step is None or getattr(space, "log", False):
        sys.exit(f"error: expected choice(…) or range(…) for a grid, found an interval for {key}")
    low, high = space.low, space.high  # type: ignore[attr-defined]
    values = [low + number * step for number in range(round((high - low) / step) + 1)]
    return values if isinstance(space, IntDistribution) else [float(value) for value in values]


def check_params(folder: Path, arguments: list[str], space: "Mapping[str, BaseDistribution]") -> None:
    """Exit if DVC could not set the params, such as an unknown key."""
    import tempfile

    from dvc.exceptions import DvcException
    from dvc.utils.cli_parse import to_path_overrides
    from dvc.utils.hydra import apply_overrides

    for argument in arguments:
        key = argument.partition("=")[0]
        one = f"{key}={next(iter(_first(space[key])))}" if key in space else argument
        for path, overrides in to_path_overrides([one]).items():
            try:
                with tempfile.TemporaryDirectory() as scratch:
                    copy = Path(scratch) / Path(path).name
                    copy.write_bytes((folder / path).read_bytes())
                    apply_overrides(copy, overrides)
            except OSError:
                sys.exit(f"error: expected a file of params {path}, found none")
            except DvcException as error:
                reason = str(error.__cause__ or error).splitlines()[0]
                sys.exit(f"error: expected a key of {path}, found {key}: {reason}")


def _first(space: "BaseDistribution") -> list[Any]:
    return [getattr(space, "low", None)] if hasattr(space, "low") else list(space.choices)  # type: ignore[attr-defined]


def check_metric(folder: Path, metric: str) -> None:
    """Exit if the pipeline declares no such metrics file, or if the file is there without the key."""
    from dvc.exceptions import DvcException

    from dvc_mlflow.project import Project
    from dvc_mlflow.text import UserError

    path, _, key = metric.rpartition(":")
    try:
        project = Project(folder)
        stages = project.stages.values()
        declared = {path for stage in stages for path in project.declared(stage, [], project.outs(stage)).metrics}
    except (UserError, DvcException) as error:
        sys.exit(f"error: {error}")
    if path not in declared:
        sys.exit(f"error: expected a metrics file of dvc.yaml, found {path}; it has {', '.join(sorted(declared))}")
    if (folder / path).exists():
        find_metric(path, key, (folder / path).read_text(), path)


def find_metric(path: str, key: str, text: str, where: str) -> float:
    """The value in the text of a metrics file. Exits if it has no such number."""
    from dvc.utils.serialize import PARSERS

    from dvc_mlflow.execution import flatten

    values = flatten(PARSERS[Path(path).suffix](text, path))
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        numbers = [name for name, one in values.items() if isinstance(one, int | float) and not isinstance(one, bool)]
        sys.exit(f"error: expected a number {key} in {where}, found {', '.join(numbers[:8])}; see --metric")
    return float(value)


# The search


@dataclass
class Sweep:
    """A sweep: its options, what varies, where it starts, and the folder with Optuna's record of it."""

    args: argparse.Namespace
    space: "Mapping[str, BaseDistribution]"
    baseline: Baseline
    folder: Path

    def run(self) -> dict[str, Any]:
        """Run the trials that are missing; return the result."""
        from tqdm import tqdm

        study = self.open()
        total = max(self.args.trials, len(study.trials)) if self.args.sampler != "grid" else self.args.trials
        with (
            Here(self.baseline, self.args.jobs) as place,
            tqdm(total=total, desc=self.args.name, unit="trial", disable=None) as bar,
        ):
            ended = [trial for trial in study.trials if trial.state.is_finished()]
            bar.update(len(ended))
            for trial, reason in place.run(self.trials(study)):
                number = int(trial.name.rpartition("-")[2])
                self.tell(study, number, trial.name, reason)
                bar.update()
                with contextlib.suppress(ValueError):  # none has succeeded yet
                    bar.set_postfix_str(f"best {study.best_value:.4f} ({self.name(study.best_trial.number)})")
        self.record(study)
        return self.result(study)

    def name(self, number: int) -> str:
        """The experiment of a trial."""
        return f"{self.args.name}-{number}"

    def open(self) -> "Study":
        """Optuna's record of this sweep, new or as it was left. Exits if it is that of another sweep."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        settings = {
            "commit": self.baseline.rev,
            "uncommitted changes": hashlib.sha256(self.baseline.patch).hexdigest() if self.baseline.patch else "",
            "-S": sorted(self.args.set_param),
            "--metric": self.args.metric,
            "direction": "maximize" if self.args.maximize else "minimize",
            "--sampler": self.args.sampler,
        }
        study = optuna.create_study(
            study_name=self.args.name,
            storage=JournalStorage(JournalFileBackend(str(self.folder / "journal"))),
            direction=settings["direction"],
            load_if_exists=True,
        )
        before = study.user_attrs.get("settings")
        name = self.args.name
        if before is None:
            known = experiments(self.baseline.folder, self.baseline.rev)
            if taken := [one for one in known if re.fullmatch(rf"{name}-\d+", one)]:
                sys.exit(
                    f"error: expected no experiment {taken[0]} before sweep {name}, found one; --name another sweep"
                )
            if self.args.sampler == "grid":
                for values in grid(self.space):
                    study.enqueue_trial(values)
            study.set_user_attr("settings", settings)
        elif before != settings:
            key = next(key for key in settings if before.get(key) != settings[key])
            sys.exit(
                f"error: expected sweep {name} to go on with {key} {_plain(before.get(key))}, found "
                f"{_plain(settings[key])}; name another sweep: --name"
            )
        return study

    def trials(self, study: "Study") -> Iterator[Trial]:
        """The trials that were cut off, then new ones, each chosen when it is asked for."""
        from optuna.samplers import RandomSampler, TPESampler
        from optuna.trial import TrialState

        for left in study.get_trials(states=[TrialState.RUNNING]):
            yield self.trial(left.number, left.params)
        while len([one for one in study.trials if one.state != TrialState.WAITING]) < self.args.trials:
            # What is chosen depends on the trials before and on its number alone: not on interruptions.
            number = len(study.trials)
            tpe = self.args.sampler == "tpe"
            study.sampler = TPESampler(seed=number, constant_liar=True) if tpe else RandomSampler(seed=number)
            asked = study.ask(dict(self.space))
            yield self.trial(asked.number, asked.params)

    def trial(self, number: int, params: Mapping[str, Any]) -> Trial:
        fixed = [argument for argument in self.args.set_param if argument.partition("=")[0] not in self.space]
        changes = (*fixed, *(f"{key}={value}" for key, value in params.items()))
        return Trial(self.name(number), changes, {"sweep": self.args.name, "sweep.trial": str(number)})

    def tell(self, study: "Study", number: int, experiment: str, reason: str) -> None:
        """Record how a trial ended. Exits if its experiment has no such metric."""
        import dvc.api
        from optuna.trial import TrialState

        value = math.nan
        if not reason:
            path, _, key = self.args.metric.rpartition(":")
            rev = experiments(self.baseline.folder, self.baseline.rev)[experiment]
            value = find_metric(path, key, dvc.api.read(path, rev=rev), f"{path} of {experiment}")
            reason = f"its {key} is not a number" if math.isnan(value) else ""
        if reason:
            study._storage.set_trial_user_attr(study.trials[number]._trial_id, "reason", reason)
            study.tell(number, state=TrialState.FAIL)
        else:
            study.tell(number, value)

    # The end

    def record(self, study: "Study") -> None:
        """Add what MLflow lacks of the trials: rows of those that DVC's run cache served, or that an outage cost."""
        from optuna.trial import TrialState

        known = set(study.user_attrs.get("recorded", []))
        new = {one.number for one in study.get_trials(states=[TrialState.COMPLETE])} - known
        if not new:
            return
        from dvc_mlflow.history import sync_history
        from dvc_mlflow.project import Project
        from dvc_mlflow.store import Store, describe, quiet

        quiet()
        revs = experiments(self.baseline.folder, self.baseline.rev)
        try:
            store = Store(Project(self.baseline.folder))
            found = list(sync_history(store, [revs[self.name(number)] for number in sorted(new)], fetch=False))
            for number in sorted(new):
                for run in store.search({"dvc.exp_name": self.name(number)}):
                    for key, value in self.trial(number, {}).tags.items():
                        if run.data.tags.get(key) != value:
                            store.client.set_tag(run.info.run_id, key, value)
        except Exception as error:  # the store's, of any kind: it costs the record, not the result
            found = [(f"{describe(error)}; the same command records the trials later", True)]
        for line, failed in found:
            if failed:
                print(f"warning: {line}", file=sys.stderr)
        if not any(failed for _, failed in found):
            study.set_user_attr("recorded", sorted(known | new))

    def result(self, study: "Study") -> dict[str, Any]:
        """What the sweep found, as JSON has it."""
        from optuna.trial import TrialState

        best = study.best_trial if study.get_trials(states=[TrialState.COMPLETE]) else None
        return {
            "name": self.args.name,
            "metric": self.args.metric,
            "direction": study.direction.name.lower(),
            "best": None if best is None else self.name(best.number),
            "trials": [self.row(trial) for trial in study.trials if trial.state.is_finished()],
        }

    def row(self, trial: "FrozenTrial") -> dict[str, Any]:
        reason = {"reason": trial.user_attrs["reason"]} if "reason" in trial.user_attrs else {}
        return {
            "experiment": self.name(trial.number),
            "state": "failed" if reason else "complete",
            "value": trial.value,
            "params": trial.params,
            **reason,
        }


def grid(space: "Mapping[str, BaseDistribution]") -> Iterator[dict[str, Any]]:
    """All combinations of the values."""
    import itertools

    for values in itertools.product(*(values_of(key, one) for key, one in space.items())):
        yield dict(zip(space, values, strict=True))


def _plain(value: Any) -> str:
    text = " ".join(value) if isinstance(value, list) else str(value)
    return text[:60] or "none"


def show(result: Mapping[str, Any], markdown: bool) -> None:
    """Print the best trials, why others failed, and how to apply the best."""
    key = result["metric"].rpartition(":")[2]
    sign = -1 if result["direction"] == "maximize" else 1
    ranked = sorted((row for row in result["trials"] if row["value"] is not None), key=lambda row: sign * row["value"])
    params = list(dict.fromkeys(param for row in ranked for param in row["params"]))
    table = [
        (row["experiment"], _number(row["value"]), *(_number(row["params"][param]) for param in params))
        for row in ranked[:SHOWN]
    ]
    if table:
        _print_table(["experiment", key, *params], table, markdown)
    if len(ranked) > SHOWN:
        print(f"\n… and {len(ranked) - SHOWN} more: --json has them all")
    for row in result["trials"]:
        if "reason" in row:
            print(f"{'- ' if markdown else ''}{row['experiment']} failed: {row['reason']}")
    if result["best"]:
        command = f"dvc exp apply {result['best']}"
        print(f"\nApply the best: `{command}`" if markdown else f"\nApply the best:  {command}")


def _print_table(heads: list[str], rows: list[tuple[str, ...]], markdown: bool) -> None:
    if markdown:
        for cells in (heads, ["---"] * len(heads), *rows):
            print(f"| {' | '.join(cells)} |")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
