package main

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestMayDial: the private clouds are those that the table names now, and the service
// manager is told of a refusal.
func TestMayDial(t *testing.T) {
	dir := t.TempDir()
	cloud, tab, manager := filepath.Join(dir, "cloud.json"), filepath.Join(dir, "tab"), filepath.Join(dir, "manager")
	if err := os.WriteFile(cloud, []byte(`{"dns_suffix": "vault.cloud.example"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: manager, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", manager)
	const address = "unit.vault.cloud.example:443"
	may := mayDial(nil, tab)
	for _, tt := range []struct {
		table string
		ok    bool
	}{
		{"", false},
		{"data /dev/sdb -\n", false},
		{"var /dev/sda - nofail\ndata /dev/sdb - nofail,cloud=" + cloud + "\n", true},
		{"# data /dev/sdb - cloud=" + cloud + "\n", false},
		{"data /dev/sdb - cloud=" + cloud + ",discrad\n", true}, // its server may be one of before
	} {
		if err := os.WriteFile(tab, []byte(tt.table), 0o600); err != nil {
			t.Fatal(err)
		}
		err := may(address)
		if (err == nil) != tt.ok {
			t.Errorf("with %q: %v", tt.table, err)
		}
		if err == nil {
			continue
		}
		b := make([]byte, 4096)
		n, _ := l.Read(b)
		if text := string(b[:n]); !strings.HasPrefix(text, `STATUS=refused last: "`+address+`": `) || strings.Contains(text, "\n") {
			t.Errorf("the service manager was told %q", text)
		}
	}
	if err := mayDial(nil, dir)(address); err == nil || !strings.Contains(err.Error(), "directory") {
		t.Errorf("with a table that can't be read: %v", err)
	}
	if err := mayDial([]string{"unit.vault.cloud.example"}, dir)(address); err != nil {
		t.Errorf("named by the unit: %v", err)
	}
}
