# `make demo` runs the main job, `make test` the tests; both set up what they need, once.

VENV := .venv
READY := $(VENV)/.ready

.PHONY: demo test setup clean

demo: $(READY)
	$(VENV)/bin/fastbarlow demo

test: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

setup: $(READY)

$(READY): pyproject.toml constraints.txt tools/setup.sh
	bash tools/setup.sh $(VENV)
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info demo
