# make demo   the demo from a clean clone: environment, install, run (continues a run that was interrupted)
# make test   environment, install, ruff, mypy, pytest        make lint   ruff and mypy alone
# make clean  removes the environment and the demo's run folder
#
# Tests run in 2 processes of one thread each; on a larger machine: make test WORKERS=8
# A smaller download without a GPU: make TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_FLAGS ?= --disable-pip-version-check --quiet
VENV := .venv
STAMP := $(VENV)/installed
RUN := runs/demo
WORKERS ?= 2

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(VENV)/bin/nha-convert run demo --out $(RUN) --resume

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n $(WORKERS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else f'Python 3.10 to 3.13 is needed, found {v[0]}.{v[1]}; name one: make PYTHON=python3.12')"
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) $(TORCH)
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) -e '.[dev]' -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) $(RUN)
