"""Make MLflow agree with dvc.lock: add the run of each stage whose record is missing.

Missing is what DVC did without running the stage (restored from its cache, pulled, skipped before a new store), and
what an outage of MLflow swallowed. The runs that are added have the tag `restored`. Runs that were left RUNNING by
processes of this host that are gone are closed as KILLED.

    python -m commands.sync
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from stages.store import Store, describe, quiet

    quiet()
    try:
        store = Store(Path.cwd())
        for stage in store.stages():
            missing = store.pipeline.missing_outs(stage)
            if missing:
                print(f"{stage}: not recorded, {missing[0]} is not as in dvc.lock; `dvc checkout` or `dvc repro` first")
            elif run_id := store.restore(stage):
                print(f"{stage}: recorded as run {run_id}")
            else:
                print(f"{stage}: recorded before")
        for run_id in store.close_dead():
            print(f"closed run {run_id} as KILLED")
    except Exception as error:  # the store's, of any kind
        sys.exit(f"error: {describe(error)}")


if __name__ == "__main__":
    main()
