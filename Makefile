# Two commands: `make demo` and `make test`. Both make .venv first if it is missing, unfinished or out of date.
# Options go in ARGS, e.g. make demo ARGS='--width 4'; another interpreter in PYTHON, e.g. make PYTHON=python3.12 test.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-from
UNFINISHED := $(VENV)/.installing
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# The first interpreter on the path that is new enough; python3 if none is, for the message below.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
try = $(shell $(1) -c '$(NEW_ENOUGH)' 2>/dev/null && echo $(1))
PYTHON ?= $(or $(call try,python3),$(call try,python3.12),$(call try,python3.13),$(call try,python3.11),python3)

.PHONY: demo test clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/python -m export.demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy renorm_onnx models export
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

# An interrupted installation leaves $(UNFINISHED) behind, and the next one starts from an empty folder. Some systems
# ship python without ensurepip; there the system's pip puts pip into the new environment.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(NEW_ENOUGH)' || { echo "renorm-onnx needs Python 3.11 or newer, and '$(PYTHON)' is not: install" \
	  "one, or name it: make PYTHON=/path/to/python3.12 demo" >&2; exit 2; }
	@if [ -e $(UNFINISHED) ] || ! $(BIN)/python -c '$(NEW_ENOUGH)' 2>/dev/null; then rm -rf $(VENV); fi
	@mkdir -p $(VENV) && rm -f $@ && touch $(UNFINISHED)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) 2>/dev/null || { \
	  $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(PIP_INSTALL) torch==2.13.0
	$(PIP_INSTALL) -e '.[dev]'
	@rm -f $(UNFINISHED) && touch $@

clean:
	rm -rf $(VENV) build dist
