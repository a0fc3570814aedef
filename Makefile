# The two commands of the README: `make reproduce` and `make test`; and `make test-compat`, the guard with the oldest
# libraries that it works with. Nothing but Python 3.11+ is needed beforehand.
PYTHON ?= python3
BIN := .venv/bin
COMPAT := .venv-compat/bin

.PHONY: reproduce test test-compat clean

reproduce: .venv/installed
	$(BIN)/razor reproduce parity-mnist --preset quick

test: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Left out are two files that need the extras [train] and [eval], which go with the newest libraries, and two slow tests of
# threads and processes, whatever the libraries. That old libraries warn of what has become of newer ones is no error.
test-compat: .venv-compat/installed
	$(COMPAT)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -o filterwarnings=default \
	  tests/test_install.py tests/guard tests/lm \
	  --ignore tests/guard/test_calibrate.py --ignore tests/lm/test_prior.py --ignore tests/lm/test_compute.py \
	  --deselect tests/guard/test_monitor_failures.py::test_no_process_waits_for_one_that_has_failed

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "rlrazor needs Python 3.11 or newer; '$(PYTHON)' is older. Try: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: requirements.txt pyproject.toml | .venv/python
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

.venv/installed-dev: requirements-dev.txt requirements-language.txt requirements-robot.txt .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# torch and all that requirements.txt pins is linked from .venv, not downloaded again.
.venv-compat/installed: requirements-compat.txt pyproject.toml .ci/share_packages.py .venv/installed-dev
	$(PYTHON) -m venv --clear .venv-compat
	$(COMPAT)/python .ci/share_packages.py $(BIN)/python requirements.txt requirements-compat.txt \
	  pandas pyarrow pytest-xdist execnet
	$(COMPAT)/pip install --quiet --disable-pip-version-check -r requirements-compat.txt
	$(COMPAT)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf .venv .venv-compat .mypy_cache .ruff_cache .pytest_cache
