# The commands a person needs. `make demo` and `make test` set up all they use.
#   TORCH_INDEX=URL   take torch from another package index, e.g. PyTorch's own CPU index
#   NO_APT=1          never install Debian packages (tmux, slurm-wlm, munge), whatever the rights

SHELL := /bin/bash
PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test check bench soak clean

help:
	@echo "make demo     set up, train a detector on four workers, preempt it, watch it come back"
	@echo "make test     set up, run every check and test"
	@echo "make install  set up only: .venv with pinned versions"
	@echo "make check    ruff and mypy"
	@echo "make bench    run all benches, write docs/benchmarks.md"
	@echo "make soak     the long chaos tests"
	@echo "make clean    remove what the commands above made (not runs/)"

install: $(STAMP)

# torch first and on its own: TORCH_INDEX must serve torch alone, nothing else.
$(STAMP): pyproject.toml constraints.txt
	@echo "== setting up $(VENV) with $(PYTHON) (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; say which: make PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "   torch ..."
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) 'torch==2.13.0'
	@echo "   everything else ..."
	@$(PIP) -e '.[detcore,store,dev]'
	@touch $@

tmux:
	@command -v tmux >/dev/null || NO_APT=$(NO_APT) bash tools/apt-install tmux \
	  || echo "tmux is not here and cannot be installed: the local backend is used instead"

slurm:
	@PATH=$$PATH:/usr/sbin; command -v slurmctld >/dev/null && command -v munged >/dev/null \
	  || NO_APT=$(NO_APT) bash tools/apt-install slurm-wlm munge \
	  || echo "slurm-wlm and munge are not here and cannot be installed: the tests on a Slurm cluster are skipped"
.PHONY: tmux slurm

demo: $(STAMP) tmux
	@$(BIN)/python tools/demo.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(STAMP) tmux slurm check
	$(BIN)/python -m pytest -m 'not soak' -n 2 --dist worksteal --durations=15

soak: $(STAMP) tmux slurm
	$(BIN)/python -m pytest -m soak --timeout 3600 -s

bench: $(STAMP) tmux slurm
	$(BIN)/python -m bench

clean:
	rm -rf $(VENV) .demo build *.egg-info .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
