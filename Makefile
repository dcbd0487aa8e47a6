# The commands that people type. Each target sets up what it needs: a fresh clone needs only `make repro`.

PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
MLFLOW_PORT ?= 5000

.PHONY: help repro test stress bench gpu picture ui sync audit push pull lint format lock

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile

repro: .venv/installed  ## run what a change affects, then show the metrics
	@dvc repro
	@dvc metrics show metrics/train.json metrics/evaluate.json
	@echo "Compare runs in the MLflow UI: make ui"

test: .venv/installed  ## run the tests
	@pytest tests/

stress: .venv/installed  ## run the long forms of the reliability tests: kills, faults, bad input, CPUs; 45 minutes
	@pytest --stress tests/test_kills.py tests/test_checkpoint.py tests/test_faults.py tests/test_bad_input.py \
		tests/test_fetch.py tests/test_security.py tests/test_places.py tests/test_walk.py tests/test_same_bits.py \
		tests/test_servers.py tests/test_sweep.py tests/test_cluster.py

bench: .venv/installed  ## measure the pipeline against a plain PyTorch program: 25 minutes, with nothing else running
	@dvc repro fetch
	@python -m benchmarks.run

gpu: .venv/installed  ## measure and test everything that needs a GPU: 8 minutes
	@dvc repro fetch
	@python -m benchmarks.gpu

picture: .venv/installed  ## draw the README's picture from real output
	@python docs/picture.py

ui: .venv/installed  ## open the MLflow UI on http://127.0.0.1:5000 (MLFLOW_PORT=5001 for another port)
	@dvc-mlflow ui --port $(MLFLOW_PORT)

sync: .venv/installed  ## make MLflow agree with dvc.lock
	@dvc-mlflow sync

audit: .venv/installed  ## list where DVC, the files and MLflow disagree; fail if they do
	@dvc-mlflow audit

push: .venv/installed  ## send results, DVC's run cache and experiments to the team's remote
	@python -m commands.share push

pull: .venv/installed  ## get what others pushed
	@python -m commands.share pull

lint: .venv/installed  ## check style, types and workflows
	@ruff check .
	@ruff format --check .
	@mypy
	@actionlint -shellcheck= -pyflakes=
	@zizmor --quiet --offline .github/workflows

format: .venv/installed  ## format the code
	@ruff check --fix-only .
	@ruff format .

lock: .venv/installed  ## compile requirements.in into requirements.txt, with the newest versions
	@uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--custom-compile-command "make lock" requirements.in --output-file requirements.txt

.PHONY: git
git:
	@command -v git >/dev/null || { echo "error: expected git, found none; install it (Debian: apt-get install git)" >&2; exit 1; }

# uv installs; its own version and hashes are pinned in requirements.txt. Compiling to bytecode once saves some 10 s in
# each run if Python may not do so itself.
.venv/installed: requirements.txt pyproject.toml | git
	@command -v $(PYTHON) >/dev/null || { echo "error: expected $(PYTHON), found none; install Python 3.11 to 3.13, or name yours: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo "error: expected Python 3.11 to 3.13, found $$($(PYTHON) -V 2>&1); install one and name it: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: expected Python's venv module, found none; install it (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@echo "Installing requirements.txt into .venv: some 6 GB with PyTorch's CUDA libraries"
	@$(PYTHON) -m venv .venv
	@awk '/^uv==/ {found = 1} found {print} found && !/\\$$/ {exit}' requirements.txt > .venv/uv.txt
	@python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement .venv/uv.txt
	@uv pip sync --quiet --python .venv/bin/python --require-hashes --compile-bytecode requirements.txt
	@uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
	@touch .venv/installed
