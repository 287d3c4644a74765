# Copyright The podgate Authors
# SPDX-License-Identifier: Apache-2.0

# `build`, `test`, `test-unit`, `demo` and `bench` need Go and make only: the
# eBPF objects are committed.

GO        ?= go
BPF_CLANG ?= clang-19
BPF_STRIP ?= llvm-strip-19
CLANG_FORMAT ?= clang-format-19

VERSION ?= $(shell cat VERSION)
BIN     ?= bin
# The image, and the time of everything in it.
IMAGE   ?= ghcr.io/podgate/podgate:$(VERSION)
SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)
GOBUILD  = $(GO) build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)'

# Flags for `go test`, for example TESTFLAGS='-run Fragment -v'.
TESTFLAGS  ?= -timeout 30m
BENCHFLAGS ?=
E2EFLAGS   ?=
SCALEFLAGS ?=

# What makes the image and the manifests, tests that link other evaluators of policy or speak to a
# container runtime: what they require stays out of our go.mod.
MODULES  = . $(patsubst %/go.mod,%,$(wildcard install/*/go.mod test/*/go.mod))
C_FILES  = $(shell find bpf test -name '*.[ch]')
LINT     = $(GO) tool -modfile=$(CURDIR)/.ci/tools/go.mod golangci-lint

# Static binaries, and no C compiler needed to build or test.
export CGO_ENABLED = 0

.DEFAULT_GOAL := help
.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## put podgate, podgate-cni and podgate-ipam in bin/
	$(GOBUILD) -o $(BIN)/podgate-cni ./plugin
	$(GOBUILD) -o $(BIN)/podgate ./cmd/podgate
	ln -f $(BIN)/podgate-cni $(BIN)/podgate-ipam

# Nothing of this machine is in it: the same sources and the same Go make the
# same image.
.PHONY: image
image: ## a container image for amd64 and arm64, in bin/image.tar and bin/image
	@set -e; for arch in amd64 arm64; do \
		GOOS=linux GOARCH=$$arch GOAMD64=v1 GOARM64=v8.0 GOFLAGS= GOEXPERIMENT= \
			$(MAKE) --no-print-directory build BIN=$(BIN)/linux-$$arch; \
	done
	$(GO) -C install/image run . -name '$(IMAGE)' -version '$(VERSION)' -epoch '$(SOURCE_DATE_EPOCH)' \
		-revision '$(shell git rev-parse HEAD 2>/dev/null)' \
		-source '$(CURDIR)' -binaries '$(abspath $(BIN))' -out '$(abspath $(BIN))' $(IMAGEFLAGS)

.PHONY: image-push
image-push: ## push that image: make image-push IMAGE=registry/name:tag
	$(MAKE) --no-print-directory image IMAGEFLAGS=-push

.PHONY: demo
demo: build root ## policy on real pods, step by step (as root)
	$(GO) run ./test/demo

.PHONY: test
test: root ## all tests (as root)
	@set -e; for module in $(MODULES); do \
		echo "$(GO) -C $$module test $(TESTFLAGS) ./..."; \
		$(GO) -C $$module test $(TESTFLAGS) ./...; \
	done

.PHONY: test-unit
test-unit: ## the tests that need no root; the others skip themselves
	$(GO) test $(TESTFLAGS) ./...

# What needs no kernel of its own, under qemu-user: it knows the system calls of
# programs, not those of eBPF or mounts. Nobody is root in there.
.PHONY: test-arm64
test-arm64: ## tests that need no root, built for arm64, under qemu-user
	GOARCH=arm64 $(GO) test -trimpath -exec 'unshare --user --map-user=1 --map-group=1 qemu-aarch64-static' $(TESTFLAGS) \
		./bpf/policy ./bpf/flow ./conf ./install/... ./ipam-hooks ./pinning/... ./plugin \
		./syncd/inventory ./syncd/manifest ./syncd/source

# What has goroutines of its own. The detector wants a C compiler.
.PHONY: test-race
test-race: root ## the daemon's tests under the race detector (as root)
	CGO_ENABLED=1 $(GO) test -race $(TESTFLAGS) ./syncd/... ./cmd/podgate ./pinning

.PHONY: test-kernels
test-kernels: ## the tests that load eBPF, on kernels 5.10 to 6.18 in virtual machines
	TESTFLAGS='$(TESTFLAGS)' test/kernels/run $(KERNELS)

# E2EFLAGS='-v -run TestNFTables/Corner' runs one suite.
.PHONY: test-e2e
test-e2e: root e2e-build ## a Kubernetes cluster, upstream's tests on it (as root, takes hours)
	PODGATE_E2E=1 $(GO) -C test/e2e test -count=1 -timeout 10h $(E2EFLAGS) .

.PHONY: e2e-build
e2e-build: ## build the programs of that cluster into a cache (half an hour, once)
	$(GO) -C test/e2e run ./cmd/cluster -build

.PHONY: cluster
cluster: root e2e-build ## a Kubernetes cluster with podgate, to look at (as root)
	$(GO) -C test/e2e run ./cmd/cluster

.PHONY: bench
bench: root ## benchmarks, against floors measured in the same run (as root)
	$(GO) test -run '^$$' -bench . -benchtime 1x -timeout 30m $(BENCHFLAGS) ./test/bench

# SCALEFLAGS='-pods 30000 -churn 10s' runs one size, for less long.
.PHONY: scale
scale: root ## play clusters of up to 150,000 pods to one daemon (as root)
	$(GO) -C test/scale run . -out $(CURDIR)/docs/scale $(SCALEFLAGS)

.PHONY: root
root:
	@test "$$(id -u)" = 0 || { \
		echo "'make $(MAKECMDGOALS)' makes network namespaces and loads eBPF: run it as root."; \
		echo "'make test-unit' needs no root."; \
		exit 1; } >&2

.PHONY: lint
lint: ## golangci-lint, import rules, clang-format
	@set -e; for module in $(MODULES); do \
		echo "golangci-lint: $$module"; \
		(cd $$module && $(LINT) run --config $(CURDIR)/.golangci.yml ./...); \
	done
	$(CLANG_FORMAT) --dry-run -Werror $(C_FILES)

.PHONY: format
format: ## rewrite sources as lint wants them
	@set -e; for module in $(MODULES); do \
		(cd $$module && $(LINT) fmt --config $(CURDIR)/.golangci.yml ./...); \
	done
	$(CLANG_FORMAT) -i $(C_FILES)

.PHONY: generate
generate: ## compile bpf/*.c and generate the Go side of it
	BPF2GO_CC=$(BPF_CLANG) BPF2GO_STRIP=$(BPF_STRIP) \
	BPF2GO_CFLAGS="-I/usr/include/$$(uname -m)-linux-gnu" $(GO) generate ./...

.PHONY: manifests
manifests: ## make the files for kubectl apply from the Helm chart
	$(GO) -C install/kubernetes run .

.PHONY: check-generated
check-generated: ## fail if the generated files are not what generate makes
	@old=$$(mktemp -d); trap 'rm -rf "$$old"' EXIT; set -e; \
	find . -name '*_bpfel.*' -exec cp --parents -t "$$old" {} +; \
	$(MAKE) --no-print-directory generate; \
	find . -name '*_bpfel.*' | while read -r file; do diff -u "$$old/$$file" "$$file"; done
