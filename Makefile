# hessian_overlap: the commands of everyday work. `make run` and `make test` each bring their environment with them.
SHELL := bash
.DEFAULT_GOAL := help
PY := .venv/bin/python
FACTS := settings.ini setup.py tools/setup.sh tests/peers.txt
# for `make test-torch`: an environment beside .venv, and the tests that know torch from its numbers only
TORCH ?= 2.4.1
OTHER := .venv-torch-$(TORCH)
LAWS := $(addprefix tests/test_,$(addsuffix .py,linop curvature foreign fold eigen sketch quadrature masked_start subspaces apost \
  significance tables proxies models problems training record))
FLAGS ?=
JOBS ?= 2
# two notebooks on two busy cores are ten times slower when each of them starts two OpenMP threads
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help env env-dev run explore test test-torch lab docs export notebooks readme clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.run-ready: $(FACTS)
	@tools/setup.sh run
.venv/.dev-ready: $(FACTS)
	@tools/setup.sh dev
env: .venv/.run-ready
env-dev: .venv/.dev-ready

run: env ## train the small MNIST network and measure its overlaps; ARGS="--k 100 --seed 1" is passed on
	.venv/bin/hessian-overlap run mnist_mini --out runs/mnist_mini $(ARGS)

explore: env ## sliders over a finished run, in the browser; RUN=folder for another than runs/mnist_mini
	@$(PY) -c 'import voila, ipykernel' 2>/dev/null || { echo 'installing voila and ipykernel'; $(PY) -m pip install -qq 'voila>=0.5.8,<0.6' ipykernel; }
	.venv/bin/hessian-overlap explore $(or $(RUN),runs/mnist_mini)

test: env-dev ## everything: exports, notebooks, laws, site, browser; ARGS="-k krylov" is passed to pytest
	$(ONE_THREAD) MPLBACKEND=agg $(PY) -m pytest -n $(JOBS) --dist worksteal --durations=10 --durations-min=2 $(ARGS)

$(OTHER)/.dev-ready: $(FACTS)
	@VENV=$(OTHER) TORCH=$(TORCH) tools/setup.sh dev
test-torch: $(OTHER)/.dev-ready ## the laws with another torch, in an environment of its own: TORCH=2.4.1 (the oldest) or TORCH=newest
	$(ONE_THREAD) MPLBACKEND=agg $(OTHER)/bin/python -m pytest -n $(JOBS) --dist worksteal $(LAWS) $(ARGS)

lab: env-dev ## open JupyterLab on the notebooks
	$(PY) -m jupyterlab --ServerApp.root_dir=nbs $(if $(filter 0,$(shell id -u)),--allow-root)

docs: env-dev ## build the site into _docs and check it (Quarto where it is installed, else smalldocs)
	$(PY) tools/build_docs.py --check

export: env-dev ## write the package from the notebooks, clean the notebooks, refresh README.md
	.venv/bin/nbdev_clean
	.venv/bin/nbdev_export
	$(PY) tools/make_readme.py

notebooks: env-dev ## execute the pages and keep their outputs; NB=nbs/21_krylov.ipynb for one, FLAGS=slow for its slow cells too
	$(ONE_THREAD) $(PY) tools/exec_nbs.py --jobs $(JOBS) --flags "$(FLAGS)" $(NB)

clean: ## remove what was built; runs/ and .venv/ stay
	rm -rf _docs _proc _site_src artefacts build dist .pytest_cache nbs/nbdev.yml
