package nbdnl

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/genetlink/genltest"
	"github.com/mdlayher/netlink"
	"github.com/mdlayher/netlink/nltest"
	"golang.org/x/sys/unix"
)

const testFamily = 0x21

// A kernel stands for the driver: it has the answers, and notes the requests.
type kernel struct {
	t      *testing.T
	answer func(genetlink.Message) ([]genetlink.Message, error)
	got    []genetlink.Message
	flags  []netlink.HeaderFlags
}

func (k *kernel) dial() *Conn {
	k.t.Helper()
	c, err := newConn(genltest.Dial(genltest.ServeFamily(
		genetlink.Family{ID: testFamily, Version: 1, Name: "nbd"},
		func(g genetlink.Message, n netlink.Message) ([]genetlink.Message, error) {
			if n.Header.Type != testFamily {
				k.t.Errorf("message to family %#x, want %#x", n.Header.Type, testFamily)
			}
			k.got = append(k.got, g)
			k.flags = append(k.flags, n.Header.Flags)
			return k.answer(g)
		})))
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() {
		if err := c.Close(); err != nil {
			k.t.Error(err)
		}
	})
	return c
}

func errno(n unix.Errno) func(genetlink.Message) ([]genetlink.Message, error) {
	return func(genetlink.Message) ([]genetlink.Message, error) { return nil, genltest.Error(int(n)) }
}

func attrs(as ...netlink.Attribute) []byte { return nltest.MustMarshalAttributes(as) }

func u32(typ uint16, v uint32) netlink.Attribute {
	return netlink.Attribute{Type: typ, Data: binary.NativeEndian.AppendUint32(nil, v)}
}

func u64(typ uint16, v uint64) netlink.Attribute {
	return netlink.Attribute{Type: typ, Data: binary.NativeEndian.AppendUint64(nil, v)}
}

func str(typ uint16, v string) netlink.Attribute {
	return netlink.Attribute{Type: typ, Data: append([]byte(v), 0)}
}

func nested(typ uint16, as ...netlink.Attribute) netlink.Attribute {
	return netlink.Attribute{Type: typ | netlink.Nested, Data: attrs(as...)}
}

// reply is an answer with attributes. Nested attributes of the driver don't
// have the nested flag.
func reply(cmd uint8, as ...netlink.Attribute) func(genetlink.Message) ([]genetlink.Message, error) {
	return func(genetlink.Message) ([]genetlink.Message, error) {
		return []genetlink.Message{{Header: genetlink.Header{Command: cmd, Version: 0}, Data: attrs(as...)}}, nil
	}
}

// files returns n descriptors that are good enough to have a number.
func files(t *testing.T, n int) (fs []*os.File, fds []uint32) {
	t.Helper()
	for range n {
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		rc, err := f.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		if err := rc.Control(func(fd uintptr) { fds = append(fds, uint32(fd)) }); err != nil {
			t.Fatal(err)
		}
		fs = append(fs, f)
	}
	return fs, fds
}

// TestConnect checks the request bit by bit against numbers written out here,
// as linux/nbd-netlink.h has them.
func TestConnect(t *testing.T) {
	socks, fds := files(t, 3)
	for _, tt := range []struct {
		name  string
		cfg   Config
		socks int
		want  []netlink.Attribute
		index int
	}{
		{
			name:  "least",
			cfg:   Config{Index: FirstFree, Size: 1 << 30, BlockSize: 512},
			socks: 1,
			want: []netlink.Attribute{
				u64(2, 1<<30), u64(3, 512), u64(5, 0),
				nested(7, nested(1, u32(1, fds[0]))),
			},
			index: 5,
		},
		{
			name: "most",
			cfg: Config{
				Index: 0, Size: math.MaxInt64 &^ 4095, BlockSize: 4096, ServerFlags: 0x16d,
				Timeout: 90 * time.Second, DeadConnTimeout: 1500 * time.Millisecond, Backend: "volume 1",
			},
			socks: 3,
			want: []netlink.Attribute{
				u32(1, 0), u64(2, math.MaxInt64&^4095), u64(3, 4096), u64(4, 90), u64(5, 0x16d), u64(8, 2), str(10, "volume 1"),
				nested(7, nested(1, u32(1, fds[0])), nested(1, u32(1, fds[1])), nested(1, u32(1, fds[2]))),
			},
			index: 0,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k := &kernel{t: t, answer: reply(1, u32(1, uint32(tt.index)))}
			index, err := k.dial().Connect(tt.cfg, socks[:tt.socks]...)
			if err != nil || index != tt.index {
				t.Fatalf("Connect() = %d, %v; want %d", index, err, tt.index)
			}
			want := []genetlink.Message{{Header: genetlink.Header{Command: 1, Version: 1}, Data: attrs(tt.want...)}}
			if diff := cmp.Diff(want, k.got); diff != "" {
				t.Errorf("request (-want +got):\n%s", diff)
			}
			// With an acknowledgement there would be two answers, and the
			// second would be taken for that to the next request.
			if k.flags[0] != netlink.Request {
				t.Errorf("flags %v, want %v", k.flags[0], netlink.Request)
			}
		})
	}
}

// TestConnectExcept: the lowest device that is free and not another's, also when it is
// taken just now.
func TestConnectExcept(t *testing.T) {
	defer func(old string) { sysBlock = old }(sysBlock)
	sysBlock = t.TempDir()
	if err := errors.Join(os.Mkdir(filepath.Join(sysBlock, "nbd1"), 0o755), os.WriteFile(filepath.Join(sysBlock, "nbd1", "pid"), nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	socks, _ := files(t, 1)
	var asked []uint32
	k := &kernel{t: t, answer: func(m genetlink.Message) ([]genetlink.Message, error) {
		d, err := netlink.NewAttributeDecoder(m.Data)
		if err != nil || !d.Next() || d.Type() != 1 {
			t.Fatalf("no index in %v: %v", m, err)
		}
		index := d.Uint32()
		asked = append(asked, index)
		if index < 4 {
			return errno(unix.EBUSY)(m)
		}
		return reply(1, u32(1, index))(m)
	}}
	index, err := k.dial().Connect(Config{Index: FirstFree, Except: []int{0, 3, 9}, Size: 8192, BlockSize: 4096}, socks...)
	if err != nil || index != 4 || !slices.Equal(asked, []uint32{2, 4}) {
		t.Errorf("Connect() = %d, %v, asked for %d; want 4, after 2", index, err, asked)
	}
	k = &kernel{t: t, answer: errno(unix.EPERM)}
	if _, err := k.dial().Connect(Config{Index: FirstFree, Except: []int{0}, Size: 8192, BlockSize: 4096}, socks...); !errors.Is(err, fs.ErrPermission) || len(k.got) != 1 {
		t.Errorf("an error that is not about the device: %v, after %d requests", err, len(k.got))
	}
}

func TestConnectRefuses(t *testing.T) {
	socks, _ := files(t, 2)
	good := Config{Index: 3, Size: 8192, BlockSize: 4096, ServerFlags: 1}
	closed, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	for _, tt := range []struct {
		name   string
		change func(*Config)
		socks  []*os.File
	}{
		{"no sockets", func(*Config) {}, nil},
		{"closed socket", func(*Config) {}, []*os.File{closed}},
		{"two sockets without CAN_MULTI_CONN", func(*Config) {}, socks},
		{"size 0", func(c *Config) { c.Size = 0 }, socks[:1]},
		{"size that is no multiple", func(c *Config) { c.Size = 8192 + 512 }, socks[:1]},
		{"size beyond int64", func(c *Config) { c.Size = 1 << 63 }, socks[:1]},
		{"block size 0", func(c *Config) { c.BlockSize = 0 }, socks[:1]},
		{"block size 256", func(c *Config) { c.BlockSize = 256 }, socks[:1]},
		{"block size 1536", func(c *Config) { c.BlockSize = 1536 }, socks[:1]},
		{"index -2", func(c *Config) { c.Index = -2 }, socks[:1]},
		{"index beyond int32", func(c *Config) { c.Index = 1 << 32 }, socks[:1]},
		{"negative timeout", func(c *Config) { c.Timeout = -1 }, socks[:1]},
		{"negative dead connection timeout", func(c *Config) { c.DeadConnTimeout = -1 }, socks[:1]},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k := &kernel{t: t, answer: reply(1, u32(1, 3))}
			cfg := good
			tt.change(&cfg)
			if index, err := k.dial().Connect(cfg, tt.socks...); err == nil || len(k.got) != 0 {
				t.Errorf("Connect() = %d, %v; kernel got %d messages, want an error and none", index, err, len(k.got))
			}
		})
	}
}

func TestErrors(t *testing.T) {
	socks, _ := files(t, 1)
	calls := map[string]func(*Conn) error{
		"Connect": func(c *Conn) error {
			_, err := c.Connect(Config{Index: 4, Size: 512, BlockSize: 512}, socks...)
			return err
		},
		"Reconfigure": func(c *Conn) error { return c.Reconfigure(4, "", socks...) },
		"Resize":      func(c *Conn) error { return c.Resize(4, "", 512) },
		"Disconnect":  func(c *Conn) error { return c.Disconnect(4) },
		"Status":      func(c *Conn) error { _, err := c.Status(4); return err },
	}
	for _, tt := range []struct {
		errno unix.Errno
		want  error
		hint  string
	}{
		{unix.EBUSY, ErrBusy, "in use"},
		{unix.EEXIST, ErrBusy, "in use"},
		{unix.EPERM, fs.ErrPermission, "CAP_SYS_ADMIN"},
		{unix.EINVAL, unix.EINVAL, "invalid argument"},
	} {
		for name, call := range calls {
			k := &kernel{t: t, answer: errno(tt.errno)}
			err := call(k.dial())
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.hint) || !strings.Contains(err.Error(), "/dev/nbd4") {
				t.Errorf("%s when the kernel says %v: %v; want %v, %q and the device", name, tt.errno, err, tt.want, tt.hint)
			}
		}
	}
}

func TestConnectBadAnswers(t *testing.T) {
	socks, _ := files(t, 1)
	for name, answer := range map[string]func(genetlink.Message) ([]genetlink.Message, error){
		"no attributes":   reply(1),
		"other attribute": reply(1, u64(2, 1)),
		"short index":     reply(1, netlink.Attribute{Type: 1, Data: []byte{1}}),
		"garbage": func(genetlink.Message) ([]genetlink.Message, error) {
			return []genetlink.Message{{Data: []byte{0xff, 0xff, 1, 0}}}, nil
		},
	} {
		k := &kernel{t: t, answer: answer}
		if index, err := k.dial().Connect(Config{Size: 512, BlockSize: 512}, socks...); err == nil {
			t.Errorf("%s: Connect() = %d, want an error", name, index)
		}
	}
}

// TestReconfigure: sockets and, if there is one, the backend; never a size.
func TestReconfigure(t *testing.T) {
	socks, fds := files(t, 2)
	ack := func(genetlink.Message) ([]genetlink.Message, error) { return nil, genltest.Error(0) }
	k := &kernel{t: t, answer: ack}
	c := k.dial()
	if err := c.Reconfigure(7, "volume 1", socks...); err != nil {
		t.Error(err)
	}
	if err := c.Reconfigure(7, "", socks[0]); err != nil {
		t.Error(err)
	}
	want := []genetlink.Message{
		{Header: genetlink.Header{Command: 3, Version: 1}, Data: attrs(
			u32(1, 7), str(10, "volume 1"), nested(7, nested(1, u32(1, fds[0])), nested(1, u32(1, fds[1]))))},
		{Header: genetlink.Header{Command: 3, Version: 1}, Data: attrs(
			u32(1, 7), nested(7, nested(1, u32(1, fds[0]))))},
	}
	if diff := cmp.Diff(want, k.got); diff != "" {
		t.Errorf("requests (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]netlink.HeaderFlags{netlink.Request | netlink.Acknowledge, netlink.Request | netlink.Acknowledge}, k.flags); diff != "" {
		t.Errorf("flags (-want +got):\n%s", diff)
	}
	if err := c.Reconfigure(7, ""); err == nil {
		t.Error("Reconfigure() without sockets succeeded")
	}
}

// TestResize: a size and, if there is one, the backend; never a block size, which
// would change with it, nor sockets.
func TestResize(t *testing.T) {
	k := &kernel{t: t, answer: func(genetlink.Message) ([]genetlink.Message, error) { return nil, genltest.Error(0) }}
	c := k.dial()
	if err := c.Resize(7, "volume 1", 3<<30); err != nil {
		t.Error(err)
	}
	if err := c.Resize(0, "", 512); err != nil {
		t.Error(err)
	}
	want := []genetlink.Message{
		{Header: genetlink.Header{Command: 3, Version: 1}, Data: attrs(u32(1, 7), u64(2, 3<<30), str(10, "volume 1"))},
		{Header: genetlink.Header{Command: 3, Version: 1}, Data: attrs(u32(1, 0), u64(2, 512))},
	}
	if diff := cmp.Diff(want, k.got); diff != "" {
		t.Errorf("requests (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]netlink.HeaderFlags{netlink.Request | netlink.Acknowledge, netlink.Request | netlink.Acknowledge}, k.flags); diff != "" {
		t.Errorf("flags (-want +got):\n%s", diff)
	}
	for _, size := range []uint64{0, 1 << 63} {
		if err := c.Resize(7, "", size); err == nil || len(k.got) != 2 {
			t.Errorf("Resize() to %d = %v; the kernel got %d messages", size, err, len(k.got)-2)
		}
	}
}

// TestDetachOnClose: the flag and the backend; never a size.
func TestDetachOnClose(t *testing.T) {
	k := &kernel{t: t, answer: func(genetlink.Message) ([]genetlink.Message, error) { return nil, genltest.Error(0) }}
	c := k.dial()
	var want []genetlink.Message
	for on, flags := range map[bool]uint64{true: 2, false: 0} {
		if err := c.DetachOnClose(7, "volume 1", on); err != nil {
			t.Error(err)
		}
		want = append(want, genetlink.Message{Header: genetlink.Header{Command: 3, Version: 1}, Data: attrs(u32(1, 7), str(10, "volume 1"), u64(6, flags))})
	}
	if diff := cmp.Diff(want, k.got); diff != "" {
		t.Errorf("requests (-want +got):\n%s", diff)
	}
}

func TestDisconnect(t *testing.T) {
	k := &kernel{t: t, answer: func(genetlink.Message) ([]genetlink.Message, error) { return nil, genltest.Error(0) }}
	if err := k.dial().Disconnect(15); err != nil {
		t.Error(err)
	}
	want := []genetlink.Message{{Header: genetlink.Header{Command: 2, Version: 1}, Data: attrs(u32(1, 15))}}
	if diff := cmp.Diff(want, k.got); diff != "" {
		t.Errorf("request (-want +got):\n%s", diff)
	}
	if k.flags[0] != netlink.Request|netlink.Acknowledge {
		t.Errorf("flags %v", k.flags[0])
	}
}

// device is an entry of a device list as the driver writes it.
func device(index uint32, connected byte) netlink.Attribute {
	return netlink.Attribute{Type: 1, Data: attrs(u32(1, index), netlink.Attribute{Type: 2, Data: []byte{connected}})}
}

func TestStatus(t *testing.T) {
	list := func(as ...netlink.Attribute) netlink.Attribute { return netlink.Attribute{Type: 9, Data: attrs(as...)} }
	k := &kernel{t: t, answer: reply(5, list(device(2, 0), device(3, 1)))}
	c := k.dial()
	for index, want := range map[int]Status{2: {Index: 2}, 3: {Index: 3, Connected: true}} {
		if got, err := c.Status(index); got != want || err != nil {
			t.Errorf("Status(%d) = %+v, %v; want %+v", index, got, err, want)
		}
	}
	if _, err := c.Status(4); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Status of a device that isn't there: %v, want %v", err, fs.ErrNotExist)
	}
	k.answer = reply(5, list())
	if _, err := c.Status(2); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Status of a device that isn't there: %v, want %v", err, fs.ErrNotExist)
	}
	want := genetlink.Message{Header: genetlink.Header{Command: 5, Version: 1}, Data: attrs(u32(1, 4))}
	if diff := cmp.Diff(want, k.got[2]); diff != "" {
		t.Errorf("request (-want +got):\n%s", diff)
	}
	if k.flags[0] != netlink.Request {
		t.Errorf("flags %v", k.flags[0])
	}
	for name, bad := range map[string]netlink.Attribute{
		"list":   {Type: 9, Data: []byte{1, 2, 3, 4}},
		"device": list(netlink.Attribute{Type: 1, Data: []byte{200, 0, 1, 0}}),
		"index":  list(netlink.Attribute{Type: 1, Data: attrs(netlink.Attribute{Type: 1, Data: []byte{1}})}),
	} {
		k.answer = reply(5, bad)
		if s, err := c.Status(0); err == nil {
			t.Errorf("malformed %s: Status() = %+v, want an error", name, s)
		}
	}
}

func TestNotSupported(t *testing.T) {
	_, err := newConn(genltest.Dial(func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
		return nil, genltest.Error(int(unix.ENOENT))
	}))
	if !errors.Is(err, ErrNotSupported) || !strings.Contains(err.Error(), "modprobe nbd") {
		t.Errorf("newConn() without the family: %v, want %v", err, ErrNotSupported)
	}
	_, err = newConn(genltest.Dial(func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
		return nil, genltest.Error(int(unix.EPERM))
	}))
	if err == nil || errors.Is(err, ErrNotSupported) {
		t.Errorf("newConn() when the lookup is denied: %v, want another error than %v", err, ErrNotSupported)
	}
}

// TestThisKernel speaks to the kernel that runs the test: either it has the
// driver or Dial says that it has not.
func TestThisKernel(t *testing.T) {
	_, statErr := os.Stat("/sys/module/nbd")
	c, err := Dial()
	if statErr != nil && err != nil {
		if !errors.Is(err, ErrNotSupported) {
			t.Errorf("Dial() without the module: %v, want %v", err, ErrNotSupported)
		}
		return
	}
	if err != nil {
		t.Fatalf("Dial() with the module: %v", err)
	}
	defer c.Close()
	if _, err := c.Status(math.MaxInt32); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Status of a device that can't be: %v, want %v", err, fs.ErrNotExist)
	}
}

// FuzzAnswers: whatever the kernel sends is an answer or an error.
func FuzzAnswers(f *testing.F) {
	f.Add(attrs(u32(1, 7)))
	f.Add(attrs(netlink.Attribute{Type: 9, Data: attrs(device(1, 1), device(2, 0))}))
	f.Add([]byte{4, 0, 1, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		msgs := []genetlink.Message{{Data: b}}
		if index, err := parseIndex(msgs); err == nil && (index < 0 || index > math.MaxUint32) {
			t.Errorf("parseIndex(%x) = %d", b, index)
		}
		if _, err := parseStatus(msgs); err != nil {
			return
		}
	})
}
