# The front door. Every stage is a target; `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := .peers

SEED ?= 0
RECIPE ?= demo
FORMATS ?= open_clip
CLUSTER ?= local
NODES ?= 1
BENCH ?= preparation loading remote plan loss trainer evaluation learning
# Those that make their own data.
BENCH_ALONE := plan loss learning

.DEFAULT_GOAL := help
.PHONY: help setup demo download data verify tokenizer train evaluate export report submit plan-memory gpu-check peers bench test test-slow endurance lint format clean

need = $(if $(value $(1)),,$(error $@ needs $(1)=…, such as `make $@ $(2)`))

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(STAMP) ## create .venv and install (every target does this by itself)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] + ". Choose one with PYTHON=…")'
	@echo 'installing into $(VENV), which takes some minutes …'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[export,dev]'
	@touch $@

demo: RUN ?= runs/demo
demo: $(STAMP) ## everything on generated data, from nothing to a report: RUN=runs/demo SEED=0
	$(BIN)/python -m launch demo --run "$(RUN)" --seed "$(SEED)" $(ARGS)

download: $(STAMP) ## official archives, checked and unpacked: SOURCES="coco=/data/coco"
	$(call need,SOURCES,SOURCES="coco=/data/coco")
	$(BIN)/python -m data_prep download $(SOURCES) $(ARGS)

data: $(STAMP) ## raw datasets → shards: SOURCES="coco=/data/coco vqa=/data/vqa" OUT=dir
	$(call need,SOURCES,SOURCES="coco=/data/coco" OUT=dir)$(call need,OUT,SOURCES="coco=/data/coco" OUT=dir)
	$(BIN)/python -m data_prep build $(SOURCES) --out "$(OUT)" $(ARGS)

verify: $(STAMP) ## check every byte of a dataset: DATA=dir
	$(call need,DATA,DATA=dir)
	$(BIN)/python -m data_prep verify "$(DATA)"

tokenizer: $(STAMP) ## captions → a SentencePiece model: DATA=dir OUT=file
	$(call need,DATA,DATA=dir OUT=file)$(call need,OUT,DATA=dir OUT=file)
	$(BIN)/python -m data_prep vocabulary "$(DATA)" --out "$(OUT)" $(ARGS)

train: $(STAMP) ## shards → checkpoints, resumed if begun: RECIPE=name DATA="dir [dir@weight …]" RUN=dir ARGS="optim.lr=1e-3"
	$(call need,DATA,RECIPE=name DATA=dir RUN=dir)$(call need,RUN,RECIPE=name DATA=dir RUN=dir)
	$(BIN)/python -m pipeline train "$(RECIPE)" "$(RUN)" --data "$(DATA)" $(ARGS)

evaluate: $(STAMP) ## checkpoint → figures with intervals: RUN=dir DATA=dir
	$(call need,DATA,RUN=dir DATA=dir)$(call need,RUN,RUN=dir DATA=dir)
	$(BIN)/python -m pipeline evaluate "$(RUN)" --data "$(DATA)" $(ARGS)

export: $(STAMP) ## checkpoint → other tools' formats, proven equal: RUN=dir FORMATS="open_clip huggingface onnx torch_export"
	$(call need,RUN,RUN=dir)
	$(BIN)/python -m pipeline export "$(RUN)" $(addprefix --format ,$(FORMATS)) $(ARGS)

report: $(STAMP) ## run → report.html: RUN=dir [DATA=dir]
	$(call need,RUN,RUN=dir)
	$(BIN)/python -m pipeline report "$(RUN)" $(if $(DATA),--data "$(DATA)")

submit: $(STAMP) ## train on a cluster: CLUSTER=mysite NODES=4 RECIPE=name DATA=dir RUN=dir (CLUSTER=local PROCESSES=2: here)
	$(call need,DATA,RECIPE=name DATA=dir RUN=dir)$(call need,RUN,RECIPE=name DATA=dir RUN=dir)
	$(BIN)/python -m launch submit --cluster "$(CLUSTER)" --nodes "$(NODES)" $(addprefix --processes ,$(PROCESSES)) --recipe "$(RECIPE)" --data "$(DATA)" --run "$(RUN)" $(ARGS)

plan-memory: $(STAMP) ## what device memory goes to, and what fits: RECIPE=name ARGS="--world 8 --gpu-gb 80"
	$(BIN)/python -m pipeline plan-memory "$(RECIPE)" $(ARGS)

gpu-check: $(STAMP) ## every CUDA path on one GPU, with figures: ARGS="--out gpu-check.json"
	$(BIN)/python -m pipeline gpu-check $(ARGS)

peers: $(PEERS)/.installed ## neighbouring tools, over what .venv has, for tests and benchmarks

# wandb is imported by img2dataset, and used only where it is asked for.
$(PEERS)/.installed: tests/peers.txt $(STAMP)
	rm -rf $(PEERS)
	$(BIN)/python -m venv --without-pip $(PEERS)
	$(BIN)/python -m pip --python $(PEERS)/bin/python install --quiet --disable-pip-version-check --no-deps -r tests/peers.txt
	site=$$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$site/venv.pth"; touch "$$site/wandb.py"
	@touch $@

bench: $(STAMP) ## measure beside other tools: BENCH="preparation loading remote plan loss trainer evaluation learning" PHOTOS=dir
	$(if $(filter-out $(BENCH_ALONE),$(BENCH)),$(call need,PHOTOS,PHOTOS=dir))
	set -e; for name in $(BENCH); do case " $(BENCH_ALONE) " in (*" $$name "*) photos=();; (*) photos=(--photos "$(PHOTOS)");; esac; $(BIN)/python -m tests.benchmarks.$$name "$${photos[@]}" $(ARGS); done

test: $(STAMP) ## all tests but the slow ones
	$(BIN)/python -m pytest -m "not slow and not endurance" -n logical --maxprocesses 8 --dist loadfile

test-slow: $(STAMP) ## the slow ones
	$(BIN)/python -m pytest -m slow

endurance: $(STAMP) ## half an hour of training on a SLURM of its own, in which something dies every five minutes
	$(BIN)/python -m pytest -m endurance

lint: $(STAMP) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## put the code into house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, caches and the demo run
	rm -rf $(VENV) $(PEERS) runs/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
