package vmtest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// A moduleTree is what depmod wrote about the modules of one kernel.
type moduleTree struct {
	dir     string              // holds modules.dep
	path    map[string]string   // module name to path below dir
	deps    map[string][]string // module name to the names it needs, all of them, last one first to load
	builtin map[string]bool
	pre     map[string][]string // soft dependencies: loaded before, if they exist
}

// moduleName is the name that the kernel and the tools agree on: of the file
// name, what is in front of ".ko", with underscores.
func moduleName(path string) string {
	name, _, _ := strings.Cut(filepath.Base(path), ".")
	return strings.ReplaceAll(name, "-", "_")
}

func openModules(dir string) (*moduleTree, error) {
	m := &moduleTree{
		dir:     dir,
		path:    map[string]string{},
		deps:    map[string][]string{},
		builtin: map[string]bool{},
		pre:     map[string][]string{},
	}
	// "kernel/fs/a.ko: kernel/lib/b.ko kernel/lib/c.ko"
	err := eachLine(filepath.Join(dir, "modules.dep"), func(line string) error {
		path, deps, ok := strings.Cut(line, ":")
		if !ok {
			return fmt.Errorf("no colon in %q", line)
		}
		name := moduleName(path)
		m.path[name] = path
		for _, d := range strings.Fields(deps) {
			m.deps[name] = append(m.deps[name], moduleName(d))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	err = eachLine(filepath.Join(dir, "modules.builtin"), func(line string) error {
		m.builtin[moduleName(line)] = true
		return nil
	})
	if err != nil {
		return nil, err
	}
	// "softdep xts pre: ecb post: other"
	err = eachLine(filepath.Join(dir, "modules.softdep"), func(line string) error {
		f := strings.Fields(line)
		if len(f) < 3 || f[0] != "softdep" {
			return nil // a comment
		}
		name := moduleName(f[1])
		pre := false
		for _, w := range f[2:] {
			switch {
			case strings.HasSuffix(w, ":"):
				pre = w == "pre:"
			case pre:
				m.pre[name] = append(m.pre[name], moduleName(w))
			}
		}
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		err = nil // a kernel without soft dependencies
	}
	return m, err
}

func eachLine(path string, do func(line string) error) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("vmtest: reading the module index: %w", err)
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		if err := do(s.Text()); err != nil {
			return fmt.Errorf("vmtest: reading %s: %w", path, err)
		}
	}
	if err := s.Err(); err != nil {
		return fmt.Errorf("vmtest: reading %s: %w", path, err)
	}
	return nil
}

// order returns the paths below m.dir of the modules and of everything they
// need, in an order in which they can be loaded one by one. A name that is
// built into the kernel adds nothing. A name that does not exist is an
// error, unless only a soft dependency asks for it: those may be aliases.
func (m *moduleTree) order(names ...string) ([]string, error) {
	var (
		list []string
		done = map[string]bool{}
		add  func(name string)
	)
	add = func(name string) {
		if done[name] || m.path[name] == "" {
			return
		}
		done[name] = true // before the recursion: soft dependencies may be circular
		for _, d := range m.pre[name] {
			add(d)
		}
		for _, d := range slices.Backward(m.deps[name]) {
			add(d)
		}
		list = append(list, m.path[name])
	}
	for _, n := range names {
		n = moduleName(n)
		if m.path[n] == "" && !m.builtin[n] {
			return nil, fmt.Errorf("vmtest: module %s is neither in %s nor built in", n, m.dir)
		}
		add(n)
	}
	return list, nil
}

// read returns the uncompressed module at a path that order returned.
func (m *moduleTree) read(ctx context.Context, path string) ([]byte, error) {
	full := filepath.Join(m.dir, path)
	switch filepath.Ext(path) {
	case ".xz":
		return Run(ctx, "", "xz", "-dc", full)
	case ".zst":
		return Run(ctx, "", "zstd", "-dcq", full)
	case ".ko":
		return os.ReadFile(full)
	}
	return nil, fmt.Errorf("vmtest: module %s is compressed in a way that isn't known here", path)
}
