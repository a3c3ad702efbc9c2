# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first (VENV=… to put it elsewhere).
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.ready-docs
SITE ?= docs/_build/html
OLDEST ?= .venv-oldest

.PHONY: demo test test-oldest lint docs clean

# On pictures, two students in 4 steps, by behaviour cloning and by DAgger, beside their teacher; and in a world, in which samples feed back.
demo: $(READY)
	rm -rf $(OUT)
	$(BIN)/python -m ddil_agents.bc --env digits --config demo --out $(OUT)/bc
	$(BIN)/python -m ddil_agents.dagger --env digits --config demo --out $(OUT)/dagger
	$(BIN)/python -m ddil_agents.report $(OUT)/bc $(OUT)/dagger --out $(OUT)
	$(BIN)/python -m ddil_agents.compare --config fork --seeds 3 --out $(OUT)/fork

# A process for each core, one thread each: more threads than cores would fight.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

# The same with the lowest versions that pyproject.toml allows.
test-oldest: $(OLDEST)/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of the documentation, in docs/_build/html: warnings are errors, every internal link is followed, and every page is opened in a browser.
docs: $(DOCS_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -d docs/_build/doctrees -b html docs $(SITE)
	$(BIN)/python docs/check_links.py $(SITE)
	$(BIN)/python docs/check_pages.py $(SITE)

# constraints.txt holds the versions that the tests were last seen to pass with.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

$(OLDEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	grep -oE '"[A-Za-z0-9_-]+(\[[a-z0-9]+\])?>=[0-9.]+"' pyproject.toml | sed -E 's/"|\[[a-z0-9]+\]//g; s/>=/==/' >$(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) runs dist build docs/_build .pytest_cache .mypy_cache .ruff_cache
