package keyunseal

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"
)

// ChildMain is the whole program of a child: it serves the one request on its
// standard input and returns the exit status. It's 0 when the parent has got a
// verdict, good or bad.
func ChildMain() int { return childMain(nil) }

// childMain is ChildMain with a transport, which only tests have.
func childMain(rt http.RoundTripper) int {
	hardenProcess()
	log := zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(zapcore.EncoderConfig{
		LevelKey: "level", MessageKey: "msg", LineEnding: "\n",
		EncodeLevel: zapcore.LowercaseLevelEncoder, EncodeTime: zapcore.RFC3339TimeEncoder,
	}), zapcore.Lock(os.Stderr), zapcore.InfoLevel))

	v := &verdict{Version: protocolVersion}
	if err := serveRequest(rt, log, v); err != nil {
		v.Error = newWireError(err)
	}
	out, err := json.Marshal(v)
	if err == nil {
		_, err = os.Stdout.Write(out)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "writing the verdict:", err)
		return 1
	}
	return 0
}

// serveRequest does what was asked for and puts the answer into v.
func serveRequest(rt http.RoundTripper, log *zap.Logger, v *verdict) error {
	in, err := io.ReadAll(io.LimitReader(os.Stdin, maxMessage+1))
	if err != nil {
		return fail("child", "", ClassInternal, err)
	}
	var req request
	if err := json.Unmarshal(in, &req); err != nil {
		return fail("child", "", ClassInternal, fmt.Errorf("reading the request: %w", err))
	}
	if req.Version != protocolVersion {
		return fail("child", "", ClassInternal, fmt.Errorf("the request has protocol version %d, this program knows %d", req.Version, protocolVersion))
	}
	var pipe *os.File
	if req.Op != opProbe && req.Op != opInspect && req.Op != opSign {
		if pipe = os.NewFile(keyFD, "volume key pipe"); pipe == nil {
			return fail("child", "", ClassInternal, errors.New("there is no pipe for the volume key; this argument isn't for use by hand"))
		}
		defer pipe.Close()
	}

	ctx, cancel := context.WithTimeout(context.Background(), req.Timeout)
	defer cancel()
	opts := req.Options
	opts.Log, opts.Transport = log, rt
	opts.Observe = func(x Exchange) {
		if len(v.Exchanges) < maxExchanges {
			v.Exchanges = append(v.Exchanges, x)
		}
	}
	var key [KeySize]byte
	defer clear(key[:])
	switch req.Op {
	case opSeal, opRewrap:
		if _, err = io.ReadFull(pipe, key[:]); err != nil {
			return fail("child", "", ClassInternal, fmt.Errorf("reading the volume key: %w", err))
		}
		if req.Op == opSeal {
			v.Token, err = Seal(ctx, opts, req.Spec, req.Volume, &key)
		} else {
			v.Token, err = Rewrap(ctx, opts, req.Token, req.Volume, &key)
		}
		return err
	case opUnseal:
		if err := Unseal(ctx, opts, req.Token, req.Volume, &key); err != nil {
			return err
		}
		if _, err := pipe.Write(key[:]); err != nil {
			return fail("child", "", ClassInternal, fmt.Errorf("handing over the volume key: %w", err))
		}
		return nil
	case opProbe:
		return Probe(ctx, opts, req.Token, req.Volume)
	case opInspect:
		s, err := Inspect(ctx, opts, req.Token, req.Volume)
		v.Status = &s
		return err
	case opSign:
		if len(req.Digest) != sha256.Size {
			return fail("child", "", ClassInternal, fmt.Errorf("the request has a digest of %d bytes", len(req.Digest)))
		}
		v.Signature, err = Sign(ctx, opts, req.Spec, req.Volume, [sha256.Size]byte(req.Digest))
		return err
	}
	return fail("child", "", ClassInternal, fmt.Errorf("unknown operation %q", req.Op))
}

// hardenProcess keeps the secrets that pass through this process out of core
// dumps, debuggers and swap. It's called before there is any. What the kernel
// refuses is left out: the volume must open in a container too.
func hardenProcess() {
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	_ = unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
	LockMemory()
}

// LockMemory keeps what a process holds that ends soon out of swap, where it may
// lock all of it: with CAP_IPC_LOCK, or without a limit, as in a service with
// LimitMEMLOCK=infinity. With a limit MCL_FUTURE makes later allocations of the Go
// runtime fail, and that ends the process.
func LockMemory() {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var (
		data  [2]unix.CapUserData
		limit unix.Rlimit
	)
	// What can't be read is zero: no capability, and nothing may be locked.
	_ = unix.Capget(&hdr, &data[0])
	_ = unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit)
	if mayLock(data[0].Effective, limit.Cur) {
		_ = unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT)
	}
}

// mayLock tells whether a process with these capabilities and this RLIMIT_MEMLOCK
// may lock all of its memory.
func mayLock(capabilities uint32, limit uint64) bool {
	return capabilities&(1<<unix.CAP_IPC_LOCK) != 0 || limit == unix.RLIM_INFINITY
}
