# shellcheck shell=sh
# What an initramfs does with the volumes of /etc/hostcrypttab, whoever made it:
# initramfs-tools and dracut each have a script that reads this file.
#
# The table in the initramfs has only the lines that this one needs. A line with
# the option
#
#   x-initrd.attach  is attached before the root file system is mounted, and
#                    stays attached until the power is off
#   x-kdump.attach   is attached by the kernel that runs after a crash, and the
#                    dump is written to it
#   _netdev          waits for the network first

hostcryptd_tab=${hostcryptd_tab:-/etc/hostcrypttab}

# hostcryptd_names OPTION: the names of the volumes whose line has the option.
hostcryptd_names() {
	[ -r "$hostcryptd_tab" ] || return 0
	while read -r name _device _key options _rest || [ -n "$name" ]; do
		case $name in '' | '#'*) continue ;; esac
		case ",$options," in *",$1,"*) echo "$name" ;; esac
	done <"$hostcryptd_tab"
}

# hostcryptd_has NAME OPTION: whether a line has the option, with a value or without.
hostcryptd_has() ( # in a process of its own: who reads this file has variables too
	[ -r "$hostcryptd_tab" ] || exit 1
	while read -r name _device _key options _rest || [ -n "$name" ]; do
		[ "$name" = "$1" ] || continue
		case ",$options," in *",$2"[,=]*) exit 0 ;; esac
	done <"$hostcryptd_tab"
	exit 1
)

# hostcryptd_device NAME: the path of its backing device, as the table here has it.
hostcryptd_device() {
	[ -r "$hostcryptd_tab" ] || return 0
	while read -r name device _rest || [ -n "$name" ]; do
		[ "$name" != "$1" ] || printf '%s\n' "$device"
	done <"$hostcryptd_tab"
}

# hostcryptd_attach NAME [FLAG...]: prints the kernel device when the volume is
# ready. As long as a vault can't be reached, that is not before it can.
hostcryptd_attach() {
	modprobe -q nbd || true
	hostcryptd serve "$@" --initrd
}

# hostcryptd_say TEXT: on the console, also when that is quiet.
hostcryptd_say() {
	read -r uptime _ </proc/uptime
	echo "hostcryptd: $* ($uptime s after the start of this kernel)" >/dev/console
	echo "<4>hostcryptd: $*" >/dev/kmsg
}

# hostcryptd_dump writes the memory of the kernel that crashed to the volume with
# the option x-kdump.attach, and boots anew. It doesn't return: what can't be
# written encrypted isn't written.
#
# The volume has a file system, and gets the dump as a file, or nothing at all, and
# gets it from its first byte. Both are written with O_DIRECT: this kernel has too
# little memory for pages that wait for the server that is to encrypt them.
hostcryptd_dump() {
	for hostcryptd_name in $(hostcryptd_names x-kdump.attach); do
		if hostcryptd_dump_to "$hostcryptd_name"; then
			hostcryptd_say "the dump is on volume $hostcryptd_name"
			break
		fi
		hostcryptd_say "no dump on volume $hostcryptd_name"
	done
	sync
	reboot -f
	sleep 10 # it takes a moment; or there is nobody here who does it
	echo b >/proc/sysrq-trigger
	sleep 60
}

hostcryptd_dump_to() {
	# A machine that has crashed is to run again, with a dump or without.
	if hostcryptd_has "$1" timeout; then
		dev=$(hostcryptd_attach "$1")
	else
		dev=$(hostcryptd_attach "$1" --unseal-timeout 5m)
	fi || return 1
	written=0
	hostcryptd_write "$1" "$dev" || written=1
	# Also after a failure: keys are wiped, and the next volume may be tried.
	hostcryptd detach "$dev" && return $written
}

# hostcryptd_write NAME DEVICE
hostcryptd_write() {
	type=$(blkid -p -o value -s TYPE "$2")
	case $?:$type in
	2:)
		# blkid says this of a device that it can't read, too.
		if ! /usr/lib/hostcryptd/dd "if=$2" of=/dev/null bs=1M count=1 iflag=direct 2>/dev/null; then
			hostcryptd_say "volume $1 can't be read"
			return 1
		fi
		hostcryptd_copy "$2"
		;;
	0:?*)
		dir=/run/hostcryptd-dump
		mkdir -p "$dir"
		modprobe -q "$type" || true
		mount -t "$type" "$2" "$dir" || return 1
		stamp=$(date -u +%Y%m%d%H%M%S)
		copied=0
		{ mkdir -p "$dir/$stamp" && hostcryptd_copy "$dir/$stamp/dump.$stamp"; } || copied=1
		umount "$dir" && return $copied
		;;
	*)
		hostcryptd_say "volume $1 is neither empty nor one file system, but has a partition table or more than one signature: it is left as it is"
		return 1
		;;
	esac
}

# hostcryptd_copy FILE
hostcryptd_copy() {
	hostcryptd_say "writing the dump to $1; $(grep MemAvailable /proc/meminfo)"
	rc=/run/hostcryptd-dump.rc
	echo 1 >$rc
	if [ -x /sbin/makedumpfile ] || [ -x /usr/sbin/makedumpfile ] || [ -x /usr/bin/makedumpfile ] || [ -x /bin/makedumpfile ]; then
		# shellcheck disable=SC2086 # words
		{ makedumpfile -F ${MAKEDUMP_ARGS:--c -d 31 --message-level 6} /proc/vmcore && echo 0 >$rc; }
	else
		cat /proc/vmcore && echo 0 >$rc
	fi | /usr/lib/hostcryptd/dd "of=$1" bs=1M iflag=fullblock oflag=direct conv=fsync && [ "$(cat $rc)" = 0 ]
}

# hostcryptd_resolver writes the name servers that the kernel's or ipconfig's
# configuration has found, for whoever asks a vault.
hostcryptd_resolver() {
	[ ! -s /etc/resolv.conf ] || return 0
	for conf in /run/net-*.conf /run/net6-*.conf; do
		[ -r "$conf" ] || continue
		(
			IPV4DNS0='' IPV4DNS1='' IPV6DNS0='' IPV6DNS1='' DNSDOMAIN=''
			# shellcheck disable=SC1090
			. "$conf"
			[ -z "$DNSDOMAIN" ] || echo "search $DNSDOMAIN"
			for dns in "$IPV4DNS0" "$IPV4DNS1" "$IPV6DNS0" "$IPV6DNS1"; do
				case $dns in '' | 0.0.0.0 | ::) ;; *) echo "nameserver $dns" ;; esac
			done
		)
	done >/etc/resolv.conf
}
