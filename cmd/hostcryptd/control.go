package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"hostcryptd/keyunseal/audit"
	"hostcryptd/keyunseal/lifecycle"
	"hostcryptd/sector"
)

// The control socket speaks HTTP on a Unix socket of mode 0600, to root and to
// the user that the daemon runs as:
//
//	GET  /v1/status   the daemon's state, a [status]
//	POST /v1/lock     wipe the keys now; 204 when they are gone, 409 if they are the
//	                  last to the data, unless with ?force=true
//	POST /v1/unlock   undo that, or try to unseal now; 204 at once
//	POST /v1/reload   have the program that is on disk take over: 202 when this
//	                  server leaves, 409 with the reason if it stays
//	POST /v1/erase    stop, wipe the keys and destroy every way into the volume of
//	                  ?uuid=: 200 with an [eraseAnswer], 409 if nothing was done
//	POST /v1/header   the header was changed; the body is what it is now, a
//	                  [sector.Known]: 204 when that counts, 409 with the reason if
//	                  not; with ?accepted=true it may be of an older generation
//	GET  /v1/repair   what a repair of the header on the disk would do, a
//	                  [sector.HeaderRepair]; errors as of POST
//	POST /v1/repair   write the header back that the server knows: a
//	                  [sector.HeaderRepair]. With ?force=true&saved=SHA-256 also over
//	                  something else, of which the sum is. The exit code of an error
//	                  is in its header "Exit-Code"
//	POST /v1/resize   take the room that the backing device has now: a [resized],
//	                  409 if it can't be done now, 422 if the device or its
//	                  header doesn't allow it
//	POST /v1/detach   stop, and answer when the volume is closed: 204 if all is
//	                  well, 500 with the reason if something was lost, 409 if
//	                  the kernel device is in use, or as of lock, and nothing was done
//
// Both ends are in this file.

// runDir holds the control sockets, one per volume, named by its UUID.
const runDir = "/run/hostcryptd"

// serveControl starts the control socket and returns how to stop it.
func (d *daemon) serveControl() (stop func(), err error) {
	name := d.opts.control
	if name == "" {
		dir := controlDir()
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("control socket: %w; --control puts it elsewhere", err)
		}
		name = filepath.Join(dir, d.uuid+".sock")
	}
	l, err := d.listenControl(name)
	if err != nil {
		if exitCode(err) == codeBusy {
			err = fmt.Errorf("%w; is this volume served already?", err)
		} else if errors.Is(err, unix.EACCES) {
			err = fmt.Errorf("%w; %s", err, notRoot)
		}
		return nil, fmt.Errorf("control socket: %w", err)
	}
	d.keeps("--control", &name, l)
	d.opts.control = name

	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		d.readTokens(statusTimeout)
		json.NewEncoder(w).Encode(d.status())
	})
	mux.HandleFunc("POST /v1/detach", func(w http.ResponseWriter, r *http.Request) {
		if why := d.wouldLose(r, guardTimeout); why != "" {
			http.Error(w, why, http.StatusConflict)
			return
		}
		if err := d.requestDetach(); err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		<-d.finished
		if d.leaving { // the request came with another for a new server, and was too late
			http.Error(w, "another server goes on with the volume; ask that one", http.StatusConflict)
			return
		}
		if d.result != nil {
			http.Error(w, d.result.Error(), http.StatusInternalServerError)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("POST /v1/reload", func(w http.ResponseWriter, r *http.Request) {
		if d.link == nil {
			http.Error(w, "without --attach there is nothing to reload: its clients have to connect again in any case, so stop the server and start it", http.StatusConflict)
			return
		}
		d.mu.Lock()
		early := d.state == stateUnsealing && d.index < 0
		d.mu.Unlock()
		if early {
			http.Error(w, d.opts.device+" is not unsealed yet, so there is nothing to take over: stop the server and start it", http.StatusConflict)
			return
		}
		refusal := d.link.nextRefusal()
		if err := d.link.send(keeperMessage{Reload: true}, nil); err != nil {
			http.Error(w, "the keeper is not there any more: "+err.Error(), http.StatusConflict)
			return
		}
		select {
		case <-refusal.came:
			http.Error(w, refusal.why, http.StatusConflict)
		case <-d.link.leaving():
			w.WriteHeader(http.StatusAccepted)
		case <-r.Context().Done():
		}
	})
	mux.HandleFunc("POST /v1/erase", func(w http.ResponseWriter, r *http.Request) {
		// Who has begun it and goes away has begun it.
		answer, err := d.erase(context.WithoutCancel(r.Context()), r.URL.Query().Get("uuid"))
		if err != nil {
			status := http.StatusInternalServerError
			if exitCode(err) == codeBusy {
				status = http.StatusConflict
			}
			http.Error(w, err.Error(), status)
			return
		}
		json.NewEncoder(w).Encode(answer)
	})
	mux.HandleFunc("POST /v1/header", func(w http.ResponseWriter, r *http.Request) {
		var k sector.Known
		err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20)).Decode(&k)
		if err == nil {
			err = d.takeHeader(r.Context(), &k, r.URL.Query().Get("accepted") == "true")
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("POST /v1/flush-failed", func(w http.ResponseWriter, r *http.Request) {
		d.mu.Lock()
		v := d.volume
		d.mu.Unlock()
		if v != nil && !v.ReadOnly() && !v.Failed() {
			d.log.Error("the volume has failed: a flush of its disk by a command that changes the header has, and what was written before may be lost")
			v.Fail()
		}
	})
	mux.HandleFunc("/v1/repair", d.serveRepair)
	mux.HandleFunc("POST /v1/resize", d.serveResize)
	for path, command := range map[string]struct {
		event string
		run   func(*lifecycle.Runner, context.Context) error
	}{
		"/v1/lock":   {audit.Lock, (*lifecycle.Runner).Lock},
		"/v1/unlock": {audit.Unlock, (*lifecycle.Runner).Unlock},
	} {
		mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
			d.mu.Lock()
			life := d.life
			d.mu.Unlock()
			done := audit.Record{Event: command.event, Outcome: audit.OK}
			fail := func(status int, why, detail string) {
				done.Outcome, done.Detail = audit.Failed, detail+why
				d.record(done)
				http.Error(w, why, status)
			}
			if life == nil {
				fail(http.StatusConflict, "the daemon is starting", "")
				return
			}
			if d.opts.randomKey && command.event == audit.Unlock {
				fail(http.StatusConflict, "the volume's key was random; once it is wiped nothing brings it back", "")
				return
			}
			if command.event == audit.Lock {
				if why := d.wouldLose(r, guardTimeout); why != "" {
					fail(http.StatusConflict, why, "")
					return
				}
			}
			if command.event == audit.Unlock && life.Snapshot().State == lifecycle.Erased {
				fail(http.StatusConflict, "the volume was erased; nothing brings it back", "")
				return
			}
			if err := command.run(life, r.Context()); errors.Is(err, lifecycle.ErrEnded) {
				fail(http.StatusConflict, "the server leaves the volume, to another or for good; ask again", "")
				return
			} else if err != nil {
				fail(http.StatusInternalServerError, err.Error(), "not waited for: ")
				return
			}
			d.record(done)
			w.WriteHeader(http.StatusNoContent)
		})
	}
	server := &http.Server{
		Handler: mux, ReadTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10,
		ErrorLog: zap.NewStdLog(d.log),
	}
	done := make(chan bool)
	go func() {
		defer close(done)
		server.Serve(&peerListener{l})
	}()
	return func() {
		l.SetUnlinkOnClose(!d.leaving && !d.unchanged())
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if server.Shutdown(ctx) != nil {
			server.Close()
		}
		<-done
	}, nil
}

// notRoot is what can be done where runDir is root's.
const notRoot = "without root, name a place by --control, or set XDG_RUNTIME_DIR, which su, sudo and cron leave out (/run/user/UID)"

// listenControl makes the control socket, or goes on with that of the server
// before.
func (d *daemon) listenControl(name string) (*net.UnixListener, error) {
	held, err := d.link.heldListener(heldControl)
	if held != nil {
		return held.(*net.UnixListener), nil
	}
	if err != nil {
		return nil, err
	}
	l, err := listenUnix(name)
	if err != nil {
		return nil, err
	}
	return l, d.link.holdListener(heldControl, l)
}

// controlDir is runDir, or for an ordinary user the place that systemd gives
// him.
func controlDir() string {
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" && os.Geteuid() != 0 {
		return filepath.Join(dir, "hostcryptd")
	}
	return runDir
}

// A peerListener accepts only root and the user that this process runs as. The
// socket's mode says the same, but who made its directory may not have.
type peerListener struct{ *net.UnixListener }

func (l *peerListener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		if uid, err := peerUID(c); err == nil && (uid == 0 || uid == os.Geteuid()) {
			return c, nil
		}
		c.Close()
	}
}

func peerUID(c *net.UnixConn) (uid int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); cerr != nil || err != nil {
		return 0, errors.Join(cerr, err)
	}
	return int(cred.Uid), nil
}

// requestDetach makes the daemon stop, unless that would take a device from
// under somebody.
func (d *daemon) requestDetach() error {
	d.mu.Lock()
	attached, index, state := d.attached, d.index, d.state
	d.mu.Unlock()
	if state == stateUnsealing {
		return fmt.Errorf("%s is not unsealed yet; a signal ends the server", d.opts.device)
	}
	var claimed *os.File
	if attached != "" {
		var err error
		if claimed, err = d.claim(index); err != nil {
			return err
		}
	}
	select {
	case d.detach <- claimed:
	default: // it was asked already
		claimed.Close()
	}
	return nil
}

// wouldLose says why a request to lock or detach needs ?force=true, or "": what it
// wipes are the last keys to the data. It looks at the disk for no longer than limit.
func (d *daemon) wouldLose(r *http.Request, limit time.Duration) string {
	d.mu.Lock()
	v := d.volume
	d.mu.Unlock()
	if r.URL.Query().Get("force") == "true" || v == nil || v.Suspended() {
		return "" // or there are none
	}
	if d.opts.randomKey {
		if r.URL.Path == "/v1/lock" {
			return "the volume's key is random and stored nowhere: to lock it is to destroy its data for ever, which --force does"
		}
		return ""
	}
	lost := d.lastKey(limit, authTimeout)
	if lost == "" {
		return ""
	}
	return "the header on " + d.opts.device + " " + lost + "; 'hostcryptd header repair " + d.uuid + "' writes the header back; if that can't be, copy the data first, or, if you have a backup of the header, go on with --force and 'hostcryptd header restore' it then; nothing was changed"
}

// lastKey says what the header on the disk is that it opens the volume no more, one of
// the lost constants, or "". It looks at the disk for no longer than limit. Of a header
// that isn't the one that is known only the key tells, for which it waits for no longer
// than auth; with 0 it goes by what the last look with the key has told.
func (d *daemon) lastKey(limit, auth time.Duration) string {
	seen := d.readTokens(limit)
	d.mu.Lock()
	lost, unknown, h := d.lost, d.unknown, d.lifeHost
	d.mu.Unlock()
	if lost != "" || seen && !unknown || h == nil {
		return lost
	}
	if seen && auth > 0 {
		looked := make(chan struct{})
		go func() {
			h.tokens(context.Background()) // it has a limit of its own
			close(looked)
		}()
		select {
		case <-looked:
		case <-time.After(auth):
			return lostUnknown
		}
		// It may have been under way since before the header was replaced.
		seen = d.readTokens(limit)
		d.mu.Lock()
		lost, unknown = d.lost, d.unknown
		d.mu.Unlock()
		if lost != "" {
			return lost
		}
		if seen && unknown && h.fault() == nil {
			return lostUnknown
		}
	}
	switch f := h.fault(); {
	case seen && auth == 0 && (f == nil || f.lost == lostGone):
		return lostUnknown // since the last look with the key
	case f != nil:
		return f.lost
	}
	return ""
}

// warnLastKey says what a server takes along that can't be asked to stay.
func (d *daemon) warnLastKey() {
	if d.opts.randomKey || d.volume.Suspended() {
		return
	}
	if lost := d.lastKey(statusTimeout, 0); lost != "" {
		d.log.Error("the header on the disk "+lost+", which is wiped now: only a backup of the header opens the volume again", zap.String("device", d.opts.device))
	}
}

// What the header on the disk of a volume is that it opens no more.
const (
	lostGone    = "is gone, and this server has the last key to the data"
	lostAnother = "is that of another volume, and this server has the last key to the data"
	lostForged  = "is not authentic, and this server may have the last key to the data"
	lostUnknown = "is not the one that this server knows, and nothing has authenticated it, so this server may have the last key to the data"
)

// readTokens notes which tokens the header has, and tells whether it could in limit. A
// disk that hangs or fails is not waited for longer: what was noted before stays, and
// nobody else asks the disk meanwhile, but waits for the look that is under way.
func (d *daemon) readTokens(limit time.Duration) (seen bool) {
	if d.opts.randomKey {
		return false
	}
	d.mu.Lock()
	look := d.tokensLook
	if look == nil {
		look = &tokensLook{done: make(chan struct{})}
		d.tokensLook = look
		go func() {
			look.seen = d.lookAtTokens()
			d.mu.Lock()
			d.tokensLook = nil
			d.mu.Unlock()
			close(look.done)
		}()
	}
	d.mu.Unlock()
	select {
	case <-look.done:
		return look.seen
	case <-time.After(limit):
		return false
	}
}

// A tokensLook is a call of lookAtTokens.
type tokensLook struct {
	done chan struct{} // closed when seen is there
	seen bool
}

func (d *daemon) lookAtTokens() (seen bool) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	h, copies, err := sector.ReadHeader(ctx, d.device)
	var list []tokenInfo
	damage, lost := "", ""
	d.mu.Lock()
	v := d.volume
	d.mu.Unlock()
	unknown := false
	switch {
	case err == nil && h.UUID != d.uuid:
		damage, lost = "is that of another volume, "+h.UUID+": this one goes on, and won't open again before "+d.wayBack(v), lostAnother
	case err == nil:
		if copies.Damaged() {
			damage = copies.Describe() + "; 'hostcryptd header repair' repairs it"
		}
		if unknown = v != nil && !v.Knows(h); unknown {
			damage = "is not the one that this server knows, nor authenticated yet; the next look at the key does that"
		}
		list = slices.DeleteFunc(tokenInfos(h), func(t tokenInfo) bool { return t.Key == nil && t.Error == "" })
	case errors.Is(err, sector.ErrNotVolume) || errors.Is(err, sector.ErrDamaged):
		damage, lost = headerGone+d.wayBack(v)+": "+copies.Describe(), lostGone // and its tokens with it
	default:
		return false
	}
	d.mu.Lock()
	d.tokens, d.damage, d.lost, d.unknown = list, damage, lost, unknown
	d.mu.Unlock()
	return true
}

// statusTimeout is less than what a client waits for a status. guardTimeout is for who
// asks to wipe the keys: a disk that hangs must not keep them, and a busy one not hide
// that they are the last. authTimeout is for the look with the key that may tell.
const (
	statusTimeout = time.Second
	guardTimeout  = 3 * time.Second
	authTimeout   = 10 * time.Second
)

// A controlClient talks to the control socket of one daemon.
type controlClient struct {
	path string
	http http.Client
}

func newControlClient(path string) *controlClient {
	c := &controlClient{path: path}
	c.http.Transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}}
	return c
}

func (c *controlClient) do(ctx context.Context, method, path string, answer any) error {
	return c.send(ctx, method, path, nil, answer)
}

func (c *controlClient) send(ctx context.Context, method, path string, body []byte, answer any) error {
	r, err := http.NewRequestWithContext(ctx, method, "http://hostcryptd"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := c.http.Do(r)
	if errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%s: %w; it answers root and the user that its server runs as", c.path, reasonOf(err))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", c.path, reasonOf(err))
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", c.path, err)
	case resp.Header.Get(exitCodeHeader) != "":
		code, _ := strconv.Atoi(resp.Header.Get(exitCodeHeader))
		return withCode(cmp.Or(code, codeUsage), errors.New(string(bytes.TrimSpace(b))))
	case resp.StatusCode == http.StatusNotFound:
		return fmt.Errorf("%s: %w", c.path, errOtherVersion)
	case resp.StatusCode == http.StatusConflict:
		return withCode(codeBusy, errors.New(string(bytes.TrimSpace(b))))
	case resp.StatusCode == http.StatusUnprocessableEntity:
		return withCode(codeDevice, errors.New(string(bytes.TrimSpace(b))))
	case resp.StatusCode/100 != 2:
		return fmt.Errorf("%s: %s", c.path, bytes.TrimSpace(b))
	case answer == nil:
		return nil
	}
	return json.Unmarshal(b, answer)
}

// exitCodeHeader has the exit code of an error, where there is more to tell than a status
// of HTTP can.
const exitCodeHeader = "Exit-Code"

// errOtherVersion is the error of a server that was asked for something that it doesn't know.
var errOtherVersion = errors.New("its server is of another version, which can't do that; 'hostcryptd reload' has this one take over")

// reasonOf takes the URL out of an HTTP client's error: it means nothing here.
func reasonOf(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return op.Err
	}
	if u, ok := errors.AsType[*url.Error](err); ok && u.Timeout() {
		return errors.New("its server doesn't answer: it hangs, or is stopped")
	} else if ok {
		return errors.New("no answer of a hostcryptd control socket: it is another one, such as that of --listen, or its server has just ended")
	}
	return err
}

// controlEnv names the control socket of a server that commands are to tell of what
// they do to its volume, where that isn't in its usual place.
const controlEnv = "HOSTCRYPTD_CONTROL"

// tellServer tells the server of a volume, if there is one, what its header is now.
// What it isn't told it finds at its next look. accepted is for [sector.Volume.Learn].
func tellServer(ctx context.Context, volume string, k *sector.Known, accepted bool) error {
	body, err := json.Marshal(k)
	if err != nil {
		return err
	}
	return postServer(ctx, volume, fmt.Sprintf("/v1/header?accepted=%t", accepted), body)
}

// tellFlushFailed tells the server of the volume on a device, if there is one, that a flush
// of the device has failed here: a disk tells once that it has lost its cache, and the next
// flush of the server may succeed.
func tellFlushFailed(d *sector.Device) error {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	volume := ""
	if h, _, err := sector.ReadHeader(ctx, d); err == nil && sector.CheckUUID(h) == nil {
		volume = h.UUID
	}
	return postServer(ctx, volume, "/v1/flush-failed", nil)
}

// postServer sends what the server of a volume is told, if there is one.
func postServer(ctx context.Context, volume, what string, body []byte) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	path := cmp.Or(os.Getenv(controlEnv), filepath.Join(controlDir(), volume+".sock"))
	if _, err := os.Stat(path); err != nil {
		return nil
	}
	if err := newControlClient(path).send(ctx, "POST", what, body, nil); !nobodyThere(err) {
		return err
	}
	return nil
}

// running returns the status of every daemon that which may mean: a control
// socket, a UUID, a label, a backing or kernel device; "" means all.
func running(ctx context.Context, which string) ([]*status, error) {
	var paths []string
	named := false
	if fi, err := os.Stat(which); err == nil && fi.Mode()&os.ModeSocket != 0 {
		paths, which, named = []string{which}, "", true
	} else {
		paths, _ = filepath.Glob(filepath.Join(controlDir(), "*.sock"))
		if p := os.Getenv(controlEnv); p != "" && !slices.Contains(paths, p) {
			paths = append(paths, p)
		}
	}
	all, errs := askAll(ctx, paths)
	list, failed := []*status{}, []error{}
	for i, s := range all {
		switch {
		case errs[i] == nil:
			list = append(list, s)
		case nobodyThere(errs[i]) && !named:
		default:
			failed = append(failed, errs[i])
		}
	}
	if which != "" {
		list = called(list, which)
	}
	if len(failed) > 0 && (which == "" || len(list) == 0) {
		return list, errors.Join(failed...)
	}
	if which != "" && len(list) == 0 {
		return nil, withCode(codeDevice, fmt.Errorf("no volume %q is being served; 'hostcryptd status' lists those that are", which))
	}
	return list, nil
}

// askAll returns the status of the daemon of each control socket, or why there is none.
// One that doesn't answer doesn't hide the others.
func askAll(ctx context.Context, paths []string) ([]*status, []error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	all, errs := make([]*status, len(paths)), make([]error, len(paths))
	var asking sync.WaitGroup
	for i, p := range paths {
		asking.Go(func() {
			all[i] = &status{}
			errs[i] = newControlClient(p).do(ctx, "GET", "/v1/status", all[i])
		})
	}
	asking.Wait()
	return all, errs
}

// nobodyThere tells whether a socket was left behind by a daemon that was killed, or has
// just been removed by one that ended.
func nobodyThere(err error) bool {
	return errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT)
}

// notServed returns an error if a server of this host serves a volume, or if that can't
// be told. Whatever name the disk has: device-mapper has more of them than OpenDevice
// can see through.
func notServed(ctx context.Context, uuid string) error { return notServedIn(ctx, controlDir(), uuid) }

// notServedIn is notServed of the servers whose control sockets are in dir.
func notServedIn(ctx context.Context, dir, uuid string) error {
	paths, _ := filepath.Glob(filepath.Join(dir, "*.sock"))
	all, errs := askAll(ctx, paths)
	for i, s := range all {
		if errs[i] == nil && s.UUID == uuid {
			return withCode(codeBusy, fmt.Errorf("volume %s is being served from %s", uuid, s.Device))
		}
	}
	for i, path := range paths {
		name := strings.TrimSuffix(filepath.Base(path), ".sock")
		switch {
		case errs[i] == nil, nobodyThere(errs[i]):
		case name == uuid:
			return withCode(codeBusy, fmt.Errorf("volume %s has a server on this host that can't be asked; it has to end first: %w", uuid, errs[i]))
		case !sector.IsUUID(name): // else it's that of another volume
			return withCode(codeBusy, fmt.Errorf("a server on this host can't be asked whether it serves volume %s; 'hostcryptd status' shows the others, and it has to answer or end first: %w", uuid, errs[i]))
		}
	}
	return nil
}

// theOne returns the status of the one daemon that which names.
func theOne(ctx context.Context, which string) (*status, error) {
	list, err := running(ctx, which)
	if err != nil {
		return nil, err
	}
	if len(list) > 1 {
		return nil, usagef("%d volumes are called %q; name one by its UUID, or by its control socket, which 'hostcryptd status --json' shows", len(list), which)
	}
	return list[0], nil
}

// called returns those of a list that which may mean. What is nobody else's business
// comes first: a label is on a disk, which somebody may have made to be taken for
// another.
func called(list []*status, which string) []*status {
	for _, is := range []func(*status) bool{
		func(s *status) bool { return strings.EqualFold(which, s.UUID) },
		func(s *status) bool { return s.Name != "" && which == s.Name },
		func(s *status) bool { return s.is(which) },
	} {
		if found := slices.DeleteFunc(slices.Clone(list), func(s *status) bool { return !is(s) }); len(found) > 0 {
			return found
		}
	}
	return nil
}

func (s *status) is(which string) bool {
	if which == s.UUID || s.Name != "" && which == s.Name || which == s.Label || which == s.Device || which == s.Attached || which == s.Listen {
		return true
	}
	return sameFile(which, s.Device)
}

// sameFile tells whether two names lead to one device or file.
func sameFile(name, other string) bool {
	a, err1 := os.Stat(name)
	b, err2 := os.Stat(other)
	return err1 == nil && err2 == nil && os.SameFile(a, b)
}

const whichHelp = `The volume is named by its name in hostcrypttab, its label or UUID, its backing or
kernel device, or by the daemon's control socket.`
