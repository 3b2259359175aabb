PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo smollm2 test bench study clean

demo: .venv/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/demo.sh

smollm2: .venv/ready
	$(BIN)/pip install -qq --disable-pip-version-check -r recipes/requirements.txt
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/smollm2_135m.sh

test: .venv/ready
	$(BIN)/pip install -qq --disable-pip-version-check -r recipes/requirements.txt
	$(BIN)/ruff check --quiet --config tests/ruff.toml .
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

bench: .venv/ready
	$(BIN)/pip install -qq --disable-pip-version-check -r bench/requirements.txt
	$(BIN)/python -m bench.speed
	$(BIN)/python -m bench.grading
	$(BIN)/python -m bench.page
	$(BIN)/python -m bench.credit

study: .venv/ready
	$(BIN)/python -m bench.study

# torch is installed first and by itself. The later installs then keep the build that it chose.
.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is missing or older than 3.11; name another, as in make demo PYTHON=python3.12" >&2; \
		exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	$(BIN)/pip install -qq --disable-pip-version-check -r requirements.txt
	touch .venv/ready

clean:
	rm -rf runs/demo
