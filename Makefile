# `make demo` and `make test` each do all the set-up they need; see README.md.

BIN := .venv/bin
HOME_DIR ?= ./home
LISTEN ?= 127.0.0.1:8080
PORTAL ?= 127.0.0.1:3261

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test test-lio test-slow lint bench

help: ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 16

setup: ## install what is missing (as root) and the project into .venv
	@scripts/setup tests

demo: ## the life of a volume with the real commands, and a real initiator, in a temporary place
	@scripts/setup service
	@$(BIN)/python scripts/demo.py

serve: ## run the service in the foreground; HOME_DIR, LISTEN, PORTAL say where
	@scripts/setup service
	@$(BIN)/stratus-storage serve --home $(HOME_DIR) --listen $(LISTEN) --portal $(PORTAL)

test: ## lint, types, all quick tests, on this host and in a kernel of their own, coverage of every room
	@scripts/setup tests
	@scripts/test

test-lio: ## only the tests of LIO and LVM, in a kernel of their own (user-mode-linux)
	@scripts/setup tests
	@scripts/test --lio

test-slow: ## the long profiles, and LIO and LVM in a stock kernel (qemu); their outcome goes into bench/RESULTS.md
	@scripts/setup slow
	@scripts/test --slow

lint: ## ruff and mypy
	@scripts/setup service
	@scripts/test --lint

bench: ## measure, and write bench/RESULTS.md
	@scripts/setup tests
	@$(BIN)/python -m bench
