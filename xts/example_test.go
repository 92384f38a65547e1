package xts_test

import (
	"bytes"
	"fmt"
	"syscall"

	"hostcryptd/xts"
)

// Two sectors of 4096 bytes that are at 1 MiB on the disk, encrypted in place as
// one request and read back one by one.
func Example() {
	var key [64]byte // two independent AES-256 keys, from a random generator
	for i := range key {
		key[i] = byte(i)
	}
	c, err := xts.NewCipher(&key)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer c.Wipe()

	const sectorSize = 4096
	first := uint64(1<<20) / 512 // in units of 512 bytes whatever the sector size
	buf := bytes.Repeat([]byte("disk"), 2*sectorSize/4)
	c.EncryptSectors(buf, buf, first, sectorSize)
	fmt.Printf("%x\n", buf[:8])

	c.DecryptSectors(buf[:sectorSize], buf[:sectorSize], first, sectorSize)
	c.DecryptSectors(buf[sectorSize:], buf[sectorSize:], first+8, sectorSize)
	fmt.Printf("%s %s\n", buf[:8], buf[sectorSize:][:8])
	// Output:
	// 36ebea72148c3bda
	// diskdisk diskdisk
}

// Key schedules in memory of the caller's choice. Programs use memory that
// is also locked and left out of dumps.
func ExampleNewCipherIn() {
	mem, err := syscall.Mmap(-1, 0, xts.Size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer syscall.Munmap(mem) // after Wipe

	key := [64]byte{0: 1} // from a random generator
	c, err := xts.NewCipherIn(mem, &key)
	clear(key[:]) // not needed any more
	if err != nil {
		fmt.Println(err)
		return
	}
	buf := make([]byte, 512)
	c.EncryptSectors(buf, buf, 0, 512)
	c.Wipe()
	fmt.Println(bytes.Count(mem, []byte{0}) == len(mem))
	// Output: true
}
