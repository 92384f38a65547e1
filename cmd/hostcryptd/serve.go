package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"hostcryptd/keyunseal/audit"
	"hostcryptd/keyunseal/lifecycle"
	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdnl"
	"hostcryptd/sector"
	"hostcryptd/sector/luks2"
	"hostcryptd/systemd"
	"hostcryptd/xts"
)

// A volume is what the NBD server serves.
var _ nbd.Device = (*sector.Volume)(nil)

// serveOptions are the flags of serve.
type serveOptions struct {
	device, name  string
	uuid          string // of the volume that is meant, or ""
	makesFS       bool   // the unit makes a file system or swap on it when it is ready
	keys          keyFlags
	life          lifeFlags
	listen        string
	tcp           string
	certificates  string
	attach        string
	connections   int
	control       string
	readOnly      bool
	discard       bool
	direct        bool
	swap          bool
	randomKey     bool
	sectorSize    int  // with randomKey
	force         bool // with randomKey: whatever is on the device
	unsealTimeout time.Duration
	requirePin    bool
	initrd        bool

	tls *certificateFiles // of certificates
}

func (a *app) serveCommand() *cobra.Command {
	var o serveOptions
	c := &cobra.Command{
		Use:   "serve DEVICE|NAME",
		Short: "serve a volume, in the foreground",
		Long: `serve unseals the volume on DEVICE and serves it until SIGTERM or 'hostcryptd
detach'. An argument without a slash is a NAME in ` + tabFile + `, if it is
there; a file of that name is ./NAME.

--listen offers the volume on a Unix socket, for QEMU and libnbd clients; --attach
makes it a device of this kernel; --tcp lets other hosts connect, by TLS and with
a certificate. All appear only when the volume is ready. Sockets that a service
manager or a client has opened (systemd's socket activation) are served too. As
long as the vault can't be reached, serve waits and tries again.

On SIGTERM it stops taking requests, answers those it has, flushes, detaches and
wipes the keys. While the kernel device is mounted or otherwise in use it waits,
since to go would be to lose what was not yet written.

--swap is for swap, or anything else that this machine needs in order to get memory
free. The server and its keeper then lock their memory, run with real-time priority,
and another server stands by; they take about 100 MiB. It raises vm.min_free_kbytes
if that is low, and refuses to start where it can't keep its promise. 'hostcryptd
status' shows whether it does.

With --random-key the whole of DEVICE is encrypted with a key that is drawn now and
stored nowhere, as swap and temporary files want it; no header is read or written,
and what is on DEVICE is lost. A device that carries anything but swap that blkid
knows, such as a file system, LUKS or a partition table, is refused without --force.
When the server stops, or is locked, the data is gone; it survives only the death
of the server with --attach.

With --attach there are two processes: a keeper, which was started, and its child,
the server. If the server is killed or crashes, the keeper starts another one, which
needs neither the vault nor the program's file; I/O waits meanwhile, for up to some 5
seconds, and no request fails. Clients of --listen and --tcp have to connect again. If
both are killed, I/O waits for up to an hour for 'serve' to be started again with the
same volume; what is encrypted with --random-key is lost then.

Give a volume with --on-revocation freeze an --audit-log that is not on itself. As long
as it waits for the key, a server that writes there waits for the volume that it serves,
and no signal ends a process that waits so: if it's killed, nothing takes its place
before the next boot. 'hostcryptd reload' and a restart work.

'hostcryptd reload', or SIGHUP to the keeper, has the program that is installed now
take over from both, while the volume is in use; so does 'systemctl restart' of a unit
with FileDescriptorStoreMax=. A line of ` + tabFile + ` that turns out to be of no
use then is logged, and the volume goes on with the one that it had.

A line of ` + tabFile + ` has the form of crypttab(5): name, device, key and options,
which are flags without their dashes and words of crypttab. hostcrypttab(5) describes
them. Each line is a service, 'systemctl status hostcryptd@NAME'.

--initrd is for scripts of an initramfs that attach what the root file system is on.
The command returns when the volume is ready, and prints its kernel device; what it
has started runs until 'hostcryptd detach' or the end of the machine. It moves to the
real root when PID 1 does, logs to the kernel, and has the mark, an @ in front of its
name, of processes that systemd doesn't kill.`,
		Example: `  hostcryptd serve /dev/sdb --attach auto
  hostcryptd serve disk.img --listen /run/disk.sock --control /run/disk.control
  hostcryptd serve /dev/disk/by-partlabel/swap --swap --random-key --attach /dev/nbd8`,
		Args: oneArg("DEVICE or NAME"),
		RunE: func(c *cobra.Command, args []string) error { return a.serve(c, &o, args[0]) },
	}
	f := c.Flags()
	o.keys.add(c)
	c.PreRunE = nil // the file of --signer may be named by hostcrypttab
	o.life.add(c)
	f.StringVar(&o.listen, "listen", "", "offer the volume on this Unix `SOCKET`; chown it to let another user connect")
	f.StringVar(&o.tcp, "tcp", "", "offer the volume on this TCP `ADDRESS:PORT`; needs --tls-certificates unless it is a loopback address")
	f.StringVar(&o.certificates, "tls-certificates", "", tlsHelp)
	f.StringVar(&o.attach, "attach", "", "attach the volume to the kernel: auto or `/dev/nbdN`")
	f.IntVar(&o.connections, "connections", 1, "`NUMBER` of sockets between the kernel and the server; several only with --read-only")
	f.StringVar(&o.control, "control", "", "control `SOCKET`; commands that change the header tell the server there, if it is the default or in $"+controlEnv+" (default "+filepath.Join(runDir, "UUID.sock")+")")
	f.BoolVar(&o.readOnly, "read-only", false, "refuse writes, and write nothing to the device")
	f.BoolVar(&o.direct, "direct", false, "keep an image file out of the page cache (O_DIRECT), as block devices are")
	f.BoolVar(&o.discard, "discard", false, "pass discards on to the device, which shows an observer what is not in use")
	f.BoolVar(&o.swap, "swap", false, "make it safe to have swap of this machine on the kernel device")
	f.BoolVar(&o.randomKey, "random-key", false, "encrypt all of DEVICE with a random key that is stored nowhere; its content is lost")
	f.IntVar(&o.sectorSize, "sector-size", 4096, "with --random-key: size of an encrypted sector in `BYTES`, 512 or 4096")
	f.BoolVar(&o.force, "force", false, "with --random-key: take DEVICE whatever it carries")
	f.BoolVar(&o.requirePin, "require-pin", false, "refuse a volume that this host has neither formatted nor opened before, instead of trusting it at first sight")
	f.Var((*uuidFlag)(&o.uuid), "uuid", "refuse any volume but that with this `UUID`, whatever is on DEVICE")
	f.BoolVar(&o.initrd, "initrd", false, "go to the background when the volume is ready, print its kernel device, and live on in the real root until the power is off: for an initramfs")
	f.DurationVar(&o.unsealTimeout, "unseal-timeout", 0, "give up when the volume was not unsealed in this `TIME` (default: never)")
	return c
}

// serve is what serve does, from the command line to the end: first which of the processes
// this one is, see keeper.go, and then, in a server, a daemon.
func (a *app) serve(c *cobra.Command, o *serveOptions, arg string) error {
	// A line of log that nobody can receive is an error, and not the end: at
	// shutdown the journal stops before this does.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	crashOnPanic()
	// Before anything that could fail: this process must go on.
	if resumed, err := a.resume(); resumed {
		return err
	}
	line, goesOn := storedLine()
	if err := o.settle(c, arg, goesOn); err != nil {
		return a.withStoredLine(line, err)
	}
	inherited, files, err := systemd.Inherited(storedPrefix)
	if err != nil {
		return err
	}
	if o.listen == "" && o.attach == "" && o.tcp == "" && inherited == nil {
		return usagef("nothing to serve to: use --attach auto, --listen SOCKET, --tcp ADDRESS:PORT, or several")
	}
	if _, kept := os.LookupEnv(serverEnv); o.initrd && !kept && os.Getenv(initrdEnv) == "" {
		return a.launch(arg, o.name != "")
	}
	moved, err := liveOn(a.daemonLog(o.attach != ""))
	if err != nil {
		return err
	}
	link, err := openKeeperLink()
	if err != nil {
		return err
	}
	if link == nil && o.attach != "" {
		return a.keep(o.swap, inherited, stored(files))
	}
	ctx, stop := signal.NotifyContext(c.Context(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	d := &daemon{opts: *o, log: a.daemonLog(o.attach != ""), started: time.Now(), detach: make(chan *os.File, 1), headerChanged: make(chan struct{}, 1), resizing: make(chan struct{}, 1), finished: make(chan struct{}), link: link, index: nbdnl.FirstFree, moved: moved}
	signal.Notify(d.hangup(), syscall.SIGHUP)
	var goOn *serverState
	if link != nil {
		goOn, err = link.standBy(ctx, func(reload bool) error {
			if reload && d.opts.tls != nil {
				// Another server serves as long as this one prepares.
				if err := d.opts.tls.check(certificatesLimit); err != nil {
					return err
				}
			}
			return d.prepare()
		})
		if errors.Is(err, errNoTurn) {
			return nil
		}
		if err != nil {
			return err
		}
		d.goesOn = goOn != nil
		if inherited, err = link.inheritedListeners(); err != nil {
			return err
		}
	}
	d.inherited = inherited
	if goOn != nil {
		d.opts.keys.trusted = goOn.trusted(d.opts.keys.signer)
	} else if err := d.opts.keys.readSigner(); err != nil {
		return err
	} else if d.opts.tls != nil {
		if err := d.opts.tls.wait(); err != nil {
			return err
		}
	}
	if o.name != "" && goOn == nil {
		d.waitDevice(ctx, tabDeviceWait)
	}
	go link.listen(d.log)
	watching, stopWatching := context.WithCancel(context.WithoutCancel(ctx))
	go d.watch(watching)
	err = d.run(ctx, goOn)
	stopWatching()
	if o.initrd && o.name != "" && !d.leaving && !d.unchanged() {
		os.Remove(filepath.Join(initrdDir, o.name)) // from here on it's the service's again
	}
	d.log.Sync()
	if !d.leaving && !d.unchanged() {
		// Else it's up to the keeper to try again.
		_ = link.send(keeperMessage{Over: true}, nil)
	}
	return err
}

// crashOnPanic has a panic end this process by SIGABRT. Go's exit code for it is 2,
// which to scripts is a wrong key, and to Restart=on-abnormal no accident. There is no
// core, see harden. What is printed of arguments are words of the stack; keys aren't
// passed by value, and lie elsewhere (TestKeysInMemory).
func crashOnPanic() { debug.SetTraceback("crash") }

// settle makes the options what the command line says, and the line of hostcrypttab
// that arg may name. Nothing is opened or begun, but that with --swap the program may be
// executed again. goesOn says that there is a kernel device to go on with.
func (o *serveOptions) settle(c *cobra.Command, arg string, goesOn bool) error {
	o.device = arg
	if e, err := named(o.device); err != nil {
		return err
	} else if e != nil {
		o.device, o.name = e.unit.Device, e.unit.Name
		o.makesFS = e.unit.MakeFS != ""
		if err := e.apply(c.Flags()); err != nil {
			return err
		}
	}
	if goesOn && o.attach == "" {
		return usagef("there is no --attach, and the volume has a kernel device")
	}
	if err := o.checkSwap(); err != nil {
		return err
	}
	if o.certificates != "" {
		o.tls = readCertificates(o.certificates)
		var err error
		if _, server := os.LookupEnv(serverEnv); goesOn {
			err = o.tls.check(certificatesLimit)
		} else if !server { // which may be there to take over, and can't wait
			err = o.tls.wait()
		}
		if err != nil {
			return err
		}
	}
	if o.tcp != "" {
		if err := checkTCP(o.tcp, o.tls != nil); err != nil {
			return err
		}
	}
	if err := o.checkRandomKey(c.Flags().Changed); err != nil {
		return err
	}
	if o.connections < 1 || o.connections > 64 {
		return usagef("--connections is 1 to 64, not %d", o.connections)
	}
	if o.attach != "" && o.connections > 1 && !o.readOnly {
		// Writes that overlap are ordered once they have begun, not while they
		// wait in the socket that the kernel has given up.
		return usagef("--connections without --read-only: if there are several sockets, the kernel sends a write that has taken 30 s again on another, and the first could still land on what was written since")
	}
	if o.attach != "" && o.connections > 1 && o.life.policy == lifecycle.Freeze.String() {
		// Each request goes to all of them in turn, which are given up one by one.
		return usagef("--on-revocation freeze with --connections: the kernel takes a socket that hasn't answered for 30 s for dead if there are several, and fails all I/O when none was left for an hour; with one it waits")
	}
	if o.attach != "" && o.attach != "auto" {
		if _, err := nbdnl.ParsePath(o.attach); err != nil {
			return usagef("--attach is auto or /dev/nbdN, not %q", o.attach)
		}
	}
	// Others see these paths in the status, from other directories.
	for _, p := range []*string{&o.device, &o.listen, &o.control} {
		if *p == "" {
			continue
		}
		abs, err := filepath.Abs(*p)
		if err != nil {
			return err
		}
		*p = abs
	}
	if o.listen != "" && o.listen == o.control {
		return usagef("--listen and --control are the same socket")
	}
	if o.swap {
		return enterSwapMode()
	}
	return nil
}

// A daemon serves one volume: one data key per address space.
type daemon struct {
	opts    serveOptions
	log     *zap.Logger
	started time.Time

	inherited []net.Listener // from the service manager

	link     *keeperLink      // nil without a kernel device
	handover *sector.Handover // the same
	served   bool             // has been ready
	gone     bool             // the kernel device is
	goesOn   bool             // it began with the state of another server
	leaving  bool             // another server goes on
	parked   bool             // requests waited for a key when it left
	keyLost  bool             // there should have been one in handover
	ending   atomic.Bool      // it stops, and nobody is going to ask for the key again
	stopLife func()           // ends the life of the key
	memory   *nbd.Memory      // made by prepare, or nil
	moved    <-chan struct{}  // see liveOn

	// Of the kernel, guarded by mu.
	kernelSockets []*nbd.Socket // in use
	leftSockets   []*nbd.Socket // in use by nobody

	// detach receives a request to stop, with the kernel device opened
	// exclusively, or nil if there is none. finished is closed when the volume
	// is closed; result is then what stopping gave.
	detach   chan *os.File
	finished chan struct{}
	result   error

	// mu guards what the control socket shows while it changes.
	mu       sync.Mutex
	state    string // see the state constants
	stateErr string // what the state is waiting for
	life     *lifecycle.Runner
	lifeHost *keyHost
	device   *sector.Device
	uuid     string
	label    string
	volume   *sector.Volume
	server   *nbd.Server
	tcp      string // the address of --tcp
	attached string // "/dev/nbd0"
	index    int    // of that, or nbdnl.FirstFree
	left     serverState
	tokens   []tokenInfo // that the header had when it was last looked at
	damage   string      // of the header then
	lost     string      // why that opens nothing, one of the lost constants, or ""
	unknown  bool        // that isn't the one that the volume knows

	tokensLook    *tokensLook   // that is under way, or nil
	headerChanged chan struct{} // capacity 1: to watchHeader
	resizing      chan struct{} // capacity 1: full while the volume grows, and from when it is left
	sizing        sync.Mutex    // held while the kernel changes the size of its device, and while requests begin to wait for a key
	pushing       sync.Mutex    // held while the keeper is told a state: the last must be the newest
	heldHeader    *os.File      // what the keeper was given for heldHeader; guarded by pushing
	keptBefore    *os.File      // what the server before had given it, or nil
}

// States of a daemon, as status shows them.
const (
	stateUnsealing = "unsealing"
	stateServing   = "serving"
	stateStopping  = "stopping"
)

// run puts the parts together, in the order in which they depend on each
// other, and takes them apart in the reverse order:
//
//	backing device → header → control socket → unsealed volume → NBD server
//	→ Unix socket and kernel device → READY
//
// With before, it goes on where a server ended that was killed.
func (d *daemon) run(ctx context.Context, before *serverState) (err error) {
	if before != nil {
		d.adopt(before)
	}
	d.device, err = d.openDevice(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if !d.leaving && !d.unchanged() { // else it was closed, or ends with the process
			err = errors.Join(err, d.device.Close())
		}
	}()

	if err := d.openHandover(); err != nil {
		return err
	}
	switch {
	case before != nil:
		// No file may be read from here until the kernel's requests are served: it
		// may be on this very volume. That goes for the pin on the real root, too.
		d.left, d.index, d.moved = *before, before.Index, nil
	case d.opts.randomKey:
		err = d.openRandom()
	default:
		err = d.readHeader(ctx)
	}
	if err != nil {
		return err
	}
	if before == nil {
		d.left.TabLine = os.Getenv(tabEnv)
	}
	d.uuid, d.label = d.left.Volume.UUID, d.left.Volume.Label
	if before == nil {
		d.left.Phase = phaseOf(d.uuid)
		d.left.trust(d.opts.keys.signer, d.opts.keys.trusted)
	}
	d.log = d.log.With(zap.String("volume", d.uuid))

	// From here on people can ask how far we are, also while a vault is down.
	life, err := d.opts.life.config(d.left.Phase, d.left.Bits, d.left.Remote)
	if err != nil {
		return err
	}
	d.opts.keys.startAudit(d.log)
	defer d.stopAudit()
	d.setState(stateUnsealing, "")
	stopControl, err := d.serveControl()
	if err != nil {
		return err
	}
	defer stopControl()
	defer func() {
		d.result = err
		close(d.finished)
	}()

	// What can be known to fail should not fail only when a vault has come
	// back after hours.
	if d.opts.listen != "" && before == nil {
		if err := checkSocketPath(d.opts.listen); err != nil {
			return fmt.Errorf("--listen: %w", err)
		}
	}
	if before != nil {
		if err := d.goOn(before); err != nil {
			return err
		}
	}
	end, err := d.startLife(ctx, life, before)
	if err != nil {
		if ctx.Err() != nil {
			d.log.Info("stopped before the volume was unsealed", zap.Error(err))
			return nil // as asked
		}
		return err
	}
	d.stopLife = sync.OnceFunc(end)
	defer func() {
		d.stopLife()
		if d.abrupt() {
			return
		}
		if d.leaving {
			err = errors.Join(err, d.volume.Leave())
			return
		}
		err = errors.Join(err, d.volume.Close()) // wipes the keys
		d.record(audit.Record{Event: audit.Closed, Outcome: audit.OK})
	}()
	for _, w := range d.volume.Warnings() {
		d.log.Warn(w)
	}
	if before == nil && !d.opts.randomKey && d.volume.KeptHeader() == nil {
		d.log.Warn("the header can't be kept in memory now, so it could not be written back if something overwrote it; each look at it tries again")
	}
	for _, name := range xts.Faulty() {
		d.log.Warn("this processor, if it isn't an emulator, is broken: it computes AES wrongly; another implementation is used", zap.String("wrong", name), zap.String("cipher", d.volume.Implementation()))
	}

	server, err := nbd.New(d.serverConfig(), nbd.Export{
		Name: d.exportName(), Description: "hostcryptd volume " + d.uuid,
		Device: d.volume, ReadOnly: d.volume.ReadOnly(), Trim: d.volume.Discards(),
		BlockSize: uint32(d.volume.SectorSize()),
	})
	if err != nil {
		return err
	}
	defer func() {
		if !d.abrupt() {
			err = errors.Join(err, server.Close())
		}
	}()
	d.mu.Lock()
	d.server = server
	d.mu.Unlock()
	return d.serve(ctx)
}

// abrupt tells whether this process ends as if it were killed, and answers no
// request any more: an answer would be an error.
func (d *daemon) abrupt() bool { return d.unchanged() || d.leaving && d.parked }

// unchanged tells whether this server ends before it serves, where another had
// served. The keeper tries again: the key stays for the next one, and the requests
// that the kernel may have sent here are not answered. Their sockets end with this
// process, and the kernel sends them again.
func (d *daemon) unchanged() bool { return d.goesOn && !d.served && !d.gone }

// readHeader reads what is to be known before the volume is unsealed.
func (d *daemon) readHeader(ctx context.Context) error {
	var h *luks2.Header
	limit := time.Duration(0)
	if d.opts.name != "" {
		limit = tabDeviceWait
	}
	err := d.untilRead(ctx, limit, func() (err error) {
		// Who waits in silence is taken for hung.
		locked := time.AfterFunc(2*time.Second, func() {
			d.log.Warn("waiting for another program to release the lock on the header", zap.String("device", d.opts.device))
		})
		defer locked.Stop()
		h, _, err = sector.ReadHeader(ctx, d.device)
		return err
	})
	if err == nil {
		err = sector.CheckUUID(h)
	}
	if err == nil {
		// Not after a vault has come back. What is opened later is held to be this one.
		err = (&sector.OpenOptions{UUID: d.opts.uuid}).CheckUUID(h)
		if err != nil && os.Getenv(initrdEnv) != "" {
			err = fmt.Errorf("%w If it was replaced on purpose, the initramfs has to be made anew, with the new UUID if the line has one; until then a shell in it can change the line in its %s", err, tabFile)
		}
	}
	if err != nil {
		return fmt.Errorf("%s: %w", d.opts.device, err)
	}
	d.left.Volume.UUID, d.left.Volume.Label = h.UUID, h.Label
	d.left.Bits, d.left.Remote = keySize(sector.KeyTokens(h))
	return nil
}

// allowPeer tells who may use the Unix sockets: root, the user that this
// process runs as, and who a socket was given to with chown(1).
func (d *daemon) allowPeer(p nbd.Peer) bool {
	if p.UID == 0 || int(p.UID) == os.Geteuid() {
		return true
	}
	owns := func(name string) bool {
		var st unix.Stat_t
		return unix.Stat(name, &st) == nil && st.Uid == p.UID
	}
	return owns(d.opts.listen) || slices.ContainsFunc(d.inherited, func(l net.Listener) bool {
		return l.Addr().Network() == "unix" && owns(l.Addr().String())
	})
}

// exportName is the label if NBD can have it for a name. cryptsetup can set any.
func (d *daemon) exportName() string {
	if d.label != "" && utf8.ValidString(d.label) {
		return d.label
	}
	return d.uuid
}

// tabDeviceWait is how long serve waits for a device of hostcrypttab, as
// systemd does by default for those of crypttab: early in boot it may not have
// been found yet.
const tabDeviceWait = 90 * time.Second

// hangup returns a channel for SIGHUP. With a keeper, that is the keeper's matter.
func (d *daemon) hangup() chan<- os.Signal {
	c := make(chan os.Signal, 1)
	go func() {
		for range c {
			if d.link == nil {
				d.log.Warn("SIGHUP asks for a reload, which there is with --attach only")
			}
		}
	}()
	return c
}

// untilRead reads again, each second of the time limit, as long as the disk gives errors.
func (d *daemon) untilRead(ctx context.Context, limit time.Duration, read func() error) error {
	for begun := time.Now(); ; {
		err := read()
		if !isReadError(err) || time.Since(begun) >= limit {
			return err
		}
		d.log.Warn("the header can't be read; it's tried again", zap.String("device", d.opts.device), zap.Error(err))
		select {
		case <-ctx.Done():
			return err
		case <-time.After(time.Second):
		}
	}
}

// waitDevice waits for the backing device to be there.
func (d *daemon) waitDevice(ctx context.Context, limit time.Duration) {
	for begun, said := time.Now(), false; time.Since(begun) < limit; {
		if _, err := os.Stat(d.opts.device); !errors.Is(err, os.ErrNotExist) {
			return
		}
		if !said {
			said = true
			d.log.Info("waiting for the device", zap.String("device", d.opts.device))
			d.notify(systemd.Status("waiting for %s", d.opts.device))
		}
		select {
		case <-ctx.Done():
			return // run will say what is missing
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// serve offers the volume until it is told to stop.
func (d *daemon) serve(ctx context.Context) (err error) {
	// The server's own context: it goes on while a signal waits for the kernel
	// device to be free.
	clientCtx, stopClients := context.WithCancelCause(context.WithoutCancel(ctx))
	serveCtx, stopServing := context.WithCancelCause(context.WithoutCancel(ctx))
	var clients, serving sync.WaitGroup // serving: the kernel
	if !d.goesOn || d.left.Connections == 0 {
		d.mu.Lock()
		d.left.Connections = d.opts.connections
		d.mu.Unlock()
	} else if d.left.Connections != d.opts.connections {
		d.log.Warn("the kernel device keeps its number of sockets; --connections counts when it is attached anew", zap.Int("sockets", d.left.Connections))
	}
	failed := make(chan error, 3+len(d.inherited)) // with a kernel device nothing but nil, see keepConnected

	var (
		k       *kernelDevice
		claimed *os.File // k, opened exclusively: nobody uses it
	)
	defer func() {
		if d.leaving || d.unchanged() {
			return
		}
		// Stop reading, answer what was accepted, flush; then the caller wipes
		// the keys and closes the device. The kernel device goes first, while
		// the server still answers: what the kernel holds back until the last
		// moment must reach the disk.
		d.setState(stateStopping, "")
		d.notify(systemd.Stopping, systemd.Status("stopping"))
		d.ending.Store(true)
		if d.volume.Suspended() {
			// Nothing waits for a key any more that nobody is going to ask for. If the
			// key goes from here on, Halt does the same.
			_ = d.volume.Suspend(sector.SuspendRefuse)
		}
		if k != nil {
			err = errors.Join(err, d.release(k, claimed))
			d.forgetUdev(k.index)
		}
		stopClients(errStopping)
		stopServing(errStopping)
		clients.Wait()
		serving.Wait()
		if !d.volume.ReadOnly() {
			// A volume that was suspended was flushed then.
			if serr := d.volume.Sync(); !errors.Is(serr, sector.ErrSuspended) {
				err = errors.Join(err, serr)
			}
		}
		s := d.volume.Stats()
		d.log.Info("volume closed", zap.Uint64("bytes_read", s.BytesRead), zap.Uint64("bytes_written", s.BytesWritten), zap.Error(err))
	}()

	listeners, err := d.listen(ctx)
	if err != nil {
		return err
	}
	for _, l := range listeners {
		clients.Go(func() {
			err := d.server.ServeListener(clientCtx, l)
			switch {
			case err == nil, clientCtx.Err() != nil:
			case d.opts.attach != "":
				// What is mounted by the kernel goes on without it.
				d.log.Error("no client can connect any more: a restart or reload listens again", zap.Stringer("socket", l.Addr()), zap.Error(err))
			default:
				failed <- fmt.Errorf("listening on %s: %w", l.Addr(), err)
			}
		})
	}
	if d.opts.attach != "" {
		k, err = d.attachKernel(serveCtx, &serving)
		if d.gone {
			d.log.Info("stopping, as the kernel device was detached while there was no server")
			return nil
		}
		d.pushState()
		if err != nil {
			return err
		}
		d.keepConnected(serveCtx, k, failed)
		d.waitUdev(ctx, k.index)
	}

	size, _ := d.volume.Size()
	d.served = true
	d.mu.Lock()
	d.left.TabLine = os.Getenv(tabEnv)
	d.mu.Unlock()
	d.pushState()
	if d.goesOn {
		go d.readFilesAgain()
	}
	if d.link != nil {
		// The keeper replaces this server whatever it ends by. All goroutines are more
		// than a socket takes in at once whose reader waits for this very volume.
		debug.SetTraceback("single")
	}
	d.setState(stateServing, "")
	d.log.Info("volume is ready",
		zap.String("device", d.opts.device), zap.Int64("size", size), zap.Int("sector_size", d.volume.SectorSize()),
		zap.String("listen", d.opts.listen), zap.String("tcp", d.tcp), zap.String("attached", d.attached), zap.Bool("read_only", d.volume.ReadOnly()),
		zap.String("cipher", d.volume.Implementation()), zap.String("key_memory", d.volume.SecretMemory()))
	d.notify(systemd.Ready, systemd.Status("serving %d bytes", size), deviceState+d.attached)
	if err := d.link.send(keeperMessage{Ready: true}, nil); err != nil {
		d.log.Warn("the keeper was not told that this server serves", zap.Error(err))
	}

	select {
	case <-ctx.Done():
		d.log.Info("stopping on a signal")
		d.warnLastKey()
	case <-d.link.leaving():
		for _, l := range listeners {
			if u, ok := l.(*net.UnixListener); ok {
				u.SetUnlinkOnClose(false) // the next server goes on with it
			}
		}
		k.stopKeeping() // from here on that is the next server's matter
		return d.leaveVolume(stopClients, stopServing, &clients, &serving)
	case claimed = <-d.detach:
		d.log.Info("stopping on request")
		return nil
	case err = <-failed:
		if err == nil {
			d.log.Info("stopping, as the kernel device was detached by another program")
			err = k.close()
			k = nil
			return err
		}
		d.log.Error("stopping, as a connection has failed", zap.Error(err))
	}
	if k != nil {
		var attached bool
		if claimed, attached = d.waitUnused(k, failed); !attached {
			d.log.Info("the kernel device was detached by another program")
			err = errors.Join(err, k.close())
			k = nil
		}
	}
	return err
}

var errStopping = fmt.Errorf("server is stopping: %w", syscall.ESHUTDOWN)

func (d *daemon) setState(state, why string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.state, d.stateErr = state, why
}

// notify tells systemd; that it can't be told is no reason to stop serving.
func (d *daemon) notify(states ...string) {
	notify := func() error { return notifyManager(states...) }
	if d.link != nil {
		// The service manager listens to its own child only.
		notify = func() error { return d.link.send(keeperMessage{Notify: states}, nil) }
	}
	if err := notify(); err != nil {
		d.log.Warn("service manager was not notified", zap.Error(err))
	}
}
