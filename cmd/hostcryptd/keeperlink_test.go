package main

import (
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"
)

// TestKeeperGone: when the keeper has died the server is another process's child. That
// is not taken for the keeper, whose end detach would wait for.
func TestKeeperGone(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := packetConn(os.NewFile(uintptr(pair[0]), "keeper"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	link := &keeperLink{conn: conn, pid: os.Getppid(), leave: make(chan struct{})}
	d := &daemon{log: zap.NewNop(), link: link, attached: "/dev/nbd0", opts: serveOptions{swap: true}}
	const none = "the keeper has died"
	show := func() (keeper int, text string, problem bool) {
		t.Helper()
		// As the commands get it.
		b, err := json.Marshal(d.status())
		if err != nil {
			t.Fatal(err)
		}
		var s status
		if err := json.Unmarshal(b, &s); err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		s.print(&out)
		return s.Keeper, out.String(), slices.ContainsFunc(s.Swap.Problems, func(p string) bool { return strings.HasPrefix(p, none) })
	}
	if keeper, text, problem := show(); keeper != os.Getppid() || strings.Contains(text, "NONE") || problem {
		t.Errorf("with a keeper, that is process %d, said to be missing: %v\n%s", keeper, problem, text)
	}
	unix.Close(pair[1])
	link.listen(zap.NewNop()) // until there is nobody to listen to
	if keeper, text, problem := show(); keeper != 0 || !strings.Contains(text, "keeper:    NONE") || !problem {
		t.Errorf("without a keeper, that is process %d, said to be missing: %v\n%s", keeper, problem, text)
	}
}

// TestKeeperLeftBehind: a server that is still there after it has left doesn't take the
// end of its link for the keeper's death. One that dies before is missed.
func TestKeeperLeftBehind(t *testing.T) {
	for _, left := range []bool{false, true} {
		conn, keeper := unixPair(t, unix.SOCK_SEQPACKET)
		link := &keeperLink{conn: conn, pid: os.Getppid(), leave: make(chan struct{})}
		if err := sendPacket(keeper, keeperOrder{Leave: true}, nil); err != nil {
			t.Fatal(err)
		}
		if left {
			if err := link.send(keeperMessage{Left: true}, nil); err != nil {
				t.Fatal(err)
			}
		}
		keeper.Close()
		core, logs := observer.New(zap.ErrorLevel)
		link.listen(zap.New(core))
		if got, want := logs.FilterMessageSnippet("the keeper has died").Len(), 1; (got == want) == left || link.keeper() != 0 {
			t.Errorf("left: %v: said %d times that the keeper has died; it is %d", left, got, link.keeper())
		}
	}
}
