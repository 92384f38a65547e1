//go:build vm

package vm

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

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
	l.mu.Lock()
	defer l.mu.Unlock()
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

// bootSystem boots a machine with systemd, runs the scenario in it and waits
// until it has powered itself off in order.
func (l *systemLab) bootSystem(t *testing.T, b vmtest.SystemBoot) *vmtest.Result {
	t.Helper()
	c, err := l.system.Config(b)
	if err != nil {
		t.Fatal(err)
	}
	return run(t, c)
}

// tree makes a root file system in a folder, for as long as the test runs.
func (l *systemLab) tree(t *testing.T, files *vmtest.Image) *vmtest.RootTree {
	t.Helper()
	tree, err := l.system.NewTree(t.Context(), files)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tree.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	})
	return tree
}

// volumeDisks are the disks of a machine whose /var, swap and /data are volumes.
func (l *systemLab) volumeDisks(t *testing.T) []vmtest.Disk {
	return []vmtest.Disk{l.sparse(t, "var", 256<<20), l.sparse(t, "data", 64<<20), l.sparse(t, "swap", 64<<20), l.sparse(t, "tpm", 64<<20)}
}

// volumeFiles are what the administrator of such a machine has written. The key
// of data is in a vault that comes up late.
func volumeFiles() *vmtest.Image {
	f := vmtest.NewFiles()
	f.AddBytes("/etc/hostcrypttab", []byte(`# name device key options
var   UUID=11111111-1111-4111-8111-111111111111  /etc/hostcryptd/host.key  discard
data  /dev/disk/by-id/virtio-data  -  x-systemd.device-timeout=30,timeout=infinity
swap  /dev/disk/by-id/virtio-swap  /dev/urandom  swap
tpm   /dev/disk/by-id/virtio-tpm   -  nofail,attach=/dev/nbd0
`), 0o600)
	f.AddBytes("/etc/fstab", []byte(`/dev/hostcryptd/var  /var  ext4 defaults 0 2
/dev/hostcryptd/data /data ext4 defaults 0 2
/dev/hostcryptd/swap none  swap sw       0 0
/dev/nbd0            /tpm  ext4 nofail   0 2
`), 0o644)
	f.AddBytes("/etc/systemd/system/late-vault.service", []byte(`[Unit]
DefaultDependencies=no
[Service]
ExecStart=`+vmtest.SystemDir+`/guest late-vault
`), 0o644)
	f.AddSymlink("/etc/systemd/system/sysinit.target.wants/late-vault.service", "../late-vault.service")
	return f
}

// A volumeSystem is a machine with volumes in its tables, which SystemdBoot makes
// and Shutdown uses.
type volumeSystem struct {
	*systemLab
	begun  bool
	made   bool
	disks  []vmtest.Disk
	params map[string]string
}

// boot boots it with its tables.
func (s *volumeSystem) boot(t *testing.T, scenario string) *vmtest.Result {
	t.Helper()
	return s.bootSystem(t, vmtest.SystemBoot{Scenario: scenario, Params: s.params, Files: volumeFiles(), Disks: s.disks, TPM: s.tpm()})
}

func (s *volumeSystem) tpm() string { return filepath.Join(s.Dir, "tpm") }

// make runs SystemdBoot, once: a boot that makes the volumes, and one with them in its
// tables, at whose end they are in use.
func (s *volumeSystem) make(t *testing.T) {
	t.Helper()
	if s.made {
		return
	}
	if s.begun {
		t.Fatal("there is no machine: the scenario SystemdBoot failed")
	}
	s.begun = true
	begun := time.Now()
	s.params = map[string]string{"canary": newCanary()}
	s.disks = append(s.volumeDisks(t), s.root(t, "volumes"))
	first := s.bootSystem(t, vmtest.SystemBoot{Scenario: "system-prepare", Disks: s.disks, TPM: s.tpm()})
	second := s.boot(t, "system-volumes")
	s.made = true
	s.row("SystemdBoot", time.Since(begun), first, second)
}

// testShutdown looks at how it was powered off while /var couldn't be unmounted, and at
// the file systems at the next boot.
func testShutdown(t *testing.T, s *volumeSystem) {
	s.make(t)
	begun := time.Now()
	console, err := os.ReadFile(filepath.Join(s.Dir, "system-volumes.serial.log"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(console, []byte("Failed unmounting")) {
		t.Error("/var was unmounted before the last moment, so nothing was shown")
	}
	// Said by what runs last: all keys are wiped.
	if n := bytes.Count(console, []byte("is detached")); n != 4 {
		t.Errorf("%d volumes were detached after the last unmount, want 4", n)
	}
	after := s.boot(t, "system-after")
	s.row("Shutdown", time.Since(begun), after)
}

// formatHere formats the disk of a volume on this host, with a host key that it
// adds to the files of a machine.
func (l *systemLab) formatHere(t *testing.T, d vmtest.Disk, uuid string, files *vmtest.Image) {
	t.Helper()
	keyFile := d.Path + ".key"
	l.format(t, d.Path, keyFile, "--uuid", uuid, "--recovery-key", d.Path+".recovery")
	files.AddFile("/etc/hostcryptd/host.key", keyFile, 0o600)
}

// testWatchdog has the disk of a volume hang, and then its server, and all the while a
// flush of another volume.
func testWatchdog(t *testing.T, l *systemLab) {
	begun := time.Now()
	disks := []vmtest.Disk{l.sparse(t, "data", 64<<20), l.sparse(t, "held", 64<<20), l.root(t, "watchdog")}
	files := vmtest.NewFiles()
	l.formatHere(t, disks[0], "44444444-4444-4444-8444-444444444444", files)
	files.AddBytes("/etc/hostcrypttab", []byte(`data /dev/mapper/behind /etc/hostcryptd/host.key noauto,tmp=ext4
held /dev/mapper/held   /dev/urandom             noauto,tmp=ext4
`), 0o600)
	files.AddBytes("/etc/systemd/system/hostcryptd@data.service.d/watchdog.conf", []byte("[Service]\nWatchdogSec=8\n"), 0o644)
	r := l.bootSystem(t, vmtest.SystemBoot{Scenario: "system-watchdog", Files: files, Disks: disks})
	l.row("Watchdog", time.Since(begun), r)
}

// testLogs has a machine write logs and a core dump to /var, which is a volume,
// and searches its disks for what was in them; and then the same where /var is a
// plain file system.
func testLogs(t *testing.T, l *systemLab) {
	begun := time.Now()
	const uuid = "33333333-3333-4333-8333-333333333333"
	encrypted := []vmtest.Disk{l.sparse(t, "var", 256<<20), l.root(t, "logs")}
	params := map[string]string{"canary": newCanary()}
	files := vmtest.NewFiles()
	l.formatHere(t, encrypted[0], uuid, files)
	// The core dump as it is, so that it can be searched.
	files.AddBytes("/etc/systemd/coredump.conf", []byte("[Coredump]\nCompress=no\n"), 0o644)
	files.AddBytes("/etc/systemd/journald.conf", []byte("[Journal]\nStorage=persistent\nCompress=no\n"), 0o644)
	files.AddBytes("/etc/hostcrypttab", []byte("var UUID="+uuid+" /etc/hostcryptd/host.key tmp=ext4\n"), 0o600)
	files.AddBytes("/etc/fstab", []byte("/dev/hostcryptd/var /var ext4 defaults 0 2\n"), 0o644)
	first := l.bootSystem(t, vmtest.SystemBoot{Scenario: "system-logs", Params: params, Files: files, Disks: encrypted})
	bytes, hits := searchDisks(t, params["canary"], encrypted)
	if slices.Max(hits) > 0 {
		t.Errorf("on the raw disks the canaries are there %v times", hits)
	}

	plain := []vmtest.Disk{l.sparse(t, "plain", 256<<20), l.root(t, "logs-plain")}
	if _, err := vmtest.Run(t.Context(), "", "mkfs.ext4", "-q", plain[0].Path); err != nil {
		t.Fatal(err)
	}
	files.AddBytes("/etc/hostcrypttab", nil, 0o600)
	files.AddBytes("/etc/fstab", []byte("/dev/disk/by-id/virtio-plain /var ext4 defaults 0 2\n"), 0o644)
	second := l.bootSystem(t, vmtest.SystemBoot{Name: "system-logs-plain", Scenario: "system-logs", Params: params, Files: files, Disks: plain})
	plainBytes, control := searchDisks(t, params["canary"], plain)
	if slices.Min(control) == 0 {
		t.Errorf("control: on plain disks the canaries are there %v times, want all of them", control)
	}
	t.Logf("whole-host search: %d disks, %d bytes written, canaries in journal, application log and core dump: %v hits; control: %d bytes, %v hits",
		len(encrypted), bytes, hits, plainBytes, control)
	l.row("Logs", time.Since(begun), first, second)
}

// searchDisks is searchDisk for several disks and the canaries of the scenario
// system-logs.
func searchDisks(t *testing.T, canary string, disks []vmtest.Disk) (size int64, hits []int) {
	t.Helper()
	needles := [][]byte{[]byte(canary + "-IN-THE-JOURNAL"), []byte(canary + "-OF-AN-APPLICATION"), []byte(canary + "-IN-A-CORE-DUMP")}
	hits = make([]int, len(needles))
	for _, d := range disks {
		n, counts := searchDisk(t, d.Path, needles...)
		size += n
		for i, n := range counts {
			hits[i] += n
		}
	}
	return size, hits
}
