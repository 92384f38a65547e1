package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"hostcryptd/systemd"
)

// TestReceiveNotify: of two processes that say they are ready, only the one that was
// started counts, also if the other passes descriptors along.
func TestReceiveNotify(t *testing.T) {
	name := filepath.Join(t.TempDir(), "notify")
	c, err := listenNotify(name)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	other := exec.Command("/proc/self/exe")
	other.Env = append(os.Environ(), notifyEnv+"="+name)
	if out, err := other.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	mine, err := net.Dial("unixgram", name)
	if err != nil {
		t.Fatal(err)
	}
	defer mine.Close()
	if _, err := mine.Write([]byte("STATUS=mine")); err != nil {
		t.Fatal(err)
	}
	if err := c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	text, err := receiveNotify(c, make([]byte, 4096), os.Getpid())
	if err != nil || text != "STATUS=mine" {
		t.Errorf("received %q, %v", text, err)
	}
	fds, err := filepath.Glob("/proc/self/fd/*")
	if err != nil || len(fds) == 0 {
		t.Fatal(fds, err)
	}
	for _, fd := range fds {
		if to, _ := os.Readlink(fd); to == filepath.Join(filepath.Dir(name), "passed") {
			t.Error("a descriptor that another process has sent is open")
		}
	}
}

// notifyEnv has the test binary notify the one who listens there.
const notifyEnv = "HOSTCRYPTD_TEST_NOTIFY"

func notifyMain() int {
	name := os.Getenv(notifyEnv)
	os.Setenv("NOTIFY_SOCKET", name)
	f, err := os.Create(filepath.Join(filepath.Dir(name), "passed"))
	if err == nil {
		err = errors.Join(notifyManager(systemd.Ready), systemd.Store("name", f))
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}
