package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
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

// TestDialHosts: a host that would never be asked for is refused before it listens, and
// before the socket of a dialer that runs is removed.
func TestDialHosts(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "dial")
	if err := os.WriteFile(socket, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var out, errs strings.Builder
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	code := run(ctx, []string{"dial", socket, "unit.vault.azure.net", "https://login.cloud.example/"}, os.Stdin, &out, &errs)
	if code != codeUsage || !strings.Contains(errs.String(), `"https://login.cloud.example/" is not the full name of a host`) {
		t.Errorf("exit code %d, %q", code, errs.String())
	}
	if _, err := os.Stat(socket); err != nil {
		t.Errorf("the socket: %v", err)
	}
}
