# Targets are documented by the ## after them; 'make help' lists those.

GO          ?= go
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
VERSION     := $(shell git describe --tags --always --dirty 2>/dev/null)
LDFLAGS     := -X main.linkedVersion=$(VERSION)
DESTDIR     ?=
PREFIX      ?= /usr
FUZZTIME    ?= 20s
PKG         ?= ./...
RUN         ?=
BIN         ?= bin/hostcryptd

# What building and testing takes, by Debian's package names. Go itself is not
# among them: Debian 12 has an older one than go.mod asks for.
DEPS := gcc libc6-dev git ca-certificates \
	qemu-system-x86 qemu-utils libnbd-bin nbdfuse nbdkit cryptsetup-bin dmsetup fio \
	e2fsprogs xfsprogs util-linux fdisk mount kmod xz-utils cpio \
	iproute2 man-db mandoc systemd mmdebstrap shellcheck openssl qemu-user-static swtpm swtpm-tools tpm2-tools

export CGO_ENABLED ?= 0

.DEFAULT_GOAL := build

help: ## list the targets
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

build: ## build bin/hostcryptd, a static binary
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/hostcryptd ./cmd/hostcryptd

deps: ## install with apt what building and testing takes (needs root), or say what is missing
	@have=$$(dpkg-query -W -f '$${db:Status-Status}, $${Package}, $${Provides}\n' | sed -n 's/^installed, //p' | tr ',' '\n' | sed 's/ *(.*//; s/ //g'); \
	missing=$$(for p in $(DEPS); do echo "$$have" | grep -qxF -- $$p || echo $$p; done); \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ]; then echo "missing packages; as root: apt-get install --no-install-recommends" $$missing >&2; exit 1; fi; \
	echo "installing" $$missing; \
	export DEBIAN_FRONTEND=noninteractive; \
	apt-get update -qq && apt-get -o DPkg::Lock::Timeout=300 install -qq -y --no-install-recommends $$missing >/dev/null

demo: deps build ## show the main job on real data, in a virtual machine or on this kernel
	@HOSTCRYPTD_BIN=$(CURDIR)/bin/hostcryptd $(GO) run ./test/vm/demo

test: deps check test-unit test-vm ## run every test; CI runs this

check: ## gofmt, vet, staticcheck and generated files
	@bad=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$bad" ] || { echo "not gofmt'ed:" $$bad >&2; exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags vm ./...
	GOARCH=arm64 $(GO) vet ./...
	$(GO) mod tidy -diff
	$(GO) run $(STATICCHECK) -tags vm ./...
	@$(MAKE) --no-print-directory check-generate

test-unit: ## unit tests with the race detector, and interop with other people's tools
	CGO_ENABLED=1 GORACE='atexit_sleep_ms=10' $(GO) test -race -timeout 15m ./...
	$(GO) test -tags purego ./xts
	GOARCH=arm64 HOSTCRYPTD_MUST_RUN=xts $(GO) test -exec qemu-aarch64-static ./xts/...

test-vm: build ## boot QEMU with a real kernel and run the scenarios; RUN=Boot for one
	HOSTCRYPTD_BIN=$(CURDIR)/bin/hostcryptd $(GO) test -tags vm -count 1 -timeout 45m -v -run '$(if $(RUN),TestVM/$(RUN)$$,.)' ./test/vm

soak: build ## the long runs: a disk that stalls for a minute, 50 power cuts, random operations, 5 minutes without the vault at boot, systemd on Linux 6.1, 10 minutes of swapping
	HOSTCRYPTD_STALL=60s $(GO) test -count 1 -run 'StalledDevice$$' ./nbd
	HOSTCRYPTD_BIN=$(CURDIR)/bin/hostcryptd HOSTCRYPTD_VM_CYCLES=50 HOSTCRYPTD_VM_STRESS=5m HOSTCRYPTD_VM_OUTAGE=5m $(GO) test -tags vm -count 1 -timeout 3h -v -run 'TestVM/(PowerCut|HeaderPowerCut|LogWrites|Stress|Outage)$$' ./test/vm
	HOSTCRYPTD_BIN=$(CURDIR)/bin/hostcryptd HOSTCRYPTD_VM_KERNEL=6.1 $(GO) test -tags vm -count 1 -timeout 30m -v -run 'TestVM/(Watchdog|Logs)$$' ./test/vm
	for k in 6.12 6.1; do HOSTCRYPTD_BIN=$(CURDIR)/bin/hostcryptd HOSTCRYPTD_VM_KERNEL=$$k HOSTCRYPTD_VM_SWAP_PERCENT=200 HOSTCRYPTD_VM_SWAP_SECONDS=600 $(GO) test -tags vm -count 1 -timeout 60m -v -run 'TestVM/Swap$$' ./test/vm || exit 1; done

fuzz: ## run each fuzz target of PKG (./...) for FUZZTIME (20s); an input that fails one stays in its testdata/fuzz, to be committed
	@for p in $$($(GO) list $(PKG)); do \
		for f in $$($(GO) test -list '^Fuzz' $$p | grep ^Fuzz); do \
			echo "== $$p $$f"; $(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) $$p || exit 1; \
		done; \
	done

bench: deps ## compare with other NBD servers, encrypted and not, on this machine
	$(GO) run ./test/bench

bench-profile: ## where the server's time goes, by perf (package linux-perf)
	$(GO) run ./test/bench -profile

bench-go: ## Go benchmarks of cipher, volume and server
	$(GO) test -run '^$$' -bench . -benchtime 300ms ./xts ./sector ./nbd

bench-xts: ## cipher speed on each tier, against the ceiling of the processor and against OpenSSL
	$(GO) run ./xts/internal/bench

generate: ## rewrite generated files: the assembly of xts, examples in FORMAT.md
	$(GO) generate ./...
	$(GO) test -run TestFormatExamples ./sector -update

check-generate: ## fail if generated files are not up to date
	@before=$$(git diff | sha256sum); $(MAKE) --no-print-directory generate >/dev/null; \
	[ "$$before" = "$$(git diff | sha256sum)" ] || { echo "'make generate' changed files:" >&2; git diff --stat >&2; exit 1; }

install: build ## install binary, manual, completions, units and udev rules under DESTDIR
	@[ "$(PREFIX)" = /usr ] || { echo "PREFIX=$(PREFIX): units and scripts call /usr/sbin/hostcryptd and read /usr/lib/hostcryptd, so it has to be /usr; nothing was installed (DESTDIR=DIR installs below DIR)" >&2; exit 1; }
	install -D -m 755 $(BIN) $(DESTDIR)$(PREFIX)/sbin/hostcryptd
	rm -f $(DESTDIR)$(PREFIX)/share/man/man8/hostcryptd-*.8 # earlier versions had a page for each command
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/man/man8 cmd/hostcryptd/hostcryptd.8
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/man/man5 cmd/hostcryptd/hostcrypttab.5
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/lib/systemd/system systemd/hostcryptd@.service systemd/hostcryptd-dial.service systemd/hostcryptd.target systemd/system-hostcryptd.slice
	install -d -m 755 $(DESTDIR)$(PREFIX)/lib/systemd/system-generators
	ln -sf ../../../sbin/hostcryptd $(DESTDIR)$(PREFIX)/lib/systemd/system-generators/hostcryptd-generator
	install -D -m 755 systemd/hostcryptd.shutdown $(DESTDIR)$(PREFIX)/lib/systemd/system-shutdown/hostcryptd
	install -D -m 644 systemd/hostcryptd.rules $(DESTDIR)$(PREFIX)/lib/udev/rules.d/90-hostcryptd.rules
	install -D -m 644 systemd/hostcryptd.conf $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/hostcryptd.conf
	install -d -m 700 $(DESTDIR)/etc/hostcryptd $(DESTDIR)/etc/hostcryptd/pins
	install -D -m 644 systemd/initrd/initrd.sh $(DESTDIR)$(PREFIX)/lib/hostcryptd/initrd.sh
	install -D -m 755 systemd/initrd/initramfs-hook $(DESTDIR)$(PREFIX)/share/initramfs-tools/hooks/hostcryptd
	install -D -m 644 systemd/initrd/initramfs-conf $(DESTDIR)$(PREFIX)/share/initramfs-tools/conf-hooks.d/zz-hostcryptd
	install -D -m 755 systemd/initrd/initramfs-local-top $(DESTDIR)$(PREFIX)/share/initramfs-tools/scripts/local-top/hostcryptd
	install -D -m 755 systemd/initrd/dracut-module-setup.sh $(DESTDIR)$(PREFIX)/lib/dracut/modules.d/95hostcryptd/module-setup.sh
	install -m 755 systemd/initrd/dracut-hook.sh $(DESTDIR)$(PREFIX)/lib/dracut/modules.d/95hostcryptd/hostcryptd.sh
	install -m 755 systemd/initrd/dracut-cmdline.sh $(DESTDIR)$(PREFIX)/lib/dracut/modules.d/95hostcryptd/hostcryptd-cmdline.sh
	install -m 755 systemd/initrd/dracut-online.sh $(DESTDIR)$(PREFIX)/lib/dracut/modules.d/95hostcryptd/hostcryptd-online.sh
	install -m 755 systemd/initrd/dracut-finished.sh $(DESTDIR)$(PREFIX)/lib/dracut/modules.d/95hostcryptd/hostcryptd-finished.sh
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions $(DESTDIR)$(PREFIX)/share/zsh/site-functions $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	$(BIN) completion bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/hostcryptd
	$(BIN) completion zsh > $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_hostcryptd
	$(BIN) completion fish > $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/hostcryptd.fish

uninstall: build ## remove what install puts there; /etc/hostcryptd and /etc/hostcrypttab stay
	@dest=$$(realpath '$(DESTDIR)/') && list=$$(mktemp -d) && trap 'rm -rf "$$list"' EXIT && \
	$(MAKE) --no-print-directory -s -o build install BIN='$(BIN)' DESTDIR="$$list" && cd "$$list" && \
	find . ! -type d -exec sh -c 'for f; do rm -fv "$$0/$$f"; done' "$$dest" {} + && \
	for d in hostcryptd dracut/modules.d/95hostcryptd; do [ ! -d "$$dest/usr/lib/$$d" ] || rmdir "$$dest/usr/lib/$$d"; done

clean: ## remove what was built
	rm -rf bin

.PHONY: help build deps demo test check test-unit test-vm soak fuzz bench bench-profile bench-go bench-xts generate check-generate install uninstall clean
