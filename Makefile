# `make demo`, `make test` and the others do all their own set-up, in .venv.
PYTHON ?= python3
BIN := .venv/bin
DATASET := data/movielens-100k
PORT ?= 9000

.PHONY: demo long test test-long beam notebooks docs lint proto clean

demo: .venv/demo.installed
	@date +%s > .venv/demo.began
	$(BIN)/brewjax data fetch movielens-100k
	$(BIN)/brewjax run configs/recipes/demo.yaml
	$(BIN)/brewjax run configs/recipes/encoder.yaml
	rm -rf runs/encoder/index
	$(BIN)/brewjax retrieve embed runs/encoder/encoder/model $(DATASET) runs/encoder/items.parquet
	$(BIN)/brewjax index build runs/encoder/index runs/encoder/items.parquet
	@echo "For a member, over gRPC: 500 films ranked; then 200 found among all films, and ranked:"
	$(BIN)/brewjax serve runs/demo/turbo/model --set port=$(PORT) --set http_port=null --set decode=false \
		--set encoder=runs/encoder/encoder/model --set index=runs/encoder/index --set catalogue=$(DATASET) 2> runs/demo/serve.log & server=$$!; \
	ranking="$(BIN)/brewjax score --server localhost:$(PORT) --dataset $(DATASET) --task configs/tasks/movielens/next_watched.yaml --member 405"; \
	$$ranking --items 500 && $$ranking --retrieve 200; answered=$$?; \
	kill $$server; wait $$server && exit $$answered
	@echo "demo: $$(( $$(date +%s) - $$(cat .venv/demo.began) )) s after set-up; the report is runs/demo/report/report.html"

long: .venv/demo.installed
	$(BIN)/brewjax data fetch movielens-100k
	$(BIN)/brewjax run configs/recipes/movielens.yaml

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not long" --durations 20

# What takes minutes each: kill -9 in every stage, several processes, soaks; what the TPU compiler says; the site.
test-long: .venv/test.installed docs notebooks
	$(BIN)/python -m pytest -n 2 --dist loadfile -m long --durations 20
	$(BIN)/python -m benchmarks.attention_static v5e

# Data prepared on Beam, in an environment of its own, is that of this machine's cores byte for byte; and the generated
# modules of the server can be imported beside Beam, whose protobuf is older.
BEAM := .venv-beam/bin
PREPARED := configs/recipes/demo.yaml --set tasks=[configs/tasks/movielens/liked.yaml] --set tokenizer.vocab_size=1024 \
	--set stages.big.data.max_examples=2000 --set stages.ladder.distill.data.max_examples=2000
beam: .venv/demo.installed .venv-beam/installed
	$(BEAM)/python -c "import brewjax.serve.ranker_pb2_grpc, brewjax.serve.retriever_pb2_grpc"
	$(BIN)/brewjax data fetch movielens-100k
	rm -rf build/prepared
	$(BIN)/brewjax data prepare $(PREPARED) --out build/prepared/cores
	$(BEAM)/brewjax data prepare $(PREPARED) --out build/prepared/beam \
		--runner DirectRunner --direct_num_workers=2 --direct_running_mode=multi_processing
	diff --recursive --exclude stage.json --exclude .lock build/prepared/cores build/prepared/beam

# Each in a clean kernel, into build/notebooks; `python notebooks/execute.py notebooks` renews the committed outputs.
notebooks: .venv/test.installed
	JAX_PLATFORMS=cpu TRANSFORMERS_VERBOSITY=error $(BIN)/python notebooks/execute.py build/notebooks

docs: .venv/docs.installed
	NO_MKDOCS_2_WARNING=1 TRANSFORMERS_VERBOSITY=error $(BIN)/mkdocs build

lint: .venv/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

proto: .venv-proto/installed
	.venv-proto/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. brewjax/serve/ranker.proto brewjax/serve/retriever.proto

clean:
	rm -rf .venv .venv-beam .venv-proto runs data

.venv/demo.installed: EXTRA = baselines,rank
.venv/test.installed: EXTRA = test
.venv/docs.installed: EXTRA = docs,rank
.venv/%.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "brewjax needs Python 3.11 or newer: make PYTHON=python3.11 ..")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRA)]'
	@# Alone: it asks for TensorFlow (2.2 GB), which brewjax never imports.
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps google-jetstream
	@touch $@

.venv-beam/installed: pyproject.toml constraints-beam.txt
	test -x $(BEAM)/python || $(PYTHON) -m venv .venv-beam
	$(BEAM)/pip install --quiet --disable-pip-version-check --constraint constraints-beam.txt --editable '.[beam]'
	@touch $@

# protoc alone, as old as Beam's: the generated modules must be readable there too.
.venv-proto/installed: constraints-beam.txt
	test -x .venv-proto/bin/python || $(PYTHON) -m venv .venv-proto
	.venv-proto/bin/pip install --quiet --disable-pip-version-check --constraint constraints-beam.txt grpcio-tools
	@touch $@
