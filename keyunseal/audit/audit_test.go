package audit

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func sample(i int) Record {
	return Record{
		Event: Unwrap, Volume: "0f8fad5b-d9cb-469f-a165-70867728950e", Key: "https://v.vault.azure.net/keys/k", Version: "0123",
		Outcome: OK, Duration: int64(i), RequestID: fmt.Sprint("r", i), Detail: "detail " + fmt.Sprint(i),
	}
}

// fill makes a log of n records.
func fill(t testing.TB, n int) (file string, heads []Head) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "log", "audit.log")
	for i := range n {
		h, err := Append(file, sample(i))
		if err != nil {
			t.Fatal(err)
		}
		heads = append(heads, h)
	}
	return file, heads
}

func verify(t testing.TB, anchor *Head, files ...string) *Report {
	t.Helper()
	r, err := Verify(files, anchor)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestChain verifies a good log, with our code and with sha256sum as the
// package documentation says.
func TestChain(t *testing.T) {
	file, heads := fill(t, 5)
	r := verify(t, &heads[4], file)
	if len(r.Findings) != 0 || r.Records != 5 || r.First != 1 || r.Head != heads[4] {
		t.Fatalf("%+v", r)
	}
	if fi, err := os.Stat(file); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	for i := 1; i < 5; i++ {
		out, err := exec.Command("sh", "-c", fmt.Sprintf(`sed -n %dp "$1" | tr -d '\n' | sha256sum | cut -d' ' -f1; sed -n %dp "$1" | grep -o '"prev":"[0-9a-f]*"' | cut -d'"' -f4`, i, i+1), "sh", file).Output()
		if err != nil {
			t.Fatal(err)
		}
		if f := strings.Fields(string(out)); len(f) != 2 || f[0] != f[1] {
			t.Errorf("record %d: %q", i, out)
		}
	}
	b, _ := os.ReadFile(file)
	var first Record
	if err := json.Unmarshal(b[:bytes.IndexByte(b, '\n')], &first); err != nil || first.Detail != "detail 0" || first.PID != os.Getpid() || time.Since(first.Time) > time.Minute {
		t.Errorf("%+v, %v", first, err)
	}
}

// TestTampering changes a log in every way; each must be found, and where.
func TestTampering(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(lines [][]byte) [][]byte
		line   int
		anchor bool
	}{
		{"a digit changed", func(l [][]byte) [][]byte { l[2] = bytes.Replace(l[2], []byte(`"r2"`), []byte(`"r9"`), 1); return l }, 3, false},
		{"a blank added", func(l [][]byte) [][]byte { l[2] = append(l[2], ' '); return l }, 3, false},
		{"a line removed", func(l [][]byte) [][]byte { return append(l[:2:2], l[3:]...) }, 3, false},
		{"the first removed", func(l [][]byte) [][]byte { return l[1:] }, 0, true},
		{"two swapped", func(l [][]byte) [][]byte { l[2], l[3] = l[3], l[2]; return l }, 3, false},
		{"one twice", func(l [][]byte) [][]byte { return append(l[:3:3], l[2:]...) }, 4, false},
		{"garbage inserted", func(l [][]byte) [][]byte { return append(l[:2:2], append([][]byte{[]byte("garbage")}, l[2:]...)...) }, 3, false},
		{"an empty line", func(l [][]byte) [][]byte { return append(l[:2:2], append([][]byte{nil}, l[2:]...)...) }, 3, false},
		{"a long line", func(l [][]byte) [][]byte {
			return append(l[:2:2], append([][]byte{bytes.Repeat([]byte("x"), 100_000)}, l[2:]...)...)
		}, 3, false},
		{"the last made garbage", func(l [][]byte) [][]byte { return append(l[:4:4], []byte("garbage")) }, 5, false},
		{"the tail cut off", func(l [][]byte) [][]byte { return l[:4] }, 0, true},
		{"all cut off", func(l [][]byte) [][]byte { return nil }, 0, true},
		{"the last changed", func(l [][]byte) [][]byte { l[4] = bytes.Replace(l[4], []byte(`"r4"`), []byte(`"r9"`), 1); return l }, 0, true},
		{"written anew", nil, 0, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file, heads := fill(t, 5)
			if tt.change == nil {
				os.Remove(file)
				for i := range 6 {
					if _, err := Append(file, sample(10+i)); err != nil {
						t.Fatal(err)
					}
				}
			} else {
				b, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				lines := bytes.Split(bytes.TrimSuffix(b, []byte("\n")), []byte("\n"))
				lines = tt.change(lines)
				b = append(bytes.Join(lines, []byte("\n")), '\n')
				if len(lines) == 0 {
					b = nil
				}
				if err := os.WriteFile(file, b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			var anchor *Head
			if tt.anchor {
				anchor = &heads[4]
				if tt.name == "the first removed" {
					// That older files aren't there is not a finding, but it's told.
					if r := verify(t, anchor, file); len(r.Findings) != 0 || r.First != 2 {
						t.Errorf("%+v", r)
					}
					// It is where there should be all of the log.
					if r, err := VerifyLog(file, anchor); err != nil || len(r.Findings) != 1 || !strings.Contains(r.Findings[0].Reason, "the first 1 records") {
						t.Errorf("VerifyLog() = %+v, %v", r, err)
					}
					return
				}
			}
			r := verify(t, anchor, file)
			if len(r.Findings) == 0 {
				t.Fatal("not found")
			}
			if got := r.Findings[0].Line; got != tt.line {
				t.Errorf("found in line %d, want %d: %v", got, tt.line, r.Findings)
			}
		})
	}
}

// TestTorn cuts a log at every byte of its last record, as a power cut would,
// appends, and verifies.
func TestTorn(t *testing.T) {
	file, heads := fill(t, 3)
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	start := bytes.LastIndexByte(whole[:len(whole)-1], '\n') + 1
	for cut := start; cut < len(whole); cut++ {
		if err := os.WriteFile(file, whole[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		kept := 2
		if cut == len(whole)-1 {
			kept = 3 // only the line feed is gone
		}
		if r := verify(t, &heads[1], file); len(r.Findings) != 0 || r.Records != kept {
			t.Errorf("cut at %d: %+v", cut, r)
		}
		for range 2 {
			if _, err := Append(file, sample(7)); err != nil {
				t.Fatal(err)
			}
		}
		r := verify(t, &heads[1], file)
		if len(r.Findings) != 0 || r.Records != kept+2 || r.Head.Seq != uint64(kept+2) {
			t.Errorf("cut at %d, appended: %+v", cut, r)
		}
		// What was torn can't be removed or changed later.
		b, _ := os.ReadFile(file)
		if cut > start && kept == 2 {
			if err := os.WriteFile(file, append(bytes.Clone(b[:start]), b[cut+1:]...), 0o600); err != nil {
				t.Fatal(err)
			}
			if r := verify(t, nil, file); len(r.Findings) == 0 {
				t.Errorf("cut at %d: the torn record was removed, and that is not found", cut)
			}
		}
	}
	// The very first record of a log.
	for cut := 1; cut < 50; cut += 7 {
		if err := os.WriteFile(file, whole[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Append(file, sample(1)); err != nil {
			t.Fatal(err)
		}
		if r := verify(t, nil, file); len(r.Findings) != 0 || r.Records != 1 || r.First != 1 {
			t.Errorf("first record cut at %d: %+v", cut, r)
		}
	}
}

// TestProcesses has many appenders at once: one chain, nothing lost.
func TestProcesses(t *testing.T) {
	file, _ := fill(t, 1)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 25 {
				if _, err := Append(file, sample(i)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if r := verify(t, nil, file); len(r.Findings) != 0 || r.Records != 201 {
		t.Errorf("%d records, %v", r.Records, r.Findings)
	}
}

func TestRotation(t *testing.T) {
	file, _ := fill(t, 2)
	for n := range Keep + 2 {
		// A file of the size at which it's rotated, without writing that much.
		f, err := os.OpenFile(file, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := os.ReadFile(file)
		last := b[bytes.LastIndexByte(b[:len(b)-1], '\n')+1:]
		if _, err := f.WriteAt(append([]byte("\n"), last...), MaxSize); err != nil {
			t.Fatal(err)
		}
		f.Close()
		h, err := Append(file, sample(n))
		if err != nil {
			t.Fatal(err)
		}
		if want := uint64(3 + n); h.Seq != want {
			t.Errorf("rotation %d: record %d, want %d", n, h.Seq, want)
		}
		if err := os.Truncate(file+".1", int64(len(b))); err != nil {
			t.Fatal(err)
		}
	}
	files := Files(file)
	if len(files) != Keep+1 || files[Keep] != file || files[0] != fmt.Sprintf("%s.%d", file, Keep) {
		t.Errorf("%v", files)
	}
	if r, err := VerifyLog(file, nil); err != nil || len(r.Findings) != 0 || r.First < 2 {
		t.Errorf("%+v, %v", r, err)
	}
	// A file that is missing in the middle is missed.
	if r := verify(t, nil, append(append([]string{}, files[:3]...), files[4:]...)...); len(r.Findings) != 1 {
		t.Errorf("%+v", r)
	}
}

// TestRotationCut interrupts a rotation where a crash or a full disk would: the
// chain goes on.
func TestRotationCut(t *testing.T) {
	for name, left := range map[string]string{"before there is a new file": "-", "before a record": "", "in the first record": `{"seq":4,"pr`} {
		file, _ := fill(t, 3)
		if err := os.Rename(file, file+".1"); err != nil {
			t.Fatal(err)
		}
		if left != "-" {
			if err := os.WriteFile(file, []byte(left), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		h, err := Append(file, sample(3))
		if r, verr := VerifyLog(file, nil); err != nil || verr != nil || h.Seq != 4 || len(r.Findings) != 0 || r.Records != 4 {
			t.Errorf("%s: record %d, %v; %+v, %v", name, h.Seq, err, r, verr)
		}
	}
}

// TestRotationRace has many appenders at once when the log is full.
func TestRotationRace(t *testing.T) {
	for range 20 {
		file, _ := fill(t, 1)
		b, _ := os.ReadFile(file)
		f, err := os.OpenFile(file, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(append([]byte("\n"), b...), MaxSize); err != nil {
			t.Fatal(err)
		}
		f.Close()
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				if _, err := Append(file, sample(1)); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if err := os.Truncate(file+".1", int64(len(b))); err != nil {
			t.Fatal(err)
		}
		if r, err := VerifyLog(file, nil); err != nil || len(r.Findings) != 0 || r.Records != 9 {
			t.Fatalf("%+v, %v", r, err)
		}
	}
}

// TestHostile writes texts that a vault, or a header, could make up.
func TestHostile(t *testing.T) {
	file, _ := fill(t, 1)
	for _, s := range []string{"a\nb", "\x1b[2J", "\u2028", "\xff\xfe", strings.Repeat("x", 1<<20), strings.Repeat("\x00", 1<<20), strings.Repeat("\"", 5000), "<script>"} {
		r := sample(1)
		r.Detail, r.Code, r.RequestID, r.Class, r.Key, r.Version, r.ClientRequestID = s, s, s, s, s, s, s
		if _, err := Append(file, r); err != nil {
			t.Errorf("%.20q: %v", s, err)
		}
	}
	if r := verify(t, nil, file); len(r.Findings) != 0 || r.Records != 9 {
		t.Errorf("%+v", r)
	}
	b, _ := os.ReadFile(file)
	for line := range bytes.Lines(b) {
		if len(line) > maxLine+1 {
			t.Errorf("a line of %d bytes", len(line))
		}
		if bytes.ContainsAny(bytes.TrimSuffix(line, []byte("\n")), "\x00\x1b\n") {
			t.Errorf("control characters: %.100q", line)
		}
	}
}

// TestForeignFile: what is no audit log is not appended to.
func TestForeignFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(file, []byte("a diary\nof somebody\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Append(file, sample(1)); err == nil || !strings.Contains(err.Error(), "not an audit log") {
		t.Errorf("Append() = %v", err)
	}
	target := filepath.Join(t.TempDir(), "target")
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	if _, err := Append(link, sample(1)); err == nil {
		t.Error("a symbolic link was followed")
	}
}

// TestQueue: a log that can't be written holds nobody up; what there was no
// room for is counted, and the rest is written when the log is back.
func TestQueue(t *testing.T) {
	old := retryAfter
	retryAfter = 10 * time.Millisecond
	defer func() { retryAfter = old }()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "log"), nil, 0o600); err != nil { // where the folder should be
		t.Fatal(err)
	}
	file := filepath.Join(dir, "log", "audit.log")
	var mu sync.Mutex
	failures, written := 0, 0
	q := NewQueue(file, nil, func(_ Record, h Head, err error) {
		mu.Lock()
		defer mu.Unlock()
		if err != nil {
			failures++
		} else {
			written++
		}
	})
	begin := time.Now()
	for i := range queueLength + 50 {
		q.Append(sample(i))
	}
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("appending took %v", took)
	}
	time.Sleep(50 * time.Millisecond)
	if err := os.Remove(filepath.Join(dir, "log")); err != nil {
		t.Fatal(err)
	}
	for range 500 {
		mu.Lock()
		n := written
		mu.Unlock()
		if n > queueLength {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	q.Close()
	q.Append(sample(1)) // too late, and harmless
	r := verify(t, nil, file)
	b, _ := os.ReadFile(file)
	if len(r.Findings) != 0 || r.Records != queueLength+1 || !bytes.Contains(b, []byte(`50 records were lost`)) {
		t.Errorf("%d records, %v; %s", r.Records, r.Findings, b[max(0, len(b)-300):])
	}
	if failures != 1 {
		t.Errorf("the failure was told %d times, want once", failures)
	}
}

func FuzzVerify(f *testing.F) {
	file, _ := fill(f, 3)
	b, _ := os.ReadFile(file)
	f.Add(b)
	f.Add([]byte("{}\n"))
	f.Add([]byte("\n\n{\"seq\":1}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		name := filepath.Join(t.TempDir(), "log")
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Verify([]string{name}, nil); err != nil {
			t.Fatal(err)
		}
		_, _ = Append(name, sample(1)) // must not panic
	})
}

// TestCloseWithin: a log that another process has locked is waited for so long and no
// longer, and its record is written all the same.
func TestCloseWithin(t *testing.T) {
	file := filepath.Join(t.TempDir(), "audit.log")
	lock, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	q := NewQueue(file, nil, nil)
	q.Append(sample(1))
	if q.CloseWithin(20 * time.Millisecond) {
		t.Error("a record that can't be written was said to be")
	}
	lock.Close()
	if !q.CloseWithin(time.Minute) {
		t.Error("the queue is not done")
	}
	q.Close()
	if r, err := VerifyLog(file, nil); err != nil || r.Records != 1 {
		t.Errorf("%+v, %v", r, err)
	}
}
