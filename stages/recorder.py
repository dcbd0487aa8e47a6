"""The process that writes a stage's MLflow run, started by stages/tracking.py.

Reads events, one JSON object a line, from standard input, and answers on standard output: `ready` when the run is
there, `complete` when all is in it, `closed` when it has ended. It is FINISHED only once the stage says that it
succeeded: where the events end before that, the stage was killed, and so is the run. Where the store fails, says so in
one line and exits with 1.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from stages.stage import SIGNALS, leave
from stages.store import Store, describe, quiet


def record(events: Iterator[str]) -> None:
    """Do what the events say, up to the end of the run."""
    first = next(events, None)
    if first is None:  # the stage ended before it began its run
        return
    start = json.loads(first)
    pid = start["pid"]
    store = Store(Path(start["folder"]))
    store.restore_upstream(start["stage"])
    store.close_dead()
    current = store.pipeline.starting(start["stage"], start["params"])
    run_id = store.begin(current, store.parent(current), start["time"], pid)
    logged = store.steps(run_id)
    say("ready")
    status = "KILLED"
    for line in events:
        match json.loads(line):
            case {"event": "tag", "key": key, "value": value}:
                store.client.set_tag(run_id, key, value)
            case {"event": "metrics", "metrics": metrics, "step": step} if step not in logged:
                store.log_metrics(run_id, {key: value for key, value in metrics.items() if key != "epoch"}, step)
            case {"event": "end", "status": status}:
                break
    if status == "FINISHED":
        outs = store.pipeline.hash(store.pipeline.outs(current.stage))
        store.complete(run_id, replace(current, outs=outs))
        say("complete")
        if next(events, None) is None:  # DVC has not seen it succeed, and will run it again
            status = "KILLED"
    store.close(run_id, status, pid)
    if status == "FINISHED" and current.stage == "train":
        store.pipeline.add(replace(current, outs=outs))
        store.restore_evaluation()
    say("closed")


def say(word: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # the stage may be dead by now
        os.write(sys.stdout.fileno(), f"{word}\n".encode())


def main() -> None:
    for number in SIGNALS:  # it ends when the stage does
        signal.signal(number, signal.SIG_IGN)
    quiet()
    try:
        record(sys.stdin)
    except Exception as error:  # whatever it is, the stage should tell it in one line
        sys.exit(f"warning: {describe(error)}; `make sync` records this when it can")
    leave()


if __name__ == "__main__":
    main()
