# Every target does its own set-up: a virtual environment in .venv, made anew only when the
# requirements (setup.cfg) have changed. Needed on the machine: Python 3.10+, make, git.
PYTHON ?= python3
DEMO ?= # flags of the demo, such as --record results/demo
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/requirements-$(shell cksum setup.cfg | cut -d' ' -f1)

.PHONY: demo picture test quick lint env clean

env: $(STAMP)

$(STAMP): setup.cfg
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set PYTHON=python3.x")'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "installing the requirements of setup.cfg into $(VENV)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@rm -f $(VENV)/requirements-*
	@touch $@

demo: env
	$(RUN) -m demo $(DEMO)

# README's picture: of a report on results that are here, the section with plots, by a headless Chromium.
picture: env
	$(RUN) -m eval.report results/cifar100 -o build/report.html
	sed -i 's|</style>|main > :not(:has(.plot)) { display: none; } main { padding-top: 0; }</style>|' build/report.html
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1180,880 \
		--screenshot=docs/report.png file://$(CURDIR)/build/report.html
	$(RUN) -c 'from PIL import Image; \
		Image.open("docs/report.png").convert("RGB").quantize(64).save("docs/report.png", optimize=True)'

test: env lint
	$(RUN) -m pytest

# The tests that need no training run of their own: under three minutes on two cores.
quick: env lint
	$(RUN) -m pytest -m quick

lint: env
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf $(VENV) demo/out build *.egg-info
