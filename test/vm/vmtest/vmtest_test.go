package vmtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"hostcryptd/test/vm/report"
)

// TestMain lets the test binary play the tools of the host: the tests below
// put links to it into a folder and make that their PATH.
func TestMain(m *testing.M) {
	if play, ok := roles[filepath.Base(os.Args[0])]; ok {
		if err := play(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(100)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

var roles = map[string]func(args []string) error{
	"qemu-system-x86_64": playQEMU,
	"apt-cache":          playAptCache,
	"apt-get":            playAptGet,
	"dpkg-deb":           playDpkgDeb,
	"depmod":             func([]string) error { return nil },
}

// playTools makes PATH a folder where this binary plays every tool.
func playTools(t *testing.T) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name := range roles {
		if err := os.Symlink(self, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir)
	// Under the race detector each of them would sleep a second at its end.
	t.Setenv("GORACE", "atexit_sleep_ms=0")
}

func TestToolNamesItsPackage(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	tools["no-such-program"] = "no-such-package"
	defer delete(tools, "no-such-program")
	_, err := Tool("no-such-program")
	if err == nil || !strings.Contains(err.Error(), "install the Debian package no-such-package") {
		t.Errorf("Tool of a missing program: %v, want the package to install", err)
	}
}

func TestRunReportsStandardError(t *testing.T) {
	_, err := Run(t.Context(), "", "ldd", "/no/such/file")
	if err == nil || !strings.Contains(err.Error(), "/no/such/file: No such file or directory") {
		t.Errorf("Run: %v, want what the tool printed", err)
	}
}

// playQEMU reports what the test put into QEMU_PLAY, then ends or hangs.
func playQEMU(args []string) error {
	if slices.Equal(args, []string{"--version"}) {
		fmt.Println("QEMU emulator version 9.0.0")
		return nil
	}
	for _, a := range args {
		if path, ok := strings.CutPrefix(a, "file:"); ok {
			console := "first line\r\nlast line of the console\r\n"
			if oops := os.Getenv("QEMU_OOPS"); oops != "" {
				console = "early line\r\n" + oops + "\r\n" + console
			}
			if err := os.WriteFile(path, []byte(console), 0o644); err != nil {
				return err
			}
		}
	}
	if err := os.WriteFile(eventsPath(args), []byte(os.Getenv("QEMU_PLAY")), 0o644); err != nil {
		return err
	}
	switch os.Getenv("QEMU_END") {
	case "hang":
		time.Sleep(time.Minute)
	case "fail":
		return errors.New("no such machine")
	}
	return nil
}

func eventsPath(args []string) string {
	for _, a := range args {
		if path, ok := strings.CutPrefix(a, "file,id=events,path="); ok {
			return path
		}
	}
	return ""
}

func TestWait(t *testing.T) {
	const (
		ready = `{"time":2.5,"kind":"ready","text":"6.12"}` + "\n"
		speed = `{"time":3,"kind":"figure","name":"write","value":17,"text":"MB/s"}` + "\n"
		done  = `{"time":4,"kind":"done"}` + "\n"
		bad   = `{"time":4,"kind":"done","text":"one file has changed"}` + "\n"
	)
	tests := []struct {
		name, play, end string
		events          int
		wantErr         string // part of it; "" for none
	}{
		{name: "passes", play: ready + speed + done, events: 3},
		{name: "scenario fails", play: ready + bad, events: 2, wantErr: "one file has changed"},
		{name: "guest dies", play: ready + speed, events: 2, wantErr: "the guest died after: [   3.00] write = 17 MB/s"},
		{name: "guest dies in a line", play: ready + done[:10], events: 1, wantErr: "the guest died after"},
		{name: "guest never runs", wantErr: "the guest reported nothing"},
		{name: "not an event", play: ready + "[ 1.2] Kernel panic\n" + done, events: 2, wantErr: "decoding"},
		{name: "hangs", play: ready, end: "hang", events: 1, wantErr: "killed: no end after 500ms"},
		{name: "qemu refuses", end: "fail", wantErr: "exit status 100: no such machine"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			playTools(t)
			t.Setenv("QEMU_PLAY", tt.play)
			t.Setenv("QEMU_END", tt.end)
			var seen int
			limit := 20 * time.Second
			if tt.end == "hang" {
				limit = 500 * time.Millisecond
			}
			v, err := Start(t.Context(), Config{
				Name: "b", Dir: t.TempDir(), Kernel: &Kernel{Image: "k"}, Initrd: "i", Timeout: limit,
				OnEvent: func(report.Event) { seen++ },
			})
			if err != nil {
				t.Fatal(err)
			}
			r, err := v.Wait()
			if len(r.Events) != tt.events || seen != tt.events {
				t.Errorf("%d events in the result, %d seen, want %d", len(r.Events), seen, tt.events)
			}
			if tt.wantErr == "" {
				if err != nil {
					t.Fatal(err)
				}
				if r.Boot != 2500*time.Millisecond || r.Figures["write"].Value != 17 {
					t.Errorf("result = %+v", r)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
				t.Fatalf("Wait: %v, want %q in it", err, tt.wantErr)
			}
			for _, part := range []string{"last line of the console", "repeat by hand:\n", v.Command} {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("Wait: %v, want %q in it", err, part)
				}
			}
		})
	}
}

func TestWaitKilled(t *testing.T) {
	playTools(t)
	t.Setenv("QEMU_END", "hang")
	config := Config{Name: "b", Dir: t.TempDir(), Kernel: &Kernel{}}

	v, err := Start(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	v.Kill()
	if _, err := v.Wait(); !errors.Is(err, context.Canceled) {
		t.Errorf("Wait after Kill: %v, want %v", err, context.Canceled)
	}

	cause := errors.New("the test is over")
	ctx, cancel := context.WithCancelCause(t.Context())
	if v, err = Start(ctx, config); err != nil {
		t.Fatal(err)
	}
	cancel(cause)
	if _, err := v.Wait(); !errors.Is(err, cause) {
		t.Errorf("Wait after the context ended: %v, want %v", err, cause)
	}
}

// TestErrorShowsTrouble checks that the error has the log from the oops on,
// and not what the kernel printed after it.
func TestErrorShowsTrouble(t *testing.T) {
	playTools(t)
	t.Setenv("QEMU_OOPS", "[    2.487130] Oops: 0000 [#1] PREEMPT SMP NOPTI")
	l := &Lab{Dir: t.TempDir(), Kernel: &Kernel{}}
	_, err := l.Config("s", nil).Run(t.Context())
	if err == nil || !strings.Contains(err.Error(), "s.serial.log:\n[    2.487130] Oops: 0000") || strings.Contains(err.Error(), "early line") {
		t.Errorf("Run: %v, want the log from the trouble on", err)
	}
}

func TestAccelerator(t *testing.T) {
	for version, want := range map[string]string{
		"QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)": "single",
		"QEMU emulator version 8.0.5":                                    "single",
		"QEMU emulator version 8.1.0":                                    "multi",
		"QEMU emulator version 10.0.2 (Debian)":                          "multi",
		"something else":                                                 "single",
		"QEMU emulator version of the future":                            "single",
	} {
		if got := accelerator(version); got != "tcg,thread="+want+",tb-size=512" {
			t.Errorf("accelerator(%q) = %s, want %s", version, got, want)
		}
	}
}

func TestArguments(t *testing.T) {
	c := Config{
		Kernel: &Kernel{Image: "/k/vmlinuz"}, Initrd: "/i", Append: []string{"hostcryptd.scenario=boot"}, MemoryMB: 512,
		Disks: []Disk{
			{Serial: "volume", Path: "/tmp/a,b.img"},
			{Serial: "payload", Path: "/p", ReadOnly: true},
			{Serial: "nbd", Socket: "/run/s"},
		},
	}
	args := c.arguments("tcg,thread=multi", "/s.log", "/e.jsonl")
	has := func(flag, value string) {
		t.Helper()
		for i, a := range args[:len(args)-1] {
			if a == flag && strings.Contains(args[i+1], value) {
				return
			}
		}
		t.Errorf("no %s with %q in %q", flag, value, args)
	}
	has("-accel", "tcg,thread=multi")
	has("-m", "512M")
	has("-append", "hostcryptd.scenario=boot")
	has("-append", "panic=-1")
	has("-serial", "file:/s.log")
	has("-blockdev", "driver=raw,node-name=disk0,file.driver=file,file.filename=/tmp/a,,b.img")
	has("-device", "virtio-blk-pci,drive=disk0,serial=volume")
	has("-blockdev", "file.filename=/p,read-only=on")
	has("-blockdev", "driver=nbd,node-name=disk2,server.type=unix,server.path=/run/s")
	if slices.Contains(args, "-enable-kvm") {
		t.Error("KVM is on")
	}
}

func TestQuote(t *testing.T) {
	got := quote([]string{"qemu", "-append", "a=b quiet", "it's", ""})
	if want := `qemu -append 'a=b quiet' 'it'\''s' ''`; got != want {
		t.Errorf("quote = %s, want %s", got, want)
	}
}
