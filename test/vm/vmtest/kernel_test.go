package vmtest

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The played package tools keep their state in the folder $APT_PLAY: "lists"
// holds what the lists say the newest kernel is, "new-lists" what they say
// after an update, "gone" a release that can't be downloaded, "calls" what
// was called.
func aptPlay(name string) string {
	b, _ := os.ReadFile(filepath.Join(os.Getenv("APT_PLAY"), name))
	return string(b)
}

func aptCall(words ...string) error {
	f, err := os.OpenFile(filepath.Join(os.Getenv("APT_PLAY"), "calls"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(strings.Join(words, " ") + "\n")
	return err
}

func playAptCache(args []string) error {
	release := aptPlay("lists")
	if release == "" || args[1] != "linux-image-6.12-cloud-amd64" {
		return errors.New("E: No packages found")
	}
	_, err := os.Stdout.WriteString(args[1] + "\n  Depends: linux-image-" + release + "\n")
	return err
}

func playAptGet(args []string) error {
	if err := aptCall(args...); err != nil {
		return err
	}
	switch args[0] {
	case "update":
		lists := aptPlay("new-lists")
		if lists == "" {
			return errors.New("E: no network")
		}
		return os.WriteFile(filepath.Join(os.Getenv("APT_PLAY"), "lists"), []byte(lists), 0o644)
	case "download":
		release := strings.TrimPrefix(args[2], "linux-image-")
		if release == aptPlay("gone") {
			return errors.New("E: 404 Not Found")
		}
		return os.WriteFile(args[2]+"_amd64.deb", []byte(release), 0o644)
	}
	return errors.New("unknown command")
}

func playDpkgDeb(args []string) error {
	release, err := os.ReadFile(args[1])
	if err != nil {
		return err
	}
	return writeKernel(args[2], string(release))
}

// writeKernel makes the files that openKernel reads.
func writeKernel(tree, release string) error {
	modules := filepath.Join(tree, "lib", "modules", release)
	return errors.Join(
		os.MkdirAll(filepath.Join(tree, "boot"), 0o755),
		os.MkdirAll(modules, 0o755),
		os.WriteFile(filepath.Join(tree, "boot", "vmlinuz-"+release), nil, 0o644),
		os.WriteFile(filepath.Join(modules, "modules.dep"), nil, 0o644),
		os.WriteFile(filepath.Join(modules, "modules.builtin"), nil, 0o644),
	)
}

func TestFetchKernel(t *testing.T) {
	const (
		old    = "6.12.9+deb12-cloud-amd64"
		newer  = "6.12.117+deb12-cloud-amd64"
		newest = "6.12.118+deb12-cloud-amd64"
	)
	tests := []struct {
		name                  string
		cached                []string
		lists, newLists, gone string
		want                  string // "" if it must fail
		wantCalls             []string
	}{
		{name: "first run", lists: newer, want: newer, wantCalls: []string{"download -qq linux-image-" + newer}},
		{name: "in the cache", cached: []string{newer}, lists: newer, want: newer},
		{name: "security update", cached: []string{newer}, lists: newest, want: newest, wantCalls: []string{"download -qq linux-image-" + newest}},
		{name: "no lists, cached", cached: []string{newer, old}, want: newer},
		{name: "no lists", newLists: newer, want: newer, wantCalls: []string{"update -qq", "download -qq linux-image-" + newer}},
		{name: "lists too old", lists: newer, gone: newer, newLists: newest, want: newest,
			wantCalls: []string{"download -qq linux-image-" + newer, "update -qq", "download -qq linux-image-" + newest}},
		{name: "no network", lists: newer, gone: newer, wantCalls: []string{"download -qq linux-image-" + newer, "update -qq"}},
		{name: "no network, cached", cached: []string{old}, lists: newer, gone: newer, want: old,
			wantCalls: []string{"download -qq linux-image-" + newer, "update -qq"}},
		{name: "no such series", newLists: "5.10.1-cloud-amd64", wantCalls: []string{"update -qq"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			playTools(t)
			cache, play := t.TempDir(), t.TempDir()
			t.Setenv("HOSTCRYPTD_VM_CACHE", cache)
			t.Setenv("APT_PLAY", play)
			for _, release := range tt.cached {
				if err := writeKernel(filepath.Join(cache, "kernel", release), release); err != nil {
					t.Fatal(err)
				}
			}
			for name, text := range map[string]string{"lists": tt.lists, "new-lists": tt.newLists, "gone": tt.gone} {
				if err := os.WriteFile(filepath.Join(play, name), []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			// What a killed run left behind must not matter, nor stay.
			left := filepath.Join(cache, "kernel", "tmp-left")
			if err := os.MkdirAll(left, 0o755); err != nil {
				t.Fatal(err)
			}

			k, err := fetchKernel(t.Context(), "6.12", t.Logf)
			if tt.want == "" {
				if err == nil {
					t.Errorf("fetchKernel gave %s, want an error", k.Release)
				}
			} else if err != nil {
				t.Fatal(err)
			} else if k.Release != tt.want {
				t.Errorf("fetchKernel gave %s, want %s", k.Release, tt.want)
			} else if want := filepath.Join(cache, "kernel", tt.want, "boot", "vmlinuz-"+tt.want); k.Image != want {
				t.Errorf("image %s, want %s", k.Image, want)
			}
			if calls := strings.Split(strings.TrimSpace(aptPlay("calls")), "\n"); !slices.Equal(calls, strings.Split(strings.Join(tt.wantCalls, "\n"), "\n")) {
				t.Errorf("calls = %q, want %q", calls, tt.wantCalls)
			}
			if left, _ := filepath.Glob(filepath.Join(cache, "kernel", "tmp-*")); len(left) > 0 {
				t.Errorf("left in the cache: %q", left)
			}
		})
	}
}

func TestReleaseOf(t *testing.T) {
	const depends = "linux-image-6.12-cloud-amd64\n  Depends: linux-image-6.12.117+deb12-cloud-amd64\n  Conflicts: linux-image-6.12.1\n"
	if got, want := releaseOf(depends, "6.12"), "6.12.117+deb12-cloud-amd64"; got != want {
		t.Errorf("releaseOf = %q, want %q", got, want)
	}
	for _, series := range []string{"6.1", "5.10"} {
		if got := releaseOf(depends, series); got != "" {
			t.Errorf("releaseOf for series %s = %q, want none", series, got)
		}
	}
}
