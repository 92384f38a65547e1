package vmtest

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// TestFilesOverFiles checks that of two files or links with one name the later
// one is in the initramfs, whatever the earlier one was.
func TestFilesOverFiles(t *testing.T) {
	dir := t.TempDir()
	err := errors.Join(
		os.Mkdir(filepath.Join(dir, "sub"), 0o755),
		os.WriteFile(filepath.Join(dir, "sub", "tool"), []byte("t"), 0o755),
		os.Symlink("sub/tool", filepath.Join(dir, "link")),
	)
	if err != nil {
		t.Fatal(err)
	}
	tree, over := NewFiles(), NewFiles()
	if err := tree.addTree("/usr", dir); err != nil {
		t.Fatal(err)
	}
	if f := tree.files["usr/sub/tool"]; f.perm != 0o755 || f.host == "" || tree.links["usr/link"] != "sub/tool" {
		t.Errorf("a tree gave %+v and %v", tree.files, tree.links)
	}
	over.AddSymlink("/usr/sub/tool", "/dev/null")
	over.AddBytes("/usr/link", []byte("a file"), 0o600)

	im := NewFiles()
	im.addBelow(Overlay, tree)
	im.addBelow(Overlay, over)
	if _, ok := im.files["overlay/usr/sub/tool"]; ok || im.links["overlay/usr/sub/tool"] != "/dev/null" {
		t.Error("a link over a file: the file is still there")
	}
	if _, ok := im.links["overlay/usr/link"]; ok || string(im.files["overlay/usr/link"].data) != "a file" {
		t.Error("a file over a link: the link is still there")
	}
}
