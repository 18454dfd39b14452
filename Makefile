# `make help` lists the targets.

GO         ?= go
PREFIX     ?= /usr/local
BIN        ?= bin/cnbd
SYSCONFDIR ?= /etc
# A release is a tag vX.Y.Z; what lies behind one has the number of commits behind it.
VERSION    ?= $(shell scripts/version.sh)
LDFLAGS    ?= -s -w
# How often the counts of `make test` are done by `make test-long`.
SCALE   ?= 100

.PHONY: help build install pages package test-package setup debian13 test test-long test-vm lint fuzz bench bench-compare bench-peers cover clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 15

build: ## build the static program BIN, bin/cnbd (GOARCH=arm64 for another machine)
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS) -X main.version=$(VERSION)' -o $(BIN) ./cmd/cnbd

install: build pages ## install program, man pages, completions and units below PREFIX (default /usr/local) and DESTDIR
	@BIN='$(BIN)' DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' SYSCONFDIR='$(SYSCONFDIR)' scripts/install.sh

pages: ## man pages and completions, from the commands, in build/pages
	@VERSION='$(VERSION)' GO='$(GO)' scripts/pages.sh

package: ## .deb and .rpm for amd64 and arm64 in build/package
	@VERSION='$(VERSION)' GO='$(GO)' LDFLAGS='$(LDFLAGS)' scripts/package.sh

test-package: setup package ## look at the packages, and install, remove and purge the .deb in a tree of Debian (root)
	@VERSION='$(VERSION)' scripts/testpackage.sh

setup: ## install the tools that tests use, where missing
	@scripts/setup.sh

debian13: ## a tree of Debian 13 in build/debian13, for a test with its newer libnbd (root)
	@scripts/debian13.sh

test: setup build ## all checks and tests (PACKAGES=./store/... STAGES="plain race fuzz" to choose)
	@scripts/test.sh

test-long: setup build ## the same with full counts, for a night (SCALE=100 FUZZTIME=2m)
	@CNBD_TEST_SCALE=$${CNBD_TEST_SCALE:-$(SCALE)} FUZZTIME=$${FUZZTIME:-2m} TEST_TIMEOUT=$${TEST_TIMEOUT:-12h} scripts/test.sh
	@$(MAKE) test-package

test-vm: package ## tests in a virtual machine with Debian's kernel and systemd, in software emulation (root; RUN=regexp)
	@scripts/vm-image.sh
	CNBD_VM=$(CURDIR)/build/vm CNBD_DEB=$(CURDIR)/build/package/cnbd_$(VERSION)-1_amd64.deb $(GO) test -count=1 -timeout 4h -v -run '$(or $(RUN),.)' ./test/vm

lint: ## gofmt, vet, staticcheck and the rules of internal/lint
	@test -z "$$(gofmt -l .)" || { gofmt -d .; exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	$(GO) test ./internal/lint

fuzz: ## every fuzz target for FUZZTIME each (default 1m)
	@FUZZTIME=$${FUZZTIME:-1m} scripts/fuzz.sh $(PACKAGES)

bench: ## the benchmarks beside the code (BENCH=regexp to choose)
	$(GO) test -run '^$$' -bench '$(or $(BENCH),.)' -benchmem ./...

bench-compare: ## those of revision BASE beside those of the working tree, by benchstat (BENCH, PACKAGES, COUNT)
	@GO='$(GO)' BASE='$(BASE)' BENCH='$(BENCH)' PACKAGES='$(PACKAGES)' COUNT='$(COUNT)' bench/compare.sh

bench-peers: build ## cnbd beside nbdkit, qemu-nbd and Btrfs (root; ARGS, see bench/README.md)
	@bench/setup.sh
	@bench/peers.py --cnbd bin/cnbd $(ARGS)

cover: ## test coverage of each function, all packages together
	@mkdir -p build
	$(GO) test -coverpkg=./... -coverprofile=build/cover.out ./...
	$(GO) tool cover -func build/cover.out
	$(GO) tool cover -html build/cover.out -o build/cover.html

clean: ## remove what was built
	rm -rf bin build
