# husk: `make run` shows one container in its own microVM, `make test` checks everything.
# Both install what they need on a Debian 12 machine, as root, the first time.

# Where rustup puts cargo on a machine that got Rust a moment ago.
export PATH := $(PATH):$(HOME)/.cargo/bin

PREFIX ?= /usr/local

.DEFAULT_GOAL := help
.PHONY: help run test fuzz bench testbed build install image deps clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: build ## Build all and run a container in a microVM: its output, both kernels, where the time went
	tests/scripts/run

test: deps ## Everything: lints, unit tests, guest kernel, end-to-end suites on containerd 1.7 and 2.1
	tests/scripts/test

fuzz: deps ## Fuzz what strangers send for an hour (SECONDS=N, TARGETS="image_name layer"); what is found of new inputs stays in target/fuzz
	nice -n 19 tests/scripts/fuzz $(or $(SECONDS),3600) $(TARGETS)

bench: build ## Measure husk beside runc, crun and runsc in one testbed run, and pulls beside skopeo and containerd; writes target/bench*.json
	tests/scripts/bench

testbed: build ## A shell on the testbed's host, with husk in its PATH
	tests/testbed/shell

build: deps ## Guest kernel, initramfs, VMM, shim and the husk command, laid out in target/testbed/payload
	tests/scripts/payload

install: build ## Install husk below PREFIX (/usr/local); containerd finds the shim by its name
	install -D -m 755 target/testbed/payload/bin/containerd-shim-husk-v2 $(DESTDIR)$(PREFIX)/bin/containerd-shim-husk-v2
	install -D -m 755 target/testbed/payload/bin/husk $(DESTDIR)$(PREFIX)/bin/husk
	install -D -m 755 target/testbed/payload/bin/husk-oci $(DESTDIR)$(PREFIX)/bin/husk-oci
	install -D -m 755 target/testbed/payload/lib/husk/husk-vmm $(DESTDIR)$(PREFIX)/lib/husk/husk-vmm
	install -D -m 644 target/testbed/payload/lib/husk/vmlinux $(DESTDIR)$(PREFIX)/lib/husk/vmlinux
	install -D -m 644 target/testbed/payload/lib/husk/initramfs.cpio $(DESTDIR)$(PREFIX)/lib/husk/initramfs.cpio

image: build ## The image of the Kubernetes installer (docs/kubernetes.md): target/husk-installer.tar
	tests/scripts/image

deps: ## Install what building needs (as root, once)
	@tests/scripts/deps

clean: ## Remove what was built here; the cache in ~/.cache/husk stays
	rm -rf target
