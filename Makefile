# make lab      JupyterLab on notebook 00 (ARGS="--no-browser --port 8890" pass through)
# make test     every test and every notebook cell
# make refresh  re-execute the notebooks in place (NB=notebooks/01_tokenizer.ipynb for one)
# make book     the course as a static site, from the stored outputs: build/book/html/index.html
# make bench    one table against the peers; make setup: only the environment; make clean: throw it away

PYTHON ?= python3
VENV := .venv/bin
ARGS ?=
NB ?=

.PHONY: setup lab test refresh book bench lint clean

setup:
	@$(PYTHON) scripts/setup_env.py

# Loopback and a token are Jupyter's defaults; nothing here turns either off. Jupyter refuses root unless told that it
# is meant, which it is in a container.
ROOT_FLAG := $(shell [ "$$(id -u)" = 0 ] && echo --allow-root)

lab: setup
	$(VENV)/jupyter lab --ServerApp.ip=127.0.0.1 --ServerApp.root_dir="$(CURDIR)" $(ROOT_FLAG) \
	  --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb $(ARGS)

test: setup
	$(VENV)/python -m pytest tests notebooks --nbval --nbval-current-env --nbval-cell-timeout=300 $(ARGS)

refresh: setup
	$(VENV)/python scripts/refresh.py $(NB)

book: setup
	$(VENV)/python scripts/build_book.py

bench: setup
	$(VENV)/python benchmarks/all.py $(ARGS)

lint: setup
	$(VENV)/ruff check .

clean:
	rm -rf .venv build/book data/built data/*.bin data/*.idx data/*.meta.json test-artefacts
