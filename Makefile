# make demo    install the runtime into an environment of its own and watch frames being judged
# make test    lint, types and all tests, in an environment with everything they need
# make lint    the first two of these only
# make soak    the tests that take minutes to hours; each one says which environment variable shortens it
# make docs    write the generated pages of docs/ again
# make demo-model   train the model that ships as `demo` again, from nothing (half an hour on two cores)
# make clean   remove everything made here
#
# PYTHON=python3.12        the interpreter to use, 3.10 or newer
# TORCH_SPEC=torch==2.13.0 what `pip` installs as PyTorch for the tests. The tests need no GPU, but the default index may
#                          hold the CUDA build for Linux, which is some GB; PyTorch's own index has a small CPU build:
#                          PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test
# ARGS="--frames 60"       more options for `recontrast-edge demo` (make demo) or `pytest` (make test)

.DEFAULT_GOAL := help
.PHONY: help demo test lint soak docs demo-model clean
.DELETE_ON_ERROR:

CANDIDATES := python3 python3.13 python3.12 python3.11 python3.10
PYTHON ?= $(shell for python in $(CANDIDATES); do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$python && break; done)
TORCH_SPEC ?= torch==2.13.0

DEMO_VENV := build/venv-demo
TEST_VENV := build/venv-test
SOURCES := pyproject.toml CMakeLists.txt README.md LICENSE $(shell find recontrast_edge train export -type f -not -name '*.pyc')

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(DEMO_VENV)/installed
	$(DEMO_VENV)/bin/recontrast-edge demo $(ARGS)

# Two at a time, whole files: many tests wait for cameras, brokers and processes of their own.
test: lint
	OMP_WAIT_POLICY=PASSIVE $(TEST_VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

lint: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/ruff check
	$(TEST_VENV)/bin/ruff format --check
	$(TEST_VENV)/bin/mypy

soak: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/python -m pytest -m soak $(ARGS)

docs: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/python -m recontrast_edge.cli.reference > build/cli.md && mv build/cli.md docs/cli.md
	$(TEST_VENV)/bin/python -m recontrast_edge.errors > build/exit-codes.md && mv build/exit-codes.md docs/exit-codes.md

# Seeds 1 and 2 are the model's; the tests and the demo use others.
demo-model: export PATH := $(CURDIR)/$(TEST_VENV)/bin:$(PATH)
demo-model: $(TEST_VENV)/installed
	rm -rf build/demo-model
	recontrast-edge synth --product mixed --seed 1 --train 400 --test-good 100 --test-defect 100 --out build/demo-model/line
	recontrast-edge synth --product mixed --seed 2 --train 600 --test-good 0 --test-defect 0 --out build/demo-model/good
	recontrast-edge train build/demo-model/line --recipe demo --out build/demo-model/run
	recontrast-edge export build/demo-model/run --storage fp16 --images build/demo-model/line --out build/demo-model/demo.onnx
	recontrast-edge calibrate --engine build/demo-model/demo.onnx --good build/demo-model/good/train/good \
		--max-false-reject-rate 0.01 --confidence 0.95
	mkdir -p recontrast_edge/models && cp build/demo-model/demo.onnx recontrast_edge/models/

clean:
	rm -rf build dist demo-output .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The demo runs what people get from `pip install .`, so it is installed again when a source file changes.
$(DEMO_VENV)/installed: $(SOURCES)
	$(call venv,$(DEMO_VENV))
	$(DEMO_VENV)/bin/python -m pip install .
	@touch $@

# The tests run against the checkout, so only new dependencies install anything. The kernels' tests build what they need.
$(TEST_VENV)/installed: pyproject.toml tests/install_gpu_packages.sh
	$(call venv,$(TEST_VENV))
	CMAKE_ARGS=-DRECONTRAST_CUDA=OFF $(TEST_VENV)/bin/python -m pip install '$(TORCH_SPEC)' --editable '.[train,export,dev]'
	tests/install_gpu_packages.sh $(TEST_VENV)
	@touch $@

define venv
@test -n '$(PYTHON)' || { echo 'error: expected Python 3.10 or newer as one of: $(CANDIDATES); found none.' \
	'Install one, or name it: make PYTHON=/path/to/python3' >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo 'error: expected Python 3.10 or newer,' \
	"got $$($(PYTHON) --version 2>&1 | head -n 1); name another: make PYTHON=/path/to/python3" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo 'error: $(PYTHON) cannot make environments;' \
	'on Debian and Ubuntu install it: sudo apt-get install python3-venv' >&2; exit 1; }
@$(PYTHON) -m venv $(1)
endef
