# make demo      trace the bundled model on the built-in reviews: a table, a figure, a report
# make test      the test suite (minutes); make test-slow for the long ones
# make figures   every figure and table of the paper from committed results; make reproduce makes those results anew
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEMO   ?= runs/demo

.PHONY: demo test test-slow check figures reproduce docs clean

$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test]"
	touch $(STAMP)

demo: $(STAMP)
	rm -rf $(DEMO)
	$(BIN)/python -m mech_absa.patch --limit 60 --out $(DEMO)

test: $(STAMP)
	$(BIN)/python -m ruff check mech_absa tests analyses figures benchmarks
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -m "not slow and not network"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

figures: $(STAMP)
	$(BIN)/python figures/make.py

reproduce: $(STAMP)
	$(BIN)/python figures/reproduce.py

docs: $(STAMP)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) runs/demo build site
