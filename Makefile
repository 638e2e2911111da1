# `make demo` and `make test` set up everything they need. See README.md.
SHELL := bash
.DEFAULT_GOAL := help
PY := .venv/bin/python
ARGS ?=
# Empty, so that compiled modules are kept: each of the engine's processes imports vLLM, in 8 s instead of 10.
export PYTHONDONTWRITEBYTECODE =

.PHONY: help env demo test test-all lint proto docs train eval growth bench-load bench-ability bench-activation bench-decode bench-slots bench-encode bench-codec bench-train bench-identity bench-soak bench-ingest bench-gpu bench-bank bench-scale-out bank-soak crash-test model programs

help:  ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: .venv/.made  ## .venv with everything (once)

.venv/.made: pyproject.toml .ci/env
	@.ci/env
	@touch $@

model: .venv/.made  ## build the default model into the cache (once)
	@$(PY) -m regrad_vllm.cli model >/dev/null

programs:
	@.ci/programs

demo: .venv/.made  ## documents in, a changed answer out
	@$(PY) -m regrad_vllm.cli demo $(ARGS)

# Two processes: one runs all that starts an engine, the other the rest (tests/conftest.py).
test: .venv/.made model programs  ## the tests, with every kind of real part
	@$(PY) -m pytest -n 2 -m 'not only_test_all' $(ARGS)

test-all: .venv/.made model programs  ## these and those that take minutes each
	@$(PY) -m pytest -n 2 $(ARGS)

lint: .venv/.made  ## style, types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

proto: .venv/.made  ## make the protobuf code from proto/ anew
	@$(PY) -m bank_service.wire.generate

docs: .venv/.made  ## make the reference of settings and commands in docs/ anew
	@$(PY) -m regrad_vllm.cli.reference docs

train: .venv/.made model  ## meta-train the learner that ships, or go on with it: make train ARGS="--data FOLDER"
	@$(PY) -m regrad_vllm.cli train regrad_vllm/learn/configs/smollm2-135m-first.toml --resume $(ARGS)
	@$(PY) -m regrad_vllm.cli train regrad_vllm/learn/configs/smollm2-135m-second.toml --resume $(ARGS)
	@$(PY) -m regrad_vllm.cli train regrad_vllm/learn/configs/smollm2-135m-third.toml --resume $(ARGS)
	@$(PY) -m regrad_vllm.cli train regrad_vllm/learn/configs/smollm2-135m-ft-rag.toml --resume $(ARGS)
	@$(PY) -m regrad_vllm.cli train regrad_vllm/learn/configs/smollm2-135m-ft-rag-second.toml --resume $(ARGS)
	@$(PY) -m regrad_vllm.cli train regrad_vllm/learn/configs/smollm2-135m-fourth.toml --resume $(ARGS)
	@$(PY) -m regrad_vllm.cli train regrad_vllm/learn/configs/smollm2-135m-fifth.toml --resume $(ARGS)
	@$(PY) -m regrad_vllm.cli train regrad_vllm/learn/configs/smollm2-135m.toml --resume $(ARGS)

eval: .venv/.made model  ## is it knowledge: ReGrad, RAG, controls; tables and a page
	@$(PY) -m regrad_vllm.cli eval $(ARGS)

growth: .venv/.made model  ## curves over documents in the bank, k, γ, length, corpus
	@$(PY) -m regrad_vllm.cli growth $(ARGS)

bench-activation: .venv/.made model  ## from documents in the arena to a request that runs, against stock vLLM
	@$(PY) -m benchmarks.activation $(ARGS)

bench-slots: .venv/.made model  ## memory in a worker for many requests, against dense slots and stock vLLM
	@$(PY) -m benchmarks.slot_memory $(ARGS)

bench-decode: .venv/.made model  ## decode throughput with other documents for each request, over the base model
	@$(PY) -m benchmarks.decode $(ARGS)

bench-load: .venv/.made model  ## load: ReGrad, RAG and others; tables and a page
	@$(PY) -m regrad_vllm.cli bench load $(ARGS)

bench-ability: .venv/.made model  ## perplexity of neutral text with ReGrad off and on, against stock vLLM
	@$(PY) -m benchmarks.ability $(ARGS)

bench-encode: .venv/.made model  ## documents/s of the batched encoder over one by one
	@$(PY) -m benchmarks.encode $(ARGS)

bench-codec: .venv/.made model  ## bytes of a stored gradient against answers and speed, by codec
	@$(PY) -m benchmarks.codec_costs $(ARGS)

bench-train: .venv/.made model  ## meta-training tasks/s over the loop over tasks
	@$(PY) -m benchmarks.training_speed $(ARGS)

bench-soak: .venv/.made model  ## memory, files, adapters and base weights over 2,000 requests
	@$(PY) -m benchmarks.soak $(ARGS)

crash-test: .venv/.made  ## kill -9 of a bank at 350 moments under load, every promise checked after each
	@$(PY) -m benchmarks.crash $(ARGS)

bench-gpu: .venv/.made  ## in the engine: new adapters, decoding with one each, documents in the prompt; ours and stock
	@$(PY) -m benchmarks.gpu $(ARGS)

bench-ingest: .venv/.made  ## durable ingest of gradients against writing the same bytes to files with fsync
	@$(PY) -m benchmarks.bank_ingest $(ARGS)

bench-bank: .venv/.made  ## a bank of 100,000 documents: queries against raw usearch, fetches against redis-py, restarts
	@$(PY) -m benchmarks.bank $(ARGS)

bench-scale-out: .venv/.made  ## two bank nodes on PostgreSQL and an object store: against one, against the SQL alone, killed
	@$(PY) -m benchmarks.scale_out $(ARGS)

bank-soak: .venv/.made  ## a bank under mixed load for half an hour: what grows, what goes wrong
	@$(PY) -m benchmarks.bank_soak $(ARGS)

bench-identity: .venv/.made model  ## greedy tokens of the server against Hugging Face PEFT, one at a time
	@$(PY) -m benchmarks.identity $(ARGS)
