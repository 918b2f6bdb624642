# Each target does all of its own set-up: git, make and Python 3.11, 3.12 or 3.13 with pip and venv are what it needs.
#   make demo ARGS="method=linear seed=1"     ARGS goes to the command
#   make test PYTHON=python3.12               PYTHON names the Python of the environment (by default the first that fits)
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help demo serve test test-slow check table report docs bench-gpu setup FORCE

export UV_PYTHON_DOWNLOADS := never
export UV_PROJECT_ENVIRONMENT := .venv
# once at installation: containers often set PYTHONDONTWRITEBYTECODE, and every command would compile all packages again
export UV_COMPILE_BYTECODE := 1
unexport VIRTUAL_ENV UV_PYTHON

RUN := .venv/bin/python
STAMP := .venv/.synced
UV := .uv/bin/uv
CANDIDATES := $(if $(PYTHON),"$(PYTHON)",$(RUN) python3 python3.13 python3.12 python3.11)
IN_RANGE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
MINOR := import sys; print(sys.version_info[:2])

# An environment is made anew when the folder was moved or copied, its Python is gone, or PYTHON names another version.
STALE := $(shell test "$$(cat $(STAMP) 2>/dev/null)" = "$$(pwd -P)" && test -x $(RUN) && { test -z '$(PYTHON)' \
	|| test "$$('$(PYTHON)' -c '$(MINOR)' 2>/dev/null)" = "$$($(RUN) -c '$(MINOR)')"; } || echo stale)

# Shell text that the two set-up rules begin with: sets $python to the first candidate that is 3.11, 3.12 or 3.13.
FAIL = { echo "visprompt: $(1)" >&2; exit 1; }
FIND_PYTHON = python=; for p in $(CANDIDATES); do \
	  if "$$p" -c '$(IN_RANGE)' >/dev/null 2>&1; then python=$$p; break; fi; done; \
	test -n "$$python" || $(call FAIL,none of $(CANDIDATES) is Python 3.11$(comma) 3.12 or 3.13: install one or name it with PYTHON=/path/to/python.)
comma := ,

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP)  ## tune prompts on the embedded backbone and the bundled digits: python src/train.py method=vapt
	$(RUN) src/train.py method=vapt $(ARGS)

serve: $(STAMP)  ## tune prompts for the three demo tasks if that was not done, and serve them: http://127.0.0.1:8000
	$(RUN) src/train.py tasks=demo method=vapt paths.log_dir=logs/serve
	$(RUN) src/serve.py states=logs/serve $(ARGS)

test: $(STAMP)  ## the fast tests, on all cores
	$(RUN) -m pytest -n auto --dist loadfile -m "not slow and not endurance" $(ARGS)

test-slow: $(STAMP)  ## the slow tests only: several processes, killed runs, compiled models (these need a C++ compiler)
	$(RUN) -m pytest -n auto --dist loadfile -m "slow and not endurance" $(ARGS)

check: $(STAMP)  ## ruff (lint and format) and mypy
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

table: $(STAMP)  ## the README's table of the demo tasks: grid, choice, three seeds; goes on where it was stopped
	$(RUN) src/tune.py experiment=demo_table engine=processes $(ARGS)

report: $(STAMP)  ## the protocol and an ablation on the demo, then a page of tables and figures: logs/report/index.html
	$(RUN) src/tune.py experiment=demo_report
	$(RUN) src/train.py -m experiment=demo_ablation method.num_tokens=1,10,50 method.depth=1,3,6
	$(RUN) src/report.py inspect=auto $(ARGS)

docs: $(STAMP)  ## the generated pages (datasets, methods, result.json, exports), golden values of new methods; ARGS=all: all exports anew
	$(RUN) -m visprompt.data.catalog.describe > docs/datasets.md
	$(RUN) -m visprompt.runs.methods_page > docs/methods.md
	$(RUN) -m visprompt.runs.result_page > docs/result.md
	$(RUN) -m visprompt.models.methods.describe > docs/methods-by-backbones.md
	$(RUN) tests/helpers/goldens.py
	$(RUN) -m visprompt.export.describe docs/export.md $(ARGS)

bench-gpu: $(STAMP)  ## what one GPU does, in under ten minutes: step, memory, a whole task, bank, service, loader
	$(RUN) benchmarks/gpu.py $(ARGS)

setup: $(STAMP)  ## only the environment, .venv, from the hashes in uv.lock; uv itself goes to .uv
	@:

$(STAMP): pyproject.toml uv.lock .uv/.installed $(if $(STALE),FORCE)
	@$(FIND_PYTHON); rm -f $@; \
	$(UV) sync --frozen --all-extras --python "$$python" \
	  || $(call FAIL,the environment could not be made from uv.lock for the reason above: it needs a network and some 8 GB of disk.)
	@pwd -P > $@

.uv/.installed: requirements-uv.txt
	@$(FIND_PYTHON); \
	"$$python" -c 'import ensurepip$(comma) venv' >/dev/null 2>&1 \
	  || $(call FAIL,$$python has no venv module: install it (on Debian and Ubuntu: apt-get install python3-venv).); \
	"$$python" -m venv --clear .uv || $(call FAIL,$$python could not make the folder .uv for the reason above.); \
	.uv/bin/python -m pip install --quiet --disable-pip-version-check --retries 2 --only-binary :all: --require-hashes \
	  -r requirements-uv.txt || $(call FAIL,uv could not be fetched: it needs a network (or a mirror named in PIP_INDEX_URL).)
	@touch $@
