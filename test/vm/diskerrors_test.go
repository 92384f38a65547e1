//go:build vm

package vm

import (
	"path/filepath"
	"testing"
	"time"

	"hostcryptd/test/vm/vmtest"
)

// testDiskErrors breaks the disk below a volume with the device mapper.
func testDiskErrors(t *testing.T, l *lab) {
	begun := time.Now()
	disk := filepath.Join(l.Dir, "diskerrors.img")
	if err := vmtest.Sparse(disk, volumeSize); err != nil {
		t.Fatal(err)
	}
	r := l.boot(t, "disk-errors", nil, vmtest.Disk{Serial: "volume", Path: disk})
	l.row("DiskErrors", time.Since(begun), r)
}
