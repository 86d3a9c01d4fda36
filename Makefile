# make run          the demonstration: guests, disks and a daemon, without Xen
# make test         the test suite                     PYTEST_ARGS="tests/blkif -x" runs a part
# make test-slow    what takes longer: more images, more crashes, installations
# make test-native  the C of the native data path    NATIVE_ARGS="stress --sleeps 50000000" is one part
# make lint         ruff and mypy, and shellcheck where it is installed
# make test-xen     the tests on a real Xen, emulated  XEN_ARGS="--suite bookworm 10 20" (see tests/xen/run)
# make fuzz         random hostile guests, then images, then the C by itself, a minute each  FUZZ_ARGS="--seconds 3600 --seed 7"
# make crash        qcow2 disks that crash and are killed, for a minute  CRASH_ARGS="--seconds 3600 --seed 7"
# make bench        measurements beside QEMU's         BENCH_ARGS="..." (see bench/README.md)
# make bench-xen    measurements on a real Xen, emulated, beside qdisk and blkback  BENCH_ARGS="--repeat 5 --profile"
# make clean        remove what these have made, .venv too
#
# All but test-native make .venv first, with PYTHON (python3), and again when pyproject.toml or the C has changed.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/made-from
BENCH_STAMP := $(VENV)/made-for-bench
PYTEST_ARGS ?=
XEN_ARGS ?=
BENCH_ARGS ?=
FUZZ_ARGS ?= --seconds 60
CRASH_ARGS ?= --seconds 60
NATIVE_ARGS ?=
SHELL_SCRIPTS := .ci/run scripts/block-xbd bench/newest-qemu tests/xen/lab tests/xen/image/build.sh tests/xen/image/dom0-init \
	tests/xen/image/dom0-initramfs-init tests/xen/image/guest-init tests/xen/dom0/main tests/xen/dom0/case \
	tests/xen/dom0/lib.sh tests/xen/dom0/block-lab bench/xen/main bench/xen/serve bench/xen/guest-job

.PHONY: run test test-slow test-native lint test-xen fuzz crash bench bench-xen clean

run: $(STAMP)
	@$(BIN)/xbd demo

# First what may run side by side. Nothing of the kind is no failure (5).
define run-tests
	@some=0
	$(BIN)/python -m pytest -n auto --dist worksteal -m "$(1) and not alone" $(PYTEST_ARGS) || some=$$?
	[ $$some = 0 ] || [ $$some = 5 ] || exit $$some
	$(BIN)/python -m pytest -m "$(1) and alone" $(PYTEST_ARGS) || [ $$? = 5 ]
endef

test: $(STAMP)
	$(call run-tests,not slow)

test-slow: $(STAMP)
	$(call run-tests,slow)

test-native:
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON), from Debian: apt-get install python3" >&2; exit 1; }
	$(PYTHON) tests/native/run.py $(NATIVE_ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	if command -v shellcheck >/dev/null; then
		shellcheck -x -P SCRIPTDIR $(SHELL_SCRIPTS)
		shellcheck -s sh -e SC2154,SC2034,SC2164 tests/xen/cases/*.sh   # sourced with set -e, after dom0/lib.sh
	fi

test-xen: $(STAMP)
	@missing=$$(tests/xen/lab needs | xargs)
	[ -z "$$missing" ] || { echo "make: the lab needs, from Debian: apt-get install --no-install-recommends $$missing" >&2; exit 1; }
	$(BIN)/python tests/xen/run $(XEN_ARGS)

fuzz: $(STAMP)
	@$(BIN)/python tests/fuzz/fuzz_ring.py $(FUZZ_ARGS)
	$(BIN)/python tests/fuzz/fuzz_qcow2.py $(FUZZ_ARGS)
	$(BIN)/python tests/fuzz/fuzz_native.py $(FUZZ_ARGS)

crash: $(STAMP)
	@$(BIN)/python tests/fuzz/crash_qcow2.py $(CRASH_ARGS)

bench: $(BENCH_STAMP)
	@command -v gcc >/dev/null || { echo "make: the measurements need a C compiler, from Debian: apt-get install gcc libc6-dev" >&2; exit 1; }
	qemu=$$(bench/newest-qemu) || echo "make: QEMU is measured as it is installed" >&2
	$(BIN)/python bench/run.py $${qemu:+--qemu "$$qemu"} $(BENCH_ARGS)

bench-xen: $(STAMP)
	@command -v gcc >/dev/null || { echo "make: the measurements need a C compiler, from Debian: apt-get install gcc libc6-dev" >&2; exit 1; }
	missing=$$(tests/xen/lab needs | xargs)
	[ -z "$$missing" ] || { echo "make: the lab needs, from Debian: apt-get install --no-install-recommends $$missing" >&2; exit 1; }
	$(BIN)/python bench/run_xen.py $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -rf bench/build bench/results tests/native/c/build tests/fuzz/native/build tests/xen/results
	find xbd tests bench -name __pycache__ -type d -exec rm -rf {} +

# The environment is as good as its stamp: a half-made one has none, and is completed.
$(STAMP): pyproject.toml setup.py $(wildcard xbd/core/datapath/native/build.py xbd/core/datapath/native/src/*)
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON); xbd needs Python 3.11 or newer, from Debian: apt-get install python3 python3-venv" >&2; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: xbd needs Python 3.11 or newer; choose one with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) has no venv; from Debian: apt-get install python3-venv" >&2; exit 1; }
	echo "make: preparing $(VENV)"
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[test,lint]'
	touch $@

# The plots' library, which nothing else needs: without it there are tables alone.
$(BENCH_STAMP): $(STAMP)
	@if $(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[bench]'; then
		touch $@
	else
		echo "make: matplotlib can't be installed: there will be no plots" >&2
	fi
