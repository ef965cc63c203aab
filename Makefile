SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# Outside the clone: a second clone, or the next CI run, finds what this one built.
CACHE := $(or $(COFFER_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/coffer)

# One place for everything that make writes into the clone.
BIN    := build/bin
TOOLS  := build/tools
IMAGES := build/images
HOST   := build/host

CGO_COMMANDS := coffer-gpu-nvidia coffer-keystore-pkcs11
COMMANDS     := $(filter-out $(CGO_COMMANDS),$(notdir $(patsubst %/,%,$(dir $(wildcard cmd/*/main.go)))))

# The integration tests find what they run through these; Go's test cache sees their values.
export COFFER_BIN    := $(CURDIR)/$(BIN)
export COFFER_TOOLS  := $(CURDIR)/$(TOOLS)
export COFFER_IMAGES := $(CURDIR)/$(IMAGES)

SETUP := mkdir -p $(HOST) && go build -o $(HOST)/setup ./tools/setup && $(HOST)/setup -cache '$(CACHE)' -link $(TOOLS)

.PHONY: help
help: ## show what make can do
	@echo 'coffer runs training jobs whose weights, data and checkpoints stay sealed to everyone but an attested job.'
	@echo
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | column -t -s $$'\t'
	@echo
	@echo '  cache: $(CACHE)'

.PHONY: deps
deps: ## install Debian packages if any are missing (as root), build containerd and gVisor
	@$(SETUP) packages containerd runsc

.PHONY: build
build: ## build coffer's programs into build/bin
	@mkdir -p $(BIN)
	@start=$$SECONDS; \
	for command in $(COMMANDS); do packages+=(./cmd/$$command); done; \
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags='-s -w' -o $(BIN)/ "$${packages[@]}"; \
	for command in $(CGO_COMMANDS); do \
	  CGO_ENABLED=1 go build -trimpath -buildvcs=false -ldflags='-s -w -extldflags=-Wl,-z,lazy' -o $(BIN)/ ./cmd/$$command; \
	done; \
	echo "built $$(ls $(BIN) | wc -l) programs in $(BIN), $$((SECONDS - start)) s"

# A job's program is a layer over the cached system layer, so changing one costs a second.
IMAGE := mkdir -p $(HOST) && go build -o $(HOST)/images ./images/build && $(HOST)/images -cache

.PHONY: images image-numpy image-torch
images: image-numpy image-torch ## build the training images (numpy, torch) from Debian packages
image-numpy: deps
	@$(IMAGE) '$(CACHE)' -out $(IMAGES) -add examples/fashion-mnist-numpy/train.py:/app/train.py -add examples/resume/train.py:/app/resume.py numpy
image-torch: deps
	@$(IMAGE) '$(CACHE)' -out $(IMAGES) -add examples/fashion-mnist/train.py:/app/train.py torch

.PHONY: images-verify
images-verify: deps ## build the numpy image twice from nothing and compare the digests
	@rm -rf build/verify
	@$(IMAGE) '$(CACHE)/verify-1' -out build/verify/1 numpy
	@$(IMAGE) '$(CACHE)/verify-2' -out build/verify/2 numpy
	@cmp build/verify/1/numpy.tar build/verify/2/numpy.tar && echo 'two builds, one image'
	@rm -rf build/verify '$(CACHE)/verify-1' '$(CACHE)/verify-2'

.PHONY: demo
demo: deps build image-torch ## run a sealed training job and three attacks on this machine, from nothing (as root)
	@COFFER_CACHE='$(CACHE)' examples/demo.sh

.PHONY: lint
lint: ## run go vet and golangci-lint
	@$(SETUP) golangci-lint
	@go vet ./...
	@$(TOOLS)/golangci-lint run ./...

.PHONY: check
check: lint ## vet, linters and unit tests, without what needs root
	@go test -short ./...

# These run programs and images, which Go's test cache knows nothing of: they always run. The first watch from outside
# programs that are built without the race detector, which would only slow the watching.
MODULE      := github.com/coffer-run/coffer
OUTSIDE     := $(MODULE)/(internal/e2e|internal/stack|cmd/coffer)
INTEGRATION := $(MODULE)/(runner/sandbox|runner/egress|enclave/hold|plugins/host)

# What these put together has met the race detector in its own packages.
PROGRAMS := $(MODULE)/cmd/.*

# Judging is arithmetic: nearly all of attest runs in one goroutine. What turns every bit of a report, or goes through a
# long table of attacks one after the other, runs once without the race detector, which is ten times slower.
JUDGES  := $(MODULE)/attest/.*
ONE_BY_ONE := ^Test(Mutations|LiesAbout|Later|Flips|EveryFlip|Tamper|LyingAgent|HonestAgent|StoppedJobs|CarriedEndorsements|ReleaseAttacks|OwnersAreBounded|Approval|Principals|Revoke)

.PHONY: test
test: deps build images lint ## everything: vet, linters, unit tests, and integration tests on real parts (as root)
	@go test -timeout 20m ./attest/...
	@go test -race -short -timeout 20m -skip '$(ONE_BY_ONE)' ./attest/...
	@go test -race -timeout 20m $$(go list ./... | grep -vxE '$(OUTSIDE)|$(INTEGRATION)|$(JUDGES)|$(PROGRAMS)')
	@go test -timeout 20m $$(go list ./... | grep -xE '$(PROGRAMS)' | grep -vxE '$(OUTSIDE)')
	@go test -race -timeout 20m -count=1 $$(go list ./... | grep -xE '$(INTEGRATION)')
	@go test -timeout 20m -count=1 -parallel 3 $$(go list ./... | grep -xE '$(OUTSIDE)')
	@cd tools/gvisor && CGO_ENABLED=0 GOFLAGS= go test -trimpath ./sink

.PHONY: counts
counts: ## count the real evidence that the tests verify, and the changes to evidence that they see refused
	@go test -count=1 -timeout 20m -v ./attest/... | sed -nE 's/^ +[a-z_]+\.go:[0-9]+: ((vectors|mutations) of )/\1/p'

.PHONY: fuzz
fuzz: ## run every fuzz target for TIME (125s each, one after the other)
	@{ grep -roHE '^func Fuzz[A-Za-z0-9_]+' --include='*_test.go' attest enclave internal plugins runner || true; } | sort | while IFS=: read -r file target; do \
	  echo "$$(dirname "$$file") $${target#func }"; \
	  go test -run '^$$' -fuzz "^$${target#func }\$$" -fuzztime '$(or $(TIME),125s)' -fuzzminimizetime 10x "./$$(dirname "$$file")" | sed -uE '/^fuzz: elapsed/d'; \
	done

.PHONY: tamper
tamper: ## edit each field of a record, see which edits are found, and write the tables in docs/tamper.md (some minutes)
	@go test -count=1 -timeout 20m -run '^TestTamperCorpus$$' ./attest/bundle/verify -update

.PHONY: reproducible
reproducible: ## build coffer-verify twice, in two folders, and compare the digests
	@go test -count=1 -v -run '^TestReproducible$$' ./cmd/coffer-verify -reproducible | sed -nE 's/^ +[a-z_]+\.go:[0-9]+: //p; /^(FAIL|---)/p'

.PHONY: pictures
pictures: deps ## take the pictures of the report in docs/images with Chromium
	@go test -count=1 -run '^TestReportInBrowser$$' ./cmd/coffer-verify -screenshots $(CURDIR)/docs/images

.PHONY: bench
bench: deps build image-numpy ## measure coffer against what its work must cost at least, into build/bench.json
	@mkdir -p build
	@COFFER_BENCH=$(CURDIR)/build/bench.json go test -count=1 -timeout 20m -v -run '^TestGoals$$' ./internal/bench | sed -uE '/^(=== |PASS|ok|    --- PASS|--- PASS)/d'

.PHONY: soak
soak: deps build image-numpy ## run 200 jobs while their surroundings are killed and the disk fills (as root, some minutes)
	@COFFER_SOAK=$(or $(JOBS),200) go test -count=1 -timeout 15m -v -run '^TestSoak$$' ./internal/e2e

.PHONY: generate
generate: ## regenerate the code and the OpenAPI documents of the .proto files (they are committed)
	@mkdir -p $(HOST)
	@go -C tools/generate build -trimpath -ldflags='-s -w' -o ../../$(HOST)/ tool
	@export PATH="$$PWD/$(HOST):$$PATH"; \
	for dir in attest/api runner/api; do \
	  buf generate --config tools/generate/buf.yaml --template tools/generate/buf.gen.connect.yaml --path $$dir .; \
	done; \
	buf generate --config tools/generate/buf.yaml --template tools/generate/buf.gen.grpc.yaml --path plugins/contract .; \
	buf generate --config tools/generate/buf.yaml --template tools/generate/buf.gen.openapi.yaml --path attest/api --path runner/api .; \
	for api in agent broker verifier; do \
	  jq --from-file tools/generate/openapi/closed.jq docs/formats/$$api-openapi.json > $(HOST)/openapi.json; \
	  mv $(HOST)/openapi.json docs/formats/$$api-openapi.json; \
	done

.PHONY: clean
clean: ## remove build/; the cache stays
	@rm -rf build
