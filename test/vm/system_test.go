//go:build vm

package vm

import (
	"path/filepath"
	"testing"
	"time"

	"hostcryptd/test/vm/report"
	"hostcryptd/test/vm/vmtest"
)

// A systemLab boots machines whose PID 1 is systemd.
type systemLab struct {
	*lab
	system *vmtest.System
}

// systems returns the lab's root file system with systemd, which the first call
// builds unless the cache has it.
func (l *lab) systems(t *testing.T) *systemLab {
	t.Helper()
	if l.system == nil {
		s, err := l.System(t.Context(), t.Logf)
		if err != nil {
			t.Fatal(err)
		}
		l.system = s
	}
	return &systemLab{l, l.system}
}

// root makes a root file system for one scenario.
func (l *systemLab) root(t *testing.T, name string) vmtest.Disk {
	t.Helper()
	d, err := l.system.NewRoot(filepath.Join(l.Dir, name+"-root.img"))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// sparse makes an empty disk.
func (l *systemLab) sparse(t *testing.T, serial string, size int64) vmtest.Disk {
	t.Helper()
	d := vmtest.Disk{Serial: serial, Path: filepath.Join(l.Dir, t.Name()[len("TestVM/"):]+"-"+serial+".img")}
	if err := vmtest.Sparse(d.Path, size); err != nil {
		t.Fatal(err)
	}
	return d
}

// bootSystem boots a machine with systemd, runs the scenario in it and waits
// until it has powered itself off in order.
func (l *systemLab) bootSystem(t *testing.T, b vmtest.SystemBoot) *vmtest.Result {
	t.Helper()
	b.OnEvent = func(e report.Event) { t.Log(e) }
	r, err := l.system.Boot(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func testSystemBoot(t *testing.T, l *systemLab) {
	begun := time.Now()
	root := l.root(t, "system-boot")
	r := l.bootSystem(t, vmtest.SystemBoot{Scenario: "system-boot", Disks: []vmtest.Disk{root}})
	l.row("SystemdBoot", time.Since(begun), r)
}
