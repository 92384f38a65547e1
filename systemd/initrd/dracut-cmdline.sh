#!/bin/sh
# dracut hook, run when the kernel's command line is parsed: after a crash no root
# file system is needed.
. /usr/lib/hostcryptd/initrd.sh
if [ -e /proc/vmcore ] && [ -n "$(hostcryptd_names x-kdump.attach)" ]; then
	# shellcheck disable=SC2034 # dracut reads them
	root=hostcryptd rootok=1
fi
