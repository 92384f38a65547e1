package main

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// lockMemory keeps in memory this program, all of it, and whatever this process
// has touched or will touch.
//
// MCL_CURRENT without MCL_ONFAULT would also fill what Go has mapped and doesn't
// use: 84 MB in place of some 30, more than the kernel has to spare that runs
// after a crash.
func lockMemory() error {
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		return os.NewSyscallError("mlockall", err)
	}
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(maps)) {
		// "00400000-00c5f000 r-xp 00000000 fe:00 1234   /usr/sbin/hostcryptd"
		if !strings.HasSuffix(strings.TrimSpace(line), " "+program) {
			continue
		}
		var from, to uintptr
		if _, err := fmt.Sscanf(line, "%x-%x", &from, &to); err != nil {
			return fmt.Errorf("/proc/self/maps: %q: %w", line, err)
		}
		if _, _, errno := unix.Syscall(unix.SYS_MLOCK, from, to-from, 0); errno != 0 {
			return os.NewSyscallError("mlock", errno)
		}
	}
	return nil
}
