package sector

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctlPtr is ioctl(2) with a pointer to two integers, the range that the
// block ioctls take (include/uapi/linux/fs.h).
func ioctlPtr(fd uintptr, request uint, arg *[2]uint64) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, uintptr(request), uintptr(unsafe.Pointer(arg)))
	if errno != 0 {
		return errno
	}
	return nil
}
