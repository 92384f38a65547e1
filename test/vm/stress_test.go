//go:build vm

package vm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"hostcryptd/test/vm/vmtest"
)

// stressTime is how long each file system is under load, if
// $HOSTCRYPTD_VM_STRESS doesn't say.
const stressTime = "20s"

// testStress does random operations on ext4 and xfs, each on a volume.
func testStress(t *testing.T, l *lab) {
	begun := time.Now()
	limit := os.Getenv("HOSTCRYPTD_VM_STRESS")
	if limit == "" {
		limit = stressTime
	}
	d, err := time.ParseDuration(limit)
	if err != nil {
		t.Fatalf("HOSTCRYPTD_VM_STRESS is %q, want a time", limit)
	}
	hostKey := filepath.Join(l.Dir, "stress.key")
	var disks []vmtest.Disk
	for _, fstype := range []string{"ext4", "xfs"} {
		volume := l.sparse(t, fstype, cutVolumeSize)
		l.format(t, volume.Path, hostKey, "--key", "host-key")
		disks = append(disks, volume)
	}
	key, err := os.ReadFile(hostKey)
	if err != nil {
		t.Fatal(err)
	}
	_, seed := cutParameters(t)
	t.Logf("seed %d", seed)
	c := l.Config("stress", map[string]string{"time": limit, "seed": fmt.Sprint(seed), "hostkey": fmt.Sprintf("%x", key)}, disks...)
	c.Timeout += 2 * d
	r := run(t, c)
	for _, fstype := range []string{"ext4", "xfs"} {
		if r.Figures[fstype+" file operations"].Value < 100 {
			err = errors.Join(err, fmt.Errorf("%s: %v operations, want at least 100", fstype, r.Figures[fstype+" file operations"].Value))
		}
	}
	if err != nil {
		t.Error(err)
	}
	l.row("Stress", time.Since(begun), r)
}
