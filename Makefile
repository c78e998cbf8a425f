# `make demo` and `make test` do all the set-up they need: an environment in .venv, and the package in it.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check evidence readme report clean

demo: .venv/installed  ## one full study on real data, then its page
	$(BIN)/firsthand run rankme
	$(BIN)/firsthand report --output report
	@echo "open report/index.html"

test: check  ## every check
	$(BIN)/pytest --numprocesses 2 --dist loadfile

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python scripts/readme_table.py --check

evidence: .venv/installed-dev  ## run again every study whose code has changed since its evidence was written
	$(BIN)/firsthand list --stale --json | $(BIN)/python -c 'import json, sys; print(*[m["slug"] for m in json.load(sys.stdin)])' \
		| xargs --no-run-if-empty $(BIN)/firsthand run --publish

readme: .venv/installed  ## the table of methods in README.md
	$(BIN)/python scripts/readme_table.py

report: .venv/installed
	$(BIN)/firsthand report --output report

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable .
	@touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[all,dev]'
	@touch $@ .venv/installed

clean:
	rm -rf .venv report site dist build
