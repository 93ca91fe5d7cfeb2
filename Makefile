PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready

# Compiled modules are kept: hundreds of the tests start Python anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo quick test tests lint notebooks docs docs-serve bench soak steady audit clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("selfsight needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	-$(BIN)/python -m compileall -q -j 0 -x 'site-packages/.*/tests?/' $(VENV)/lib > /dev/null  # on all cores; some bring templates that are no code
	touch $(STAMP)

demo: setup
	$(BIN)/selfsight pretrain

# The package as it is installed, for the type checker: its parts lie in four folders.
TYPES := .typecheck

lint: setup
	@mkdir -p $(TYPES)/selfsight
	@for part in ssl/selfsight/* datamodules evaluation conf; do ln -sfn "../../$$part" $(TYPES)/selfsight/; done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(TYPES)/selfsight

# While working: losses, layers, optimisers, methods, the authors' numbers, the structure of the source.
quick: setup
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m quick tests/parity tests/properties tests/structure

# All that is asked of the code.
test: lint tests

# One thread a process, and a process more than there are cores: some tests wait for others that they start.
tests: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$($(PYTHON) -c 'import os; print(1 + len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)))') --dist worksteal

# Runs every notebook in a clean kernel, two at a time, and keeps the outputs in it.
notebooks: setup
	cd notebooks && printf '%s\n' *.ipynb | PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 xargs -n 1 -P 2 jupyter execute --inplace

# The documentation site, in build/docs/site; any warning and any link that leads nowhere is an error.
docs: setup
	$(BIN)/python docs/site/make_site.py

docs-serve: setup
	$(BIN)/python docs/site/make_site.py --serve

# The peers have an environment of their own. It sees the project's packages, so only what they add is installed.
BENCH := .venv-bench
PEERS := lightly kornia albumentations scikit-learn simplejpeg

bench: setup
	test -x $(BENCH)/bin/python || $(BIN)/python -m venv $(BENCH)
	$(BIN)/python -c 'import site; print("import site; site.addsitedir(" + repr(site.getsitepackages()[0]) + ")")' \
	  > "$$($(BENCH)/bin/python -c 'import site; print(site.getsitepackages()[0])')/project.pth"
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PEERS)
	$(BENCH)/bin/python benchmarks/run.py $(ARGS)

# Kills trainings of every method at random moments: none may end otherwise than one that nothing happened to.
soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py $(ARGS)

# Long trainings of every method: their memory, open files and processes stay what they are.
steady: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/steady.py $(ARGS)

# Which of the versions that are let in have a known hole, by a list in the repository: no network is asked.
audit: setup
	$(BIN)/python tests/security/audit.py

clean:
	rm -rf $(VENV) $(BENCH) build dist *.egg-info .mypy_cache $(TYPES) .ruff_cache .pytest_cache
