// Package vm runs hostcryptd in a real Linux kernel: Debian's cloud kernel in
// QEMU with plain emulation (TCG), so neither /dev/kvm nor root is needed.
//
// The scenarios are behind the build tag vm, because they take minutes and
// download a kernel on their first run; a test that is asked for and cannot
// run fails, it never skips:
//
//	go test -tags vm -count=1 -timeout 20m ./test/vm -v -run 'TestVM/Boot'
//
// The parts:
//
//   - vmtest fetches the kernel, builds the initramfs and owns QEMU.
//   - guest is the program that runs as PID 1 in the virtual machine.
//   - report is what the guest says to the host, as JSON lines.
//   - evidence searches raw disks for plaintext and measures randomness.
//   - demo tells the main job of hostcryptd in plain words, in a virtual
//     machine or, where that is possible, on the kernel of this host.
//
// README.md says how to run one scenario, keep what it left behind and repeat
// it by hand.
package vm
