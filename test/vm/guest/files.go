package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"hostcryptd/test/vm/evidence"
	"hostcryptd/test/vm/vmtest"
)

// A manifest says what was written to a volume: file names below the root of
// the file system, and their SHA-256 in hex. On the state disk it has the
// form of sha256sum.
type manifest map[string]string

const canaryName = "canary.txt"

func (m *machine) manifestPath() string { return filepath.Join(m.state, vmtest.Sums) }

func (m *machine) recoveryKey() string { return filepath.Join(m.state, "recovery.key") }

// fill copies the payload and the canary to the mounted file system and
// unmounts it. It records what must be there from now on: the sums that came
// with the payload, made where it was packed.
func (m *machine) fill() error {
	if m.canary == "" {
		return errors.New("no canary was given")
	}
	begun := time.Now()
	m.typed("echo", m.canary, ">", filepath.Join(m.mnt, canaryName))
	size, err := write(m.mnt, canaryName, strings.NewReader(m.canary+"\n"))
	if err != nil {
		return err
	}
	n, sums, err := m.unpack()
	if err != nil {
		return err
	}
	size += n
	// The time includes the write-back, which is where the volume works.
	if err := m.unmount(); err != nil {
		return err
	}
	took := time.Since(begun)
	sums[canaryName] = fmt.Sprintf("%x", sha256.Sum256([]byte(m.canary+"\n")))
	if err := os.WriteFile(m.manifestPath(), sums.format(), 0o600); err != nil {
		return fmt.Errorf("recording what was written: %w", err)
	}
	m.output(fmt.Sprintf("%d files, %.1f MB", len(sums), float64(size)/1e6))
	m.figure("files", float64(len(sums)), "")
	m.figure("bytes", float64(size), "")
	m.figure("write", float64(size)/1e6/took.Seconds(), "MB/s")
	return nil
}

// unpack extracts the payload to the folder files.
func (m *machine) unpack() (bytes int64, sums manifest, err error) {
	src, err := os.Open(m.payload)
	if err != nil {
		return 0, nil, fmt.Errorf("opening the payload: %w", err)
	}
	defer src.Close()
	dir := filepath.Join(m.mnt, "files")
	m.typed("mkdir", dir, "&&", "tar", "-C", dir, "-xf", m.payload)
	begun := time.Now()
	for r := tar.NewReader(src); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return 0, nil, fmt.Errorf("reading the payload: %w", err)
		}
		if h.Name == vmtest.Sums {
			if sums, err = parseManifest(r, "files"); err != nil {
				return 0, nil, fmt.Errorf("reading the sums of the payload: %w", err)
			}
			continue
		}
		n, err := write(dir, h.Name, r)
		if err != nil {
			return 0, nil, err
		}
		bytes += n
	}
	if len(sums) == 0 {
		return 0, nil, fmt.Errorf("the payload has no %s", vmtest.Sums)
	}
	m.exited(0, begun)
	return bytes, sums, nil
}

func write(root, name string, r io.Reader) (n int64, err error) {
	full := filepath.Join(root, name)
	if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
		return 0, err
	}
	f, err := os.Create(full)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if n, err = io.Copy(f, r); err != nil {
		return n, fmt.Errorf("writing %s: %w", full, err)
	}
	return n, nil
}

// parseManifest reads lines "sum  name". The names are below dir.
func parseManifest(r io.Reader, dir string) (manifest, error) {
	man := manifest{}
	s := bufio.NewScanner(r)
	for s.Scan() {
		sum, name, ok := strings.Cut(s.Text(), "  ")
		if !ok || len(sum) != hex.EncodedLen(sha256.Size) {
			return nil, fmt.Errorf("not the form of sha256sum: %q", s.Text())
		}
		man[filepath.Join(dir, name)] = sum
	}
	return man, s.Err()
}

func (man manifest) format() []byte {
	var b bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(man)) {
		fmt.Fprintf(&b, "%s  %s\n", man[name], name)
	}
	return b.Bytes()
}

// verify reads every file of the mounted file system, and finds that it has
// exactly the files that fill recorded, byte for byte. The file system must
// have been mounted anew since they were written, or it shows the page cache.
func (m *machine) verify() error {
	f, err := os.Open(m.manifestPath())
	if err != nil {
		return fmt.Errorf("reading what was written: %w", err)
	}
	defer f.Close()
	man, err := parseManifest(f, "")
	if err != nil {
		return fmt.Errorf("reading what was written: %w", err)
	}
	m.typed("cd", m.mnt, "&&", "sha256sum", "--check", "--quiet", m.manifestPath())
	begun := time.Now()
	found, bytes, err := man.compare(m.mnt)
	if err == nil && (found != len(man) || found == 0) {
		err = fmt.Errorf("%d of %d files are there", found, len(man))
	}
	if err != nil {
		return fmt.Errorf("verifying the files: %w", err)
	}
	m.exited(0, begun)
	m.output(fmt.Sprintf("all %d files unchanged, %.1f MB", found, float64(bytes)/1e6))
	m.figure("files", float64(found), "")
	m.figure("bytes", float64(bytes), "")
	m.figure("read", float64(bytes)/1e6/time.Since(begun).Seconds(), "MB/s")
	return nil
}

// compare hashes every file below root and returns how many there are and
// their size. It stops at the first that differs from the manifest.
func (man manifest) compare(root string) (found int, bytes int64, err error) {
	var (
		names   = make(chan string)
		workers sync.WaitGroup
		mu      sync.Mutex // guards the results
	)
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for name := range names {
				n, err2 := man.check(root, name)
				mu.Lock()
				found++
				bytes += n
				err = errors.Join(err, err2)
				mu.Unlock()
			}
		})
	}
	walkErr := filepath.WalkDir(root, func(path string, d fs.DirEntry, err2 error) error {
		if err2 != nil || !d.Type().IsRegular() {
			return err2
		}
		name, err2 := filepath.Rel(root, path)
		if err2 != nil {
			return err2
		}
		mu.Lock()
		stop := err != nil
		mu.Unlock()
		if stop {
			return fs.SkipAll
		}
		names <- name
		return nil
	})
	close(names)
	workers.Wait()
	return found, bytes, errors.Join(walkErr, err)
}

func (man manifest) check(root, name string) (int64, error) {
	want, ok := man[name]
	if !ok {
		return 0, fmt.Errorf("%s was never written", name)
	}
	f, err := os.Open(filepath.Join(root, name))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	sum := sha256.New()
	n, err := io.Copy(sum, f)
	if err != nil {
		return n, err
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != want {
		return n, fmt.Errorf("%s has changed: sha256 %s, want %s", name, got, want)
	}
	return n, nil
}

// find looks for the canary on a device or in a file, up to the first place.
func (m *machine) find(path string) (found bool, err error) {
	m.typed("grep", "--text", "--byte-offset", "--only-matching", "--max-count=1", m.canary, path)
	begun := time.Now()
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	extents, err := evidence.Extents(f, 0)
	if err != nil {
		return false, err
	}
	off, err := evidence.Find(f, extents, []byte(m.canary))
	if err != nil {
		return false, err
	}
	if off < 0 {
		m.exited(1, begun)
		return false, nil
	}
	m.output(fmt.Sprintf("%d:%s", off, m.canary))
	m.exited(0, begun)
	return true, nil
}
