# make demo      trace the bundled model on the built-in reviews: a table, a figure, a report
# make demo MODEL=smollm2   the same on SmolLM2-135M, which is downloaded once (93 MB) and kept in the user's cache
# make test      the test suite (minutes), then make test-tl4; make test-slow for the long ones
# make test-tl4  patching, edits, own prompts and the bridge under TransformerLens 4, in .venv-tl4
# make figures   every figure and table, from the results kept in figures/results (minutes, no model)
# make reproduce those results anew, in under 90 minutes on two cores; ME_ABSC=folder of the paper's data adds the studies of real reviews
# make reproduce MODEL=smollm2 DATA=folder   the study of SmolLM2-135M; the folder holds me_absc/, mams/ and dmaste/
# make docs      the pages of docs/ and the API reference as a site, site/index.html, that opens from disk
PYTHON ?= python3
VENV   ?= .venv
VENV4  ?= .venv-tl4
TL4_TESTS ?= tests/test_bridge.py tests/patch/test_own.py tests/test_patching.py tests/test_demos.py tests/edits/test_edits.py tests/edits/test_store.py
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PURELIB := 'import sysconfig; print(sysconfig.get_path("purelib"))'
DEMO   ?= runs/demo
MODEL  ?= bundled
DATA   ?= ../shared/data
LIMIT  ?= $(if $(filter smollm2,$(MODEL)),8,40)

.PHONY: demo test test-tl4 test-slow figures reproduce docs clean

$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test]"
	touch $(STAMP)

demo: $(STAMP)
	rm -rf $(DEMO)
ifeq ($(MODEL),smollm2)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[gguf]"
	$(BIN)/python -m mech_absa.models get $(MODEL)
	$(BIN)/python -m mech_absa.patch --model $(MODEL) --by role --keep all --limit $(LIMIT) --out $(DEMO)
else
	$(BIN)/python -m mech_absa.patch --model $(MODEL) --limit $(LIMIT) --out $(DEMO)
endif

test: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not network"
	$(MAKE) test-tl4

# The second environment sees the packages of the first, torch among them, and adds what differs.
$(VENV4)/.installed: $(STAMP) constraints-tl4.txt
	test -d $(VENV4) || $(BIN)/python -m venv $(VENV4)
	echo "import site; site.addsitedir('$$($(BIN)/python -c $(PURELIB))')" > "$$($(VENV4)/bin/python -c $(PURELIB))/first.pth"
	$(VENV4)/bin/python -m pip install --quiet -c constraints-tl4.txt transformer-lens==4.3.0
	touch $@

test-tl4: $(VENV4)/.installed
	OMP_NUM_THREADS=1 $(VENV4)/bin/python -m pytest -n 2 --dist loadfile -m "not slow and not network" $(TL4_TESTS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

figures: $(STAMP)
	$(BIN)/python -m figures.make

reproduce: $(STAMP)
ifeq ($(MODEL),smollm2)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[gguf]"
	$(BIN)/python -m mech_absa.models get $(MODEL)
	$(BIN)/python -m figures.smollm2 --data $(DATA)
else
	$(BIN)/python -m figures.reproduce $(if $(ME_ABSC),--me-absc $(ME_ABSC))
endif

docs: $(STAMP)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo site/index.html

clean:
	rm -rf $(VENV) $(VENV4) $(DEMO) build site
