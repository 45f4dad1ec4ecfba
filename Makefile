.PHONY: check test quick format images docs

check:
	bash tests/run.sh

test: check

quick:
	bash tests/run.sh -m "not slow and not nightly and not gpu"

format:
	.venv/bin/ruff format . && .venv/bin/ruff check --fix .

docs:
	bash tools/setup.sh docs
	.venv/bin/mkdocs build --strict

images:
	docker build -f docker/Dockerfile.cpu -t minherit:cpu .
	docker build -f docker/Dockerfile -t minherit:gpu .
