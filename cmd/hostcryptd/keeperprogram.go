package main

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// A program is a copy of an executable file in memory that nobody can change,
// locked there.
type program struct {
	f    *os.File
	size int
	mem  []byte // the mapping that locks it
}

// installedAs is the path that a process was started from, which may hold another
// program by now. argv[0] may be no path: systemd-shutdown wants an @ there.
func installedAs() string {
	path, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(path, " (deleted)")
}

// copyProgram copies a program to memory that nobody can change, and locks it
// there.
func copyProgram(name string) (_ *program, err error) {
	src, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate("hostcryptd", flags|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate("hostcryptd", flags)
	}
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "hostcryptd")
	defer f.Close()
	n, err := io.Copy(f, src)
	if err != nil {
		return nil, err
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return nil, err
	}
	// A descriptor that is open for writing can't be executed.
	ro, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return nil, err
	}
	p := &program{f: ro, size: int(n)}
	p.lock()
	return p, nil
}

// interpreter is the program that the kernel has to load in order to start this one,
// and "" if there is none. The copy in memory doesn't hold it, nor what it loads.
func (p *program) interpreter() string {
	f, err := elf.NewFile(p.f)
	if err != nil {
		return ""
	}
	for _, part := range f.Progs {
		if part.Type != elf.PT_INTERP || part.Filesz > unix.PathMax {
			continue
		}
		name, _ := io.ReadAll(part.Open())
		return strings.TrimRight(string(name), "\x00")
	}
	return ""
}

// lock keeps a program in memory, as long as this process doesn't execute
// another. That it may not is said by Mlockall.
func (p *program) lock() {
	if b, err := unix.Mmap(int(p.f.Fd()), 0, p.size, unix.PROT_READ, unix.MAP_SHARED); err == nil {
		_ = unix.Mlock(b)
		p.mem = b
	}
}

func (p *program) close() {
	if p.mem != nil {
		_ = unix.Munmap(p.mem)
	}
	p.f.Close()
}

// memoryFile returns a file in memory that holds b.
func memoryFile(name string, b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.WriteAt(b, 0); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// readMemoryFile returns what memoryFile was given.
func readMemoryFile(f *os.File) ([]byte, error) {
	return io.ReadAll(io.NewSectionReader(f, 0, 16*maxKeeperMessage))
}
