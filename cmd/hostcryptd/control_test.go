package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"hostcryptd/keyunseal/audit"
	"hostcryptd/keyunseal/lifecycle"
	"hostcryptd/sector"
)

// TestFailedCommands: a lock or unlock that comes to nothing is recorded as that.
func TestFailedCommands(t *testing.T) {
	c := lifecycle.Config{Grace: lifecycle.DefaultGrace}
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	over := lifecycle.NewRunner(c, nil)
	ended, end := context.WithCancel(t.Context())
	end()
	if err := over.Run(ended); err != nil {
		t.Fatal(err)
	}
	stuck := lifecycle.NewRunner(c, nil) // it doesn't run, as behind a disk that hangs
	for _, tt := range []struct {
		name, command string
		life          *lifecycle.Runner
		random        bool
		detail        string
	}{
		{"early lock", "lock", nil, false, "the daemon is starting"},
		{"early unlock", "unlock", nil, false, "the daemon is starting"},
		{"random key", "unlock", stuck, true, "the volume's key was random"},
		{"late lock", "lock", over, false, "the server leaves the volume"},
		{"stuck lock", "lock", stuck, false, "not waited for: context canceled"},
		{"stuck unlock", "unlock", stuck, false, "not waited for: context canceled"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			log := filepath.Join(dir, "audit.log")
			d := &daemon{log: zap.NewNop(), uuid: "01234567-89ab-4def-8123-456789abcdef", life: tt.life,
				opts: serveOptions{control: filepath.Join(dir, "c.sock"), randomKey: tt.random, keys: keyFlags{auditLog: log}}}
			stop, err := d.serveControl()
			if err != nil {
				t.Fatal(err)
			}
			defer stop()
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			if err := newControlClient(d.opts.control).do(ctx, "POST", "/v1/"+tt.command, nil); err == nil {
				t.Error("no error")
			}
			// The client may be gone before it is written.
			var b []byte
			for begun := time.Now(); len(b) == 0 && time.Since(begun) < 20*time.Second; time.Sleep(10 * time.Millisecond) {
				b, _ = os.ReadFile(log)
			}
			var r audit.Record
			if err := json.Unmarshal(b, &r); err != nil {
				t.Fatalf("%v: %q", err, b)
			}
			if r.Event != tt.command || r.Outcome != audit.Failed || r.Volume != d.uuid || !strings.HasPrefix(r.Detail, tt.detail) {
				t.Errorf("recorded %s", b)
			}
		})
	}
}

// TestCalled: a disk with a label that is another volume's name or UUID doesn't get
// between that and its operator.
func TestCalled(t *testing.T) {
	a, b := &status{UUID: "a", Name: "data", Device: "/dev/null"}, &status{UUID: "b", Label: "a"}
	c := &status{UUID: "c", Label: "data"}
	for which, want := range map[string][]*status{
		"a": {a}, "data": {a}, "b": {b}, "/dev/null": {a}, "c": {c}, "d": nil,
	} {
		if got := called([]*status{c, b, a}, which); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%q is %v, want %v", which, got, want)
		}
	}
	if got := called([]*status{{UUID: "x", Label: "l"}, {UUID: "y", Label: "l"}}, "l"); len(got) != 2 {
		t.Errorf("a label of two volumes is that of %d", len(got))
	}
}

// TestRefusedReloads: who asks for a reload while another one is under way is told of
// its end too.
func TestRefusedReloads(t *testing.T) {
	d, keeper := leavingServer(t)
	stop, err := d.serveControl()
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	d.link.leave = make(chan struct{})
	go d.link.listen(zap.NewNop())
	answers := make(chan error, 2)
	for range 2 {
		go func() { answers <- newControlClient(d.opts.control).do(t.Context(), "POST", "/v1/reload", nil) }()
	}
	for asked := 0; asked < 2; {
		m := nextMessage(t, keeper)
		if m.Reload {
			asked++
		}
	}
	if err := sendPacket(keeper, keeperOrder{Refused: "it can't run"}, nil); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		select {
		case err := <-answers:
			if exitCode(err) != codeBusy || !strings.Contains(err.Error(), "it can't run") {
				t.Errorf("reload = %v", err)
			}
		case <-time.After(time.Minute):
			t.Fatal("one of two is not told")
		}
	}
	keeper.Close()
	d.stopLife()
	_ = d.volume.Close()
}

// TestReloadAnswers: reload is no success when the server of before goes on, and ends
// when nobody does.
func TestReloadAnswers(t *testing.T) {
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		after  *status // nil: it hangs up
		code   int
		answer string
	}{
		{"new", &status{PID: 2, Keeper: os.Getpid(), State: stateServing, Version: "2"}, 0, ""},
		{"rollback", &status{PID: 2, Keeper: os.Getpid(), State: stateServing, Version: "1", Rollback: "the server died: exit code 3"}, codeBusy, "by version 1 as before: the server died: exit code 3"},
		{"gone", nil, codeUsage, "have ended"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			name := filepath.Join(t.TempDir(), "c.sock")
			l, err := net.Listen("unix", name)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			var s atomic.Pointer[status]
			s.Store(&status{PID: 1, Keeper: gone.Process.Pid, State: stateServing, Version: "1", Control: name})
			mux := http.NewServeMux()
			mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
				if s.Load() == nil {
					panic(http.ErrAbortHandler)
				}
				json.NewEncoder(w).Encode(s.Load())
			})
			mux.HandleFunc("POST /v1/reload", func(w http.ResponseWriter, r *http.Request) {
				s.Store(tt.after)
				w.WriteHeader(http.StatusAccepted)
			})
			go http.Serve(l, mux)
			var out strings.Builder
			a := &app{stdout: &out, stderr: &out}
			c := a.reloadCommand()
			c.SetArgs([]string{name})
			c.SilenceErrors, c.SilenceUsage = true, true
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			err = c.ExecuteContext(ctx)
			if tt.code == 0 && err != nil || tt.code != 0 && (err == nil || exitCode(err) != tt.code || !strings.Contains(err.Error(), tt.answer)) {
				t.Errorf("reload = %v, want exit code %d and %q", err, tt.code, tt.answer)
			}
		})
	}
}

// TestFailedAdvice: what status says of a volume that has failed is what helps.
func TestFailedAdvice(t *testing.T) {
	for attached, want := range map[string]string{
		"":          "start the server anew\n",
		"/dev/nbd3": "'hostcryptd detach data', and start it again",
	} {
		var out strings.Builder
		s := &status{Name: "data", Attached: attached, Keeper: 1, Volume: &volumeStatus{Failed: true, Requests: &sector.Stats{}}, Server: &serverStatus{}}
		s.Key.Random = true
		s.print(&out)
		if !strings.Contains(out.String(), want) {
			t.Errorf("attached %q:\n%s\nwant %q", attached, out.String(), want)
		}
	}
}

// TestLateErase: an erase that comes when the volume is left has done nothing, and says
// so.
func TestLateErase(t *testing.T) {
	d, _ := leavingServer(t)
	d.stopLife()
	d.opts.randomKey = false
	if _, err := d.erase(t.Context(), d.uuid); exitCode(err) != codeBusy || !strings.Contains(err.Error(), "ask again; nothing was changed") {
		t.Errorf("erase = %v", err)
	}
	_ = d.volume.Close()
}

// TestEraseLocked: who keeps the lock on an image keeps an erase from ending well, and not
// for ever.
func TestEraseLocked(t *testing.T) {
	defer func(d time.Duration) { eraseLock = d }(eraseLock)
	eraseLock = 10 * time.Millisecond
	d, _ := leavingServer(t)
	defer d.stopLife()
	d.opts.randomKey, d.opts.keys.tpm, d.opts.keys.pins = false, "none", t.TempDir()
	d.uuid = "01234567-89ab-4def-8123-456789abcdef"
	f, err := os.Open(d.opts.device)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	if _, err := d.erase(t.Context(), d.uuid); err == nil || !strings.Contains(err.Error(), "its keys are wiped") || !strings.Contains(err.Error(), "lslocks") {
		t.Errorf("erase = %v", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	eraseLock = time.Minute
	if a, err := d.erase(t.Context(), d.uuid); err != nil || a.Bytes == 0 {
		t.Errorf("erase again = %+v, %v", a, err)
	}
	_ = d.volume.Close()
}

// TestWouldLose: who asks to wipe the keys is told that they are the last also where a
// look at the header is under way, which began before it was gone, where only a look
// with the key could tell, and where the disk can't be read now.
func TestWouldLose(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 24<<20); err != nil {
		t.Fatal(err)
	}
	device, err := sector.OpenDevice(image, sector.DeviceOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer device.Close()
	if _, err := sector.Format(t.Context(), device, sector.FormatOptions{SectorSize: 4096, Seal: []sector.Sealer{openSeal}}); err != nil {
		t.Fatal(err)
	}
	v, err := sector.Open(t.Context(), device, openUnseal, sector.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	d := &daemon{volume: v, device: device, uuid: v.UUID(), log: zap.NewNop(), opts: serveOptions{device: image, keys: keyFlags{auditLog: "none"}}}
	h := &keyHost{d: d}
	d.lifeHost = h
	limit := time.Minute
	ask := func(query string) string {
		return d.wouldLose(httptest.NewRequest("POST", "/v1/detach"+query, nil), limit)
	}
	const last = "this server has the last key to the data"
	if why := ask(""); why != "" {
		t.Errorf("the header is there: %s", why)
	}

	// It's replaced after a look with the key that is under way has read it.
	old := &headerLook{cancel: func() {}, done: make(chan struct{})}
	close(old.done)
	h.look = old
	if _, err := sector.AddToken(t.Context(), device, openUnseal, openSeal, sector.OpenOptions{}); err != nil {
		t.Fatal(err)
	}
	if why := ask(""); !strings.Contains(why, "nothing has authenticated it") {
		t.Errorf("another header is there than the look under way has read: %q", why)
	}
	h.look = nil
	if _, err := v.Tokens(t.Context(), openUnseal, sector.OpenOptions{}); err != nil {
		t.Fatal(err)
	}
	if why := ask(""); why != "" {
		t.Errorf("the new header is authentic: %s", why)
	}
	h.judgeHeader(fmt.Errorf("x: %w", sector.ErrOlder))
	if why := ask(""); why != "" || !strings.HasPrefix(h.headerProblem(), "is not authentic") {
		t.Errorf("the header is an older one: %q; the status says %q", why, h.headerProblem())
	}
	h.judgeHeader(fmt.Errorf("x: %w", sector.ErrNotVolume)) // and it's there again
	if why := ask(""); why != "" {
		t.Errorf("the header is there again: %s", why)
	}

	// It's destroyed while somebody who looks at the status waits for the lock on it.
	locked, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer locked.Close()
	if err := unix.Flock(int(locked.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if d.readTokens(time.Millisecond) {
		t.Error("the header was read under its lock")
	}
	limit = time.Millisecond
	if why := ask(""); !strings.Contains(why, last) {
		t.Errorf("it can't be read, and was gone when it was read last: %q", why)
	}
	h.judgeHeader(fmt.Errorf("x: %w", sector.ErrAuth))
	if why := ask(""); !strings.Contains(why, "is not authentic, and this server may have the last key") {
		t.Errorf("it can't be read, and was not authentic: %q", why)
	}
	h.judgeHeader(nil)
	limit = time.Minute
	answer := make(chan string)
	go func() { answer <- ask("") }()
	if _, err := locked.WriteAt(make([]byte, 4<<20), 0); err != nil {
		t.Error(err)
	}
	if err := unix.Flock(int(locked.Fd()), unix.LOCK_UN); err != nil {
		t.Error(err)
	}
	if why := <-answer; !strings.Contains(why, "is gone, and "+last) {
		t.Errorf("the header was destroyed meanwhile: %q", why)
	}
	if why := ask("?force=true"); why != "" {
		t.Errorf("by force: %s", why)
	}

	// That of another volume is as good as none.
	other := filepath.Join(t.TempDir(), "other.img")
	if err := os.WriteFile(other, make([]byte, 24<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	od, err := sector.OpenDevice(other, sector.DeviceOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sector.Format(t.Context(), od, sector.FormatOptions{SectorSize: 4096, Seal: []sector.Sealer{openSeal}}); err != nil {
		t.Fatal(err)
	}
	od.Close()
	b, err := os.ReadFile(other)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := locked.WriteAt(b[:1<<20], 0); err != nil {
		t.Fatal(err)
	}
	if why := ask(""); !strings.Contains(why, "is that of another volume, and "+last) {
		t.Errorf("another volume's header: %q", why)
	}
}

// TestNotServed: of servers that don't answer only those keep a volume from being
// changed that may be its own.
func TestNotServed(t *testing.T) {
	const ours, another = "5a0c8b0e-0c62-4a86-8d70-6b4d0a8f1f3e", "e3f1f8a0-d4b6-407d-8a68-260ce0b8c0a5"
	dir := t.TempDir()
	listen := func(name string) net.Listener {
		l, err := net.Listen("unix", filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	serve := func(name, uuid string) *http.Server {
		s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			json.NewEncoder(w).Encode(status{UUID: uuid, Device: "/dev/x"})
		})}
		go s.Serve(listen(name))
		t.Cleanup(func() { s.Close() })
		return s
	}
	want := func(text string, limit time.Duration) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		err := notServedIn(ctx, dir, ours)
		if text == "" && err != nil || text != "" && (exitCode(err) != codeBusy || !strings.Contains(err.Error(), text)) {
			t.Errorf("%v, want %q", err, text)
		}
	}
	want("", time.Minute)
	named := serve("named.sock", another)
	dead := listen(ours + ".sock").(*net.UnixListener)
	dead.SetUnlinkOnClose(false)
	dead.Close()
	want("", time.Minute)

	// Those below are listened to and nobody answers.
	named.Close()
	const soon = 200 * time.Millisecond
	foreign := listen(another + ".sock")
	want("", soon)
	hung := listen("any.sock")
	want("a server on this host can't be asked whether it serves volume "+ours, soon)
	hung.Close()
	if err := os.Remove(filepath.Join(dir, ours+".sock")); err != nil {
		t.Fatal(err)
	}
	hung = listen(ours + ".sock")
	want("volume "+ours+" has a server on this host that can't be asked", soon)
	hung.Close()
	foreign.Close()
	serve("mine.sock", ours)
	want("is being served from /dev/x", time.Minute)
}
