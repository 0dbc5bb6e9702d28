# Needs python3 (3.11 or newer), git and make; everything else is installed into .venv here.
PYTHON ?= python3
BIN := .venv/bin
STAMPS := .venv/.stamps

# Two threads are enough for sage-tiny, and leave a shared machine usable.
export OMP_NUM_THREADS ?= 2
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
# Without kept bytecode every process that is started would compile torch anew: seconds each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup run shell test soak chaos clients javascript prometheus page first-hour house native-coverage lint format bench bench-peers clean

setup: $(STAMPS)/test $(STAMPS)/lint

# A group of packages is installed when it is first needed, and again when the pins have changed.
# Bytecode is left to the first import: compiling all of torch and transformers takes longer than
# what is saved.
$(STAMPS)/%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt \
		--editable '.$(if $(filter-out run,$*),[$*])'
	@mkdir -p $(@D) && touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "sagellm needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv

run: $(STAMPS)/run
	$(BIN)/sagellm run graphs/pd.yaml --chat --prompt "What is 23 + 45?"

# A shell in which the command `sagellm` is found; `exit` leaves it.
shell: $(STAMPS)/run
	@echo "sagellm is on the PATH of this shell; exit leaves it"
	@env PATH="$(CURDIR)/$(BIN):$$PATH" VIRTUAL_ENV="$(CURDIR)/.venv" "$${SHELL:-/bin/sh}" -i

# A worker a core, but no more than the memory of a small machine has room for. Each begins with
# its share of the tests, and when it is done takes over some of another's. Engines compute in one
# thread: teams of two wait for each other at every kernel where the workers have taken the cores.
# Tests of what threads do say how many there are.
test: export OMP_NUM_THREADS = 1
test: $(STAMPS)/test
	$(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist worksteal

# What takes minutes: load tenfold, churn, fuzzing for SAGELLM_FUZZ_S seconds, of grammars for
# SAGELLM_FUZZ_GRAMMARS_S, and the gateway's tests again with engines in worker processes, and with
# two gateway processes. Not a part of `test`.
soak: export SAGELLM_FUZZ_S ?= 600
soak: export SAGELLM_FUZZ_GRAMMARS_S ?= 600
soak: $(STAMPS)/test $(STAMPS)/fuzz
	$(BIN)/pytest -o addopts='-v -rP --strict-markers --import-mode=importlib' \
		tests/soak tests/sagellm/gateway/test_fuzz.py
	$(BIN)/pytest --numprocesses logical --maxprocesses 4 -rs -m soak tests
	$(BIN)/python -O -m pytest -W ignore::pytest.PytestConfigWarning tests/security
	for others in SAGELLM_TEST_EXECUTOR=processes SAGELLM_TEST_GATEWAYS=2; do \
		env $$others $(BIN)/pytest --numprocesses logical --maxprocesses 4 \
			tests/sagellm/gateway tests/security tests/sagellm/cli/test_serve.py \
			--ignore tests/sagellm/gateway/test_fuzz.py || exit; \
	done

# Every scenario of examples/chaos over real processes; then workers that die for
# SAGELLM_CHAOS_HOURS virtual hours, once for each of SAGELLM_CHAOS_SEEDS seeds: hours.
chaos: export SAGELLM_CHAOS_HOURS ?= 24
chaos: export SAGELLM_CHAOS_SEEDS ?= 200
chaos: $(STAMPS)/test
	$(BIN)/sagellm chaos run examples/chaos/*.yaml
	$(BIN)/pytest --numprocesses logical --maxprocesses 4 tests/sagellm/test_virtual_chaos.py

# Clients of other projects, each in an environment of its own, against our server: their pins
# contradict ours, and each other's. The last suite is that of the packages in JavaScript.
CLIENTS := .venv-clients
NAMES := openai2 anthropic langchain pydantic_ai litellm aiohttp sage
openai2_NEEDS := 'openai<3'
openai2_SUITE := test_openai*.py
anthropic_NEEDS := anthropic
anthropic_SUITE := test_anthropic.py
langchain_NEEDS := langchain-openai langchain-anthropic 'openai>=3'
langchain_SUITE := test_langchain.py test_openai*.py
pydantic_ai_NEEDS := 'pydantic-ai-slim[openai,anthropic]'
pydantic_ai_SUITE := test_pydantic_ai.py
litellm_NEEDS := 'litellm[proxy]' mcp anthropic
litellm_SUITE := test_litellm*.py
aiohttp_NEEDS := aiohttp
aiohttp_SUITE := test_aiohttp.py test_curl.py test_prometheus.py test_javascript.py
sage_NEEDS := isage fastapi uvicorn
sage_SUITE := test_sage.py
# The arguments of pytest for the suite of a client, in its environment.
suite = $(CLIENTS)/$1/bin/python -m pytest -c /dev/null --rootdir tests/clients \
	--confcutdir tests/clients -p no:cacheprovider --timeout 120 --disable-warnings -q -rs \
	$(addprefix tests/clients/,$($1_SUITE))

clients: export SAGELLM_BIN = $(CURDIR)/$(BIN)/sagellm
clients: export SAGELLM_NODE_MODULES = $(CURDIR)/$(CLIENTS)/javascript/node_modules
clients: $(STAMPS)/test $(NAMES:%=$(CLIENTS)/%/.ready) javascript prometheus
	@$(foreach name,$(NAMES),echo "$(name):" && $(call suite,$(name)) &&) true

# Where there is no npm, the tests of these packages are skipped.
javascript: $(CLIENTS)/javascript/.ready
	@{ command -v node && command -v npm; } >/dev/null || \
		echo "no npm: the clients in JavaScript are skipped (it comes with Node.js 20 or newer)"

$(CLIENTS)/javascript/.ready: tests/clients/javascript/package.json
	@mkdir -p $(@D)
	@! command -v npm >/dev/null || { cp $< $(@D) && \
		npm install --prefix $(@D) --ignore-scripts --no-audit --no-fund --no-package-lock && \
		touch $@; }

# Of Debian; where it cannot be installed, the tests that scrape with it are skipped.
prometheus:
	@command -v prometheus >/dev/null || \
		{ [ "$$(id -u)" = 0 ] && apt-get install -y -qq --no-install-recommends prometheus; } || \
		echo "no Prometheus: its tests are skipped (as root: apt-get install prometheus)"

# What a new user does in an hour, from a wheel in a new environment. HOUR="--python PYTHON" takes
# another Python than that of .venv, and may be repeated in it.
first-hour: $(STAMPS)/test
	$(BIN)/python tests/first_hour/hour.py $(HOUR)

# The page at / in headless Chromium, with axe-core: apt-get install chromium chromium-driver
page_NEEDS := selenium axe-core-python

page: $(STAMPS)/test $(CLIENTS)/page/.ready
	@command -v chromium chromedriver >/dev/null || { \
		echo "make page needs Debian's packages chromium and chromium-driver" >&2; exit 2; }
	SAGELLM_BIN=$(CURDIR)/$(BIN)/sagellm $(CLIENTS)/page/bin/python -m pytest \
		-c /dev/null --rootdir tests/page --confcutdir tests/page \
		-p no:cacheprovider --timeout 180 -q tests/page

# Pipelines run in one process with the graph, so this environment has the packages of .venv, too.
SITE := -c 'import site; print(site.getsitepackages()[0])'

$(CLIENTS)/sage/.ready: Makefile $(STAMPS)/test
	$(PYTHON) -m venv $(CLIENTS)/sage
	$(CLIENTS)/sage/bin/python -m pip install --quiet $(sage_NEEDS)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE))')" \
		> "$$($(CLIENTS)/sage/bin/python $(SITE))/project.pth"
	@touch $@

$(CLIENTS)/%/.ready: Makefile
	$(PYTHON) -m venv $(CLIENTS)/$*
	$(CLIENTS)/$*/bin/python -m pip install --quiet pytest pytest-timeout $($*_NEEDS)
	@touch $@

# Figures of the source tree: files, lines, repeated names, circles.
house: $(STAMPS)/run
	$(BIN)/python tests/house.py

# The lines of the C kernels that the cases of tests/native_kernels run, for each instruction set that
# this machine runs or emulates: benchmarks/results/native-coverage.md. ARM needs Debian's packages
# gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user.
native-coverage: $(STAMPS)/test
	PYTHONPATH=tests $(BIN)/python -m native_kernels.coverage

lint: $(STAMPS)/test $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint deploy/Containerfile

format: $(STAMPS)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMPS)/test
	$(BIN)/sagellm bench engine
	$(BIN)/sagellm bench gateway

# The engine beside others, each in .venv-peers/NAME: made when it is first needed, then reused.
# PEERS="--peers llama.cpp --rows bf16 --cells decode-1" and the like narrow it; all of it takes hours.
bench-peers: $(STAMPS)/test
	env -u OMP_WAIT_POLICY $(BIN)/sagellm bench peers -- $(PEERS)

clean:
	rm -rf .venv .venv-clients .venv-peers .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
