#!/bin/sh
# dracut hook, run again and again until the devices for the root are there:
# attaches the volumes that the root file system needs; in the kernel that runs
# after a crash it writes the dump instead.

. /usr/lib/hostcryptd/initrd.sh

# hostcryptd_reachable NAME: whether the device is there, and the network, if the volume
# waits for that. Both come by other scripts, which run between two runs of this one.
hostcryptd_reachable() {
	[ -e "$(hostcryptd_device "$1")" ] || return 1
	! hostcryptd_has "$1" _netdev || [ -e /run/hostcryptd-online ]
}

if [ -e /proc/vmcore ] && [ -n "$(hostcryptd_names x-kdump.attach)" ]; then
	hostcryptd_wait=
	for hostcryptd_name in $(hostcryptd_names x-kdump.attach); do
		hostcryptd_reachable "$hostcryptd_name" || hostcryptd_wait=1
	done
	# dracut stops for a person after 180 s (rd.retry=) at the earliest. Without the
	# network a volume may still open, by another key; if none does, that ends too.
	read -r hostcryptd_uptime _ </proc/uptime
	if [ -z "$hostcryptd_wait" ] || [ "${hostcryptd_uptime%.*}" -ge 150 ]; then
		hostcryptd_dump
	fi
else
	for hostcryptd_name in $(hostcryptd_names x-initrd.attach); do
		if [ ! -e "/run/hostcryptd/initrd/$hostcryptd_name" ] && hostcryptd_reachable "$hostcryptd_name"; then
			hostcryptd_attach "$hostcryptd_name" >/dev/null
		fi
	done
fi
