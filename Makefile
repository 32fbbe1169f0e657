# Every target works on a fresh machine with Python 3.10 or newer: the first one makes .venv and installs into it.
#
#   make demo      learn a few image-text pairs from drawn pictures, offline, and judge them: minutes on a CPU
#   make demo-images   the same for ten images of handwritten digits
#   make demo-poster   the same for one poster of them, with half of those pixels
#   make demo-prototypes   ten images of each drawn shape, made by a diffusion model from prototypes
#   make demo-clip   a small CLIP of drawn shapes, from images and sentences that do not belong together
#   make test      lint, then every test that is not marked slow, on two processes
#   make test-all  the slow ones too
#   make bench     measure, and write the table of docs/benchmarks.md; asserts nothing
#   make lint      ruff, without running anything
#   make clean     remove .venv and caches; runs, buffers and data caches stay
#
# PYTHON=python3.12 chooses the interpreter, VENV=elsewhere the folder.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/ready

.PHONY: demo demo-images demo-poster demo-prototypes demo-clip test test-all bench lint clean

# Run again after an interruption, or once it is done, it goes on where it was and ends at the table.
# One thread computes and one prepares batches: networks this small cost twice the processor time on two.
demo demo-images demo-poster demo-prototypes demo-clip: export OMP_NUM_THREADS ?= 1
demo: CONFIG := configs/smoke/vldd.yaml
demo: PAGE := runs/vldd/demo/report.html
demo-images: CONFIG := configs/smoke/mtt.yaml
demo-images: PAGE := runs/mtt/digits/report.html
demo-poster: CONFIG := configs/smoke/podd.yaml
demo-poster: PAGE := runs/podd/digits/report.html
demo-prototypes: CONFIG := configs/smoke/vlcp.yaml
demo-prototypes: PAGE := runs/vlcp/shapes/report.html
demo-clip: CONFIG := configs/smoke/dimefm.yaml
demo-clip: PAGE := runs/dimefm/shapes/report.html
demo demo-images demo-poster demo-prototypes demo-clip: $(READY)
	$(PY) buffer.py --config $(CONFIG) --resume
	$(PY) distill.py --config $(CONFIG) --resume
	$(PY) eval.py --config $(CONFIG)
	@echo "pictures, curves and this table: $(PAGE)"

# Networks this small gain nothing from threads, but two processes halve the time; a file stays in one of them, so that
# what its tests share is made once. Bytecode is kept: a hundred interpreters are started, of the same modules.
test test-all: export PYTHONDONTWRITEBYTECODE :=
test test-all: export OMP_NUM_THREADS := 1
test: lint
	$(PY) -m pytest -n 2 --dist loadfile -m "not slow"

test-all: lint
	$(PY) -m pytest -n 2 --dist loadfile

bench: $(READY)
	$(PY) -m tests.benchmarks

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an installation that broke off is taken up again.
$(READY): requirements.txt tests/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than 3.10 or missing; make PYTHON=python3.12 takes another" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(addprefix -r ,$^)
	touch $@
