"""Search for better params: Optuna chooses them, and each trial is a DVC experiment, `NAME-7` in `dvc exp show`.

python -m commands.sweep --trials 40 -S 'train.lr=tag(log,interval(1e-3,1e-1))' -S 'train.batch_size=choice(32,64,128)'
python -m commands.sweep --trials 20 --jobs 2 -S train.threads=1 -S 'train.lr=interval(0.001,0.05)' --name lr
python -m commands.sweep --sampler grid -S 'train.seed=range(0,3)' -S train.activation=sigmoid,relu --name grid
python -m commands.sweep --trials 9 --metric metrics/train.json:validation_loss -S 'train.epochs=range(1,6)' --md
python -m commands.sweep --trials 99 --ray 10.0.0.1:6379 -S 'train.lr=interval(0.001,0.1)'       on a Ray cluster
python -m commands.sweep --trials 27 --budget 1,5 -S 'train.lr=interval(0.001,0.1)'   1 epoch; 5 for the best third

-S has Hydra's sweep syntax, as in `dvc exp run`: choice(a,b), a,b, range(start,stop,step), interval(low,high),
int(interval(low,high)), tag(log,interval(low,high)); one value is set for all trials. Trials run in temporary folders:
the workspace does not change. The same command continues after an interruption, runs nothing if all trials are done,
and runs more with a larger --trials.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from commands.sweep_result import draw, importances, publish, show
from commands.trials import (
    Baseline,
    Cluster,
    Here,
    Trial,
    add_arguments,
    check_name,
    experiments,
    open_place,
    read,
    read_baseline,
)
from dvc_mlflow.command import configure

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

METRIC = "metrics/train.json:validation_accuracy"
FOLDER = Path(".dvc", "tmp", "sweeps")  # DVC keeps .dvc/tmp out of git


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
    parser.add_argument(
        "--budget",
        metavar="[KEY=]A,B,…",
        help="successive halving: run all trials with A, the best third with B, … (KEY: train.epochs by default)",
    )
    parser.add_argument("--name", default="sweep", help="name of the sweep, and of its experiments (default: sweep)")
    add_arguments(parser)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--md", action="store_true", help="print Markdown")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # Optuna's, of what is experimental
    configure()
    space = read_space(args.set_param)
    check(args, space)
    budget = read_budget(args.budget, args.set_param)
    baseline = read_baseline()
    check_params(baseline.folder, [*args.set_param, *budget], space)
    check_metric(baseline.folder, args.metric)
    folder = baseline.folder / FOLDER / args.name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            result = Sweep(args, space, budget, baseline, folder).run()
    except Timeout:
        sys.exit(f"error: expected no other command to run sweep {args.name}, found one; wait, or use --name")
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(130)
    if args.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        print(show(result, args.md))
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
                sweep.shuffle = False  # the order is not what varies
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
    check_name(args.name)
    path, _, key = args.metric.rpartition(":")
    if not path or not key:
        sys.exit(f"error: expected --metric FILE:KEY, such as {METRIC}, found {args.metric}")
    if not args.maximize and not args.minimize:
        args.maximize, args.minimize = (bool(re.search(pattern, key.lower())) for pattern in (HIGHER, LOWER))
        if args.maximize == args.minimize:
            sys.exit(f"error: expected --maximize or --minimize, found neither, and {key} does not say which")
    if args.sampler == "grid":
        grid = math.prod(len(values_of(key, one)) for key, one in space.items())
        args.trials = grid if args.trials is None else min(args.trials, grid)
    if args.trials is None or args.trials < 1:
        sys.exit(f"error: expected --trials of at least 1, found {args.trials or 'none'}")


def read_budget(text: str | None, set_param: list[str]) -> list[str]:
    """The changes of each rung, such as train.epochs=1; [] without a budget. Exits if they do not rise."""
    if text is None:
        return []
    key, _, values = text.rpartition("=")
    key = key or "train.epochs"
    rungs = [value.strip() for value in values.split(",")]
    try:
        numbers = [float(value) for value in rungs]
    except ValueError:
        numbers = []
    if len(numbers) < 2 or numbers != sorted(set(numbers)):
        sys.exit(f"error: expected --budget of at least two rising numbers, such as 1,5, found {text}")
    if key in {argument.partition("=")[0] for argument in set_param}:
        sys.exit(f"error: expected --budget alone to set {key}, found -S {key}=…, too; remove one")
    return [f"{key}={value}" for value in rungs]


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
    """Exit if the pipeline declares no such metrics file, or if the file is there without the key.

    Also say so if the metric is of a test set.
    """
    from dvc_mlflow.command import open_project

    path, _, key = metric.rpartition(":")
    with open_project() as project:
        declared = project.metrics_files()
        if path not in declared:
            sys.exit(f"error: expected a metrics file of dvc.yaml, found {path}; it has {', '.join(sorted(declared))}")
        if (folder / path).exists():
            find_metric(path, key, (folder / path).read_text())
        makers = [stage for stage in project.stages.values() if path in project.outs(stage)]
        names = [key, *(dep.def_path for stage in makers for dep in stage.deps)]
    if any(re.search(r"(?<![a-z])test(?![a-z])", name.lower()) for name in names):
        print(f"note: {key} chooses the best trial, so it is a biased estimate for that trial", file=sys.stderr)


def find_metric(path: str, key: str, text: str) -> float:
    """The value in the text of a metrics file. Raises UserError if it has no such number."""
    from dvc.utils.serialize import PARSERS

    from dvc_mlflow.execution import flatten, is_number
    from dvc_mlflow.text import UserError

    values = flatten(PARSERS[Path(path).suffix](text, path))
    numbers = {name: value for name, value in values.items() if is_number(value)}
    if key not in numbers:
        found = ", ".join([*numbers][:8]) or "none"
        raise UserError(f"expected a number {key} in {path}, found {found}; see --metric")
    return float(numbers[key])


# The search


@dataclass
class Sweep:
    """A sweep: its options, what varies, what its rungs set, where it starts, and the folder with Optuna's record."""

    args: argparse.Namespace
    space: "Mapping[str, BaseDistribution]"
    budget: list[str]
    baseline: Baseline
    folder: Path

    def run(self) -> dict[str, Any]:
        """Run the trials that are missing; return the result."""
        rungs: list[Study] = []
        with open_place(self.baseline, self.args) as place:
            for budget in self.budget or [""]:
                study = self.open(budget)
                if rungs:
                    promote(rungs[-1], study)
                self.run_rung(study, budget, self.args.trials if not rungs else len(study.trials), place)
                rungs.append(study)
        result = self.result(rungs)
        self.record(rungs[0], result)
        return result

    def run_rung(self, study: "Study", budget: str, total: int, place: Here | Cluster) -> None:
        """Run the trials of one rung, or of a sweep without a budget."""
        from tqdm import tqdm

        ended = sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
        with tqdm(
            total=max(total, ended),
            desc=" ".join([self.args.name, budget]).strip(),
            unit="trial",
            disable=None,
        ) as bar:
            bar.update(ended)
            for trial, reason in place.run(self.trials(study, budget, total)):
                self.tell(study, trial, reason)
                bar.update()
                with contextlib.suppress(ValueError):  # none has succeeded yet
                    bar.set_postfix_str(f"best {study.best_value:.4f} ({self.name(study.best_trial, budget)})")

    def name(self, trial: "FrozenTrial", budget: str) -> str:
        """The experiment of a trial: NAME-7, or NAME-7-5 if its rung sets 5."""
        return "-".join([self.args.name, str(number_of(trial)), *budget.rpartition("=")[2:]]).rstrip("-")

    def open(self, budget: str) -> "Study":
        """Optuna's record of this sweep, or of a rung, new or as it was left. Exits if it is that of another sweep."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        settings = {
            "commit": self.baseline.rev,
            "uncommitted changes": hashlib.sha256(self.baseline.patch).hexdigest() if self.baseline.patch else "",
            "-S": self.args.set_param,
            "--metric": self.args.metric,
            "direction": "maximize" if self.args.maximize else "minimize",
            "--sampler": self.args.sampler,
            "--budget": self.args.budget,
        }
        study = optuna.create_study(
            study_name=budget or self.args.name,
            storage=JournalStorage(JournalFileBackend(str(self.folder / "journal"))),
            direction=settings["direction"],
            load_if_exists=True,
        )
        before, name = study.user_attrs.get("settings"), self.args.name
        if before is None:
            known = experiments(self.baseline.folder, self.baseline.rev)
            end = f"-{budget.rpartition('=')[2]}" if budget else ""
            if taken := [one for one in known if re.fullmatch(rf"{name}-\d+{re.escape(end)}", one)]:
                sys.exit(
                    f"error: expected no experiment {taken[0]} before sweep {name}, found one; --name another sweep"
                )
            study.set_user_attr("settings", settings)
        elif before != settings:
            key = next(key for key in settings if before.get(key) != settings[key])
            sys.exit(
                f"error: expected sweep {name} to go on with {key} {_plain(before.get(key))}, found "
                f"{_plain(settings[key])}; name another sweep: --name"
            )
        return study

    def trials(self, study: "Study", budget: str, total: int) -> Iterator[Trial]:
        """The trials that were cut off, then new ones, each chosen when it is asked for."""
        from optuna.trial import TrialState

        for left in study.get_trials(states=[TrialState.RUNNING]):
            yield self.trial(left, budget)
        while (number := len(study.get_trials(deepcopy=False))) < total:
            study.add_trial(running(self.choose(study, number), self.space))
            yield self.trial(study.get_trials(deepcopy=False)[number], budget)

    def choose(self, study: "Study", number: int) -> dict[str, Any]:
        """The params of a trial. They depend on the name, the number and the trials before, not on interruptions."""
        from optuna.samplers import RandomSampler, TPESampler

        if self.args.sampler == "grid":
            return next(itertools.islice(grid(self.space), number, None))
        seed = int.from_bytes(hashlib.sha256(f"{self.args.name}-{number}".encode()).digest()[:4], "big")
        tpe = self.args.sampler == "tpe"
        sampler = TPESampler(seed=seed, constant_liar=True) if tpe else RandomSampler(seed=seed)
        blank = running({}, {})
        return {key: sampler.sample_independent(study, blank, key, one) for key, one in self.space.items()}

    def trial(self, trial: "FrozenTrial", budget: str) -> Trial:
        fixed = [argument for argument in self.args.set_param if argument.partition("=")[0] not in self.space]
        changes = (*fixed, *(f"{key}={value}" for key, value in trial.params.items()), *([budget] if budget else []))
        return Trial(self.name(trial, budget), changes, self.tags(number_of(trial), budget))

    def tags(self, number: int, budget: str) -> dict[str, str]:
        """The tags of a trial's rows in MLflow."""
        rung = {"sweep.budget": budget} if budget else {}
        return {"sweep": self.args.name, "sweep.trial": str(number), **rung}

    def tell(self, study: "Study", ended: Trial, reason: str) -> None:
        """Record how a trial ended: with a value, or as failed, if it has no such metric, too."""
        from optuna.trial import TrialState

        from dvc_mlflow.text import UserError

        number = int(ended.tags["sweep.trial"])
        (trial,) = [one for one in study.get_trials(deepcopy=False) if number_of(one) == number]
        value = math.nan
        if not reason:
            path, _, key = self.args.metric.rpartition(":")
            rev = experiments(self.baseline.folder, self.baseline.rev)[ended.name]
            try:
                value = find_metric(path, key, read(path, ended.name, rev))
                reason = f"its {key} is not a number" if math.isnan(value) else ""
            except UserError as error:
                reason = str(error)
        if reason:
            study._storage.set_trial_user_attr(trial._trial_id, "reason", reason)
            study.tell(trial.number, state=TrialState.FAIL)
        else:
            study.tell(trial.number, value)

    # The end

    def result(self, rungs: "list[Study]") -> dict[str, Any]:
        """What the sweep found, as JSON has it; draws the figures."""
        rows = [
            self.row(trial, budget)
            for study, budget in zip(rungs, self.budget or [""], strict=True)
            for trial in study.trials
            if trial.state.is_finished()
        ]
        succeeded = [row for row in rows if row["value"] is not None]
        last = [row for row in succeeded if row.get("budget") == succeeded[-1].get("budget")]
        metric = self.args.metric.rpartition(":")[2]
        best = (max if self.args.maximize else min)(last, key=lambda row: row["value"], default=None)
        return {
            "name": self.args.name,
            "metric": self.args.metric,
            "direction": "maximize" if self.args.maximize else "minimize",
            "best": best and best["experiment"],
            "importances": importances(rungs[0]),
            "figures": [str(path.relative_to(self.baseline.folder)) for path in draw(rungs[0], metric, self.folder)],
            "trials": rows,
        }

    def row(self, trial: "FrozenTrial", budget: str) -> dict[str, Any]:
        reason = {"reason": trial.user_attrs["reason"]} if "reason" in trial.user_attrs else {}
        return {
            "experiment": self.name(trial, budget),
            "trial": number_of(trial),
            "state": "failed" if reason else "complete",
            "value": trial.value,
            **({"budget": budget} if budget else {}),
            "params": trial.params,
            **reason,
        }

    def record(self, study: "Study", result: Mapping[str, Any]) -> None:
        """Add what MLflow lacks: rows of trials that DVC's run cache served or that an outage cost, and the result.

        `study` keeps which trials were recorded.
        """
        known = set(study.user_attrs.get("recorded", []))
        rows = {row["experiment"]: row for row in result["trials"]}
        if not rows.keys() - known:
            return
        from dvc_mlflow.history import sync_history
        from dvc_mlflow.project import Project
        from dvc_mlflow.store import Store, describe
        from dvc_mlflow.text import UserError

        commits = experiments(self.baseline.folder, self.baseline.rev)
        revs = {name: commits[name] for name in rows if name in commits and name not in known}
        try:
            store = Store(Project(self.baseline.folder))
            own = {"dvc.exp_baseline_rev": self.baseline.rev}
            for run in store.search({"sweep": self.args.name, **own}, "RUNNING"):
                if run.data.tags["dvc.exp_name"] in rows:  # all trials have ended: its node was lost
                    store.terminate(run.info.run_id, "KILLED")
            lines = list(sync_history(store, [*revs.values()], self.args.ray not in (None, "local"))) if revs else []
            found = defaultdict(list)  # the runs of each experiment
            for run in store.search(own):
                found[run.data.tags.get("dvc.exp_name")].append(run)
            for name in revs:
                tags = self.tags(rows[name]["trial"], rows[name].get("budget", ""))
                for run in found[name]:
                    for key, value in tags.items():
                        if run.data.tags.get(key) != value:
                            store.client.set_tag(run.info.run_id, key, value)
                if not found[name]:
                    raise UserError(next((line for line, failed in lines if failed), f"{name} has no row"))
            publish(store, self.baseline, result)
        except Exception as error:  # the store's, of any kind: it costs the record, not the result
            print(f"warning: {describe(error)}; the same command records the trials later", file=sys.stderr)
        else:
            study.set_user_attr("recorded", sorted(known | rows.keys()))


def number_of(trial: "FrozenTrial") -> int:
    """The number of a trial in the first rung."""
    return trial.user_attrs.get("number", trial.number)


def promote(rung: "Study", later: "Study") -> None:
    """Put the best third of a rung into the next one."""
    from optuna.study import StudyDirection
    from optuna.trial import TrialState

    done = rung.get_trials(states=[TrialState.COMPLETE])
    sign = -1 if rung.direction == StudyDirection.MAXIMIZE else 1
    known = {number_of(trial) for trial in later.trials}
    for trial in sorted(done, key=lambda one: (sign * one.value, one.number))[: math.ceil(len(done) / 3)]:  # type: ignore[operator]
        if number_of(trial) not in known:
            later.add_trial(running(trial.params, trial.distributions, number=number_of(trial)))


def running(params: dict[str, Any], space: "Mapping[str, BaseDistribution]", **attributes: Any) -> "FrozenTrial":
    """A trial to be recorded before it runs, as a whole: `Study.ask` would record one param after the other."""
    from optuna.trial import TrialState, create_trial

    return create_trial(state=TrialState.RUNNING, params=params, distributions=dict(space), user_attrs=attributes)


def grid(space: "Mapping[str, BaseDistribution]") -> Iterator[dict[str, Any]]:
    """All combinations of the values."""
    for values in itertools.product(*(values_of(key, one) for key, one in space.items())):
        yield dict(zip(space, values, strict=True))


def _plain(value: Any) -> str:
    text = " ".join(value) if isinstance(value, list) else str(value)
    return (text if len(text) <= 60 else f"{text[:58]} …") or "none"


if __name__ == "__main__":
    main()
