package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"hostcryptd/test/vm/vmtest"
)

const (
	loggedName    = "hostcryptd-logged"
	loggedRecords = 120
	loggedChanges = 6        // of the header, at least
	headerArea    = 16 << 20 // what is before the data, see sector/FORMAT.md
)

// A writeRecorder is a disk whose writes are recorded by the device mapper.
type writeRecorder struct {
	m   *machine
	log string // the disk with the record
}

func (m *machine) recordWrites(log string) (*writeRecorder, error) {
	size, err := deviceSize(m.disk)
	if err != nil {
		return nil, err
	}
	if _, err := m.run("dmsetup", "create", loggedName, "--table", fmt.Sprintf("0 %d log-writes %s %s", size/512, m.disk, log)); err != nil {
		return nil, err
	}
	m.disk = filepath.Join("/dev/mapper", loggedName)
	return &writeRecorder{m: m, log: log}, nil
}

// mark puts a mark, a word without blanks, behind everything that is durable by
// now.
func (w *writeRecorder) mark(text string) error {
	out, err := command("dmsetup", "message", loggedName, "0", "mark", text).CombinedOutput()
	if err != nil {
		return fmt.Errorf("dmsetup message: %w: %s", err, out)
	}
	return nil
}

// logWrites records every write of a volume to its disk, while records are
// acknowledged in its file system and its header is changed. Then it does the
// writes again, on another disk, and looks at that at moments at which the power
// could have been cut: after each flush and each write with FUA the header must
// be valid, and hold what was acknowledged; the file system must mount and have
// every record acknowledged by then.
func logWrites(m *machine) error {
	checks, err := m.number("checks")
	if err != nil {
		return err
	}
	os.Setenv("HOSTCRYPTD_AUDIT_LOG", "none")
	fstype := m.params["fs"]
	c, err := m.cutVolume(fstype)
	if err != nil {
		return err
	}
	// Without FUA on the disk there would be none in the record.
	if fua, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(m.disk), "queue/fua")); err != nil || strings.TrimSpace(string(fua)) != "1" {
		return errors.Join(fmt.Errorf("the disk %s has no FUA", m.disk), err)
	}
	w, err := m.recordWrites(diskBySerial("log"))
	if err != nil {
		return err
	}

	m.step(1, "Recording every write")
	if err := m.formatHostKey(); err != nil {
		return err
	}
	if err := w.mark("formatted"); err != nil {
		return err
	}
	if err := c.open(); err != nil {
		return err
	}
	if _, err := m.run("mkfs."+fstype, "-q", c.server.dev); err != nil {
		return err
	}
	if err := errors.Join(c.mount(), c.openSlots()); err != nil {
		return err
	}
	if err := w.mark("mounted"); err != nil {
		return err
	}
	changed := make(chan error, 1)
	var stop atomic.Bool
	go func() { changed <- c.changeHeader(w, &stop) }()
	for n := 1; n <= loggedRecords; n++ {
		if err := c.write(n); err != nil {
			return fmt.Errorf("writing record %d: %w", n, err)
		}
		if err := w.mark("record-" + strconv.Itoa(n)); err != nil {
			return err
		}
	}
	stop.Store(true)
	if err := <-changed; err != nil {
		return err
	}
	if err := errors.Join(c.slots.Close(), m.unmount(), c.server.detach()); err != nil {
		return err
	}
	if _, err := m.run("dmsetup", "remove", loggedName); err != nil {
		return err
	}

	m.step(2, "Doing the writes again, with a look after each flush")
	r := &replayer{c: c, log: w.log, image: "/run/replay.img", rand: rand.New(rand.NewPCG(c.seed, 1))}
	if err := r.survey(); err != nil {
		return err
	}
	m.figure("entries", float64(r.entries), "")
	m.figure("flushes", float64(r.flushes), "")
	m.figure("writes with FUA", float64(r.fua), "")
	if r.flushes == 0 || r.fua == 0 || r.headerMarks == 0 {
		return fmt.Errorf("the record has %d flushes, %d writes with FUA and %d changes of the header, and shows nothing about those that it has none of", r.flushes, r.fua, r.headerMarks)
	}
	if err := r.run(checks); err != nil {
		return err
	}
	m.figure("headers checked", float64(r.headers), "")
	m.figure("file systems checked", float64(r.mounts), "")

	m.step(3, "The control: without the last flush before an acknowledgement")
	return r.control()
}

// changeHeader adds and removes keys until it may stop, and marks each
// change with the generation that the header has then.
func (c *cutVolume) changeHeader(w *writeRecorder, stop *atomic.Bool) error {
	h := &headerChanger{m: c.m}
	for n := 0; n < loggedChanges || !stop.Load(); n++ {
		d, err := h.dump()
		if err != nil {
			return err
		}
		args := []string{"key", "add", c.m.disk, "--key", "host-key:/run/other.key", "--host-key", hostKey}
		if ids := d.keys(""); n%2 == 1 {
			args = []string{"key", "remove", c.m.disk, strconv.Itoa(ids[len(ids)-1]), "--host-key", hostKey}
		}
		if out, err := command("hostcryptd", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("hostcryptd %s: %w: %s", strings.Join(args, " "), err, out)
		}
		if d, err = h.dump(); err != nil {
			return err
		}
		if err := w.mark("header-" + strconv.Itoa(d.Generation)); err != nil {
			return err
		}
	}
	return nil
}

// A replayer does recorded writes again and looks at the outcome.
type replayer struct {
	c     *cutVolume
	log   string
	image string
	rand  *rand.Rand

	entries, flushes, fua, headerMarks int
	durable                            []int64 // entries after which to look at the file system, once it is there
	marks                              map[string]int64
	headers, mounts                    int
}

func (r *replayer) open() (*writeLog, io.Closer, error) {
	f, err := os.Open(r.log)
	if err != nil {
		return nil, nil, err
	}
	l, err := openWriteLog(f)
	if err != nil {
		f.Close()
	}
	return l, f, err
}

type nowhere struct{}

func (nowhere) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

// survey reads the whole record once.
func (r *replayer) survey() error {
	l, f, err := r.open()
	if err != nil {
		return err
	}
	defer f.Close()
	r.marks = map[string]int64{}
	mounted := false
	return l.replay(nowhere{}, func(e *logEntry) error {
		r.entries++
		if e.flags&logFlush != 0 {
			r.flushes++
		}
		if e.flags&logFUA != 0 {
			r.fua++
		}
		if e.mark != "" {
			r.marks[e.mark] = e.number
			mounted = mounted || e.mark == "mounted"
			if strings.HasPrefix(e.mark, "header-") {
				r.headerMarks++
			}
		}
		if e.durable() && mounted {
			r.durable = append(r.durable, e.number)
		}
		return nil
	})
}

// again does the writes on a blank image, see [writeLog.replay].
func (r *replayer) again(after func(*logEntry) error) error {
	l, f, err := r.open()
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := deviceSize(diskBySerial(r.c.fstype))
	if err != nil {
		return err
	}
	image, err := os.Create(r.image)
	if err != nil {
		return err
	}
	defer image.Close()
	if err := image.Truncate(size); err != nil {
		return err
	}
	return l.replay(image, after)
}

// run looks at the header after each flush that follows a change in its area,
// and at the file system after as many flushes, and as many acknowledgements, as
// checks says.
func (r *replayer) run(checks int) error {
	at := map[int64]bool{r.durable[len(r.durable)-1]: true}
	for len(at) < min(checks, len(r.durable)) {
		at[r.durable[r.rand.IntN(len(r.durable))]] = true
	}
	for range checks {
		at[r.marks["record-"+strconv.Itoa(1+r.rand.IntN(loggedRecords))]] = true
	}
	var (
		formatted, touched bool
		acked, generation  int
	)
	return r.again(func(e *logEntry) error {
		touched = touched || e.data != nil && e.offset < headerArea
		switch word, n, _ := strings.Cut(e.mark, "-"); word {
		case "formatted":
			formatted, touched = true, true
		case "record":
			acked, _ = strconv.Atoi(n)
		case "header":
			generation, _ = strconv.Atoi(n)
			touched = true
		}
		if formatted && touched && (e.durable() || e.mark != "") {
			touched = false
			if err := r.checkHeader(generation); err != nil {
				return err
			}
		}
		if !at[e.number] {
			return nil
		}
		if err := r.checkRecords(acked); err != nil {
			return fmt.Errorf("after record %d was acknowledged: %w", acked, err)
		}
		return nil
	})
}

// checkHeader checks that the volume would open, that whatever is wrong with
// its header is that one copy was being written, and that its generation is not
// older than the one that was acknowledged.
func (r *replayer) checkHeader(generation int) error {
	r.headers++
	out, err := command("hostcryptd", "check", r.image, "--json", "--host-key", hostKey, "--pins", "/run/replay-pins").Output()
	if !bytes.Contains(out, []byte(`"opens": true`)) {
		return errors.Join(fmt.Errorf("the volume wouldn't open: %s", out), err)
	}
	h := &headerChanger{m: &machine{disk: r.image}}
	d, err := h.dump()
	if err != nil {
		return err
	}
	if d.Generation < generation {
		return fmt.Errorf("the header is of generation %d, and %d was acknowledged", d.Generation, generation)
	}
	return nil
}

// checkRecords opens a copy of the volume as it is now, and its file system.
func (r *replayer) checkRecords(acked int) error {
	r.mounts++
	c := *r.c
	m := *c.m
	c.m, m.disk = &m, r.image+".copy"
	if err := vmtest.CopySparse(m.disk, r.image); err != nil {
		return err
	}
	defer os.Remove(m.disk)
	os.RemoveAll("/run/replay-pins")
	os.Setenv("HOSTCRYPTD_PINS", "/run/replay-pins")
	if err := c.recover(acked); err != nil {
		unix.Unmount(m.mnt, 0) // or the server never ends
		if c.server != nil && c.server.running() {
			err = errors.Join(err, c.server.detach())
		}
		return err
	}
	return c.server.detach()
}

// control does the writes again, but not those that the last flush before a
// record of the file slots was acknowledged was for: the record must be missing.
// Changes of the header flush too, so that flush is one of the last few.
func (r *replayer) control() error {
	record := 3
	for n := 3; n <= loggedRecords; n++ {
		if r.c.isSlot(n) && r.rand.IntN(loggedRecords/8) == 0 {
			record = n
		}
	}
	i, _ := slices.BinarySearch(r.durable, r.marks["record-"+strconv.Itoa(record)])
	const few = 8
	for back := 2; back < 2+few; back++ {
		if i < back {
			return fmt.Errorf("there are only %d flushes before record %d", i, record)
		}
		err := r.checkAt(r.durable[i-back], record)
		if err == nil {
			continue // that flush was for something else
		}
		if !strings.Contains(err.Error(), "1 of "+strconv.Itoa(record)+" acknowledged records are lost") {
			return fmt.Errorf("control: without the flush before its acknowledgement record %d of the file slots is the only one that may be missing: %w", record, err)
		}
		r.c.m.say("record %d is missing, as it must", record)
		r.c.m.figure("control: records lost without one flush", 1, "")
		return nil
	}
	return fmt.Errorf("control: record %d of the file slots is there also without the last %d flushes before its acknowledgement", record, few)
}

// checkAt does the writes again up to the entry with a number, and checks that
// the records are there.
func (r *replayer) checkAt(number int64, acked int) error {
	err := r.again(func(e *logEntry) error {
		if e.number == number {
			return errStop
		}
		return nil
	})
	if err != nil {
		return err
	}
	return r.checkRecords(acked)
}
