#!/bin/bash
# dracut module: puts hostcryptd, the lines of /etc/hostcrypttab that are for an
# initramfs, and what those need, into it. In one that is for the kernel after a
# crash (kdump-utils', kdump-tools', or any with HOSTCRYPTD_KDUMP=1 in dracut's
# environment) those are other lines.

# shellcheck disable=SC2154 # of dracut: moddir, initdir, hostonly, add_dracutmodules, dracut_args, dracutbasedir, DRACUT_TMPDIR

_hostcryptd_option() {
	if [[ -n ${HOSTCRYPTD_KDUMP-} || " ${add_dracutmodules-} " == *" kdumpbase "* ||
		" ${dracut_args[*]-} " == *" --add-confdir kdump-tools "* ]]; then
		echo x-kdump.attach
	else
		echo x-initrd.attach
	fi
}

# _hostcryptd lines|devices|modules|network|files
_hostcryptd() {
	hostcryptd initramfs "$1" "$(_hostcryptd_option)"
}

# _hostcryptd_fail TEXT ends dracut: without this module the next boot has no root. The
# initramfs that is there stays.
_hostcryptd_fail() {
	dfatal "hostcryptd: $*"
	exit 1
}

# _hostcryptd_below PATH...: the folders in sysfs of block devices, and of those below.
_hostcryptd_below() {
	local dir
	for dir; do
		[[ -e $dir ]] || continue
		dir=$(readlink -f "$dir")
		[[ ! -e $dir/partition ]] || dir=${dir%/*}
		echo "$dir"
		_hostcryptd_below "$dir"/slaves/*
	done
}

# _hostcryptd_stack: those of the volumes.
_hostcryptd_stack() {
	local device
	while read -r device; do
		[[ ! -b $device ]] || _hostcryptd_below "/sys/class/block/$(basename "$(readlink -f "$device")")"
	done < <(_hostcryptd devices)
}

check() {
	local lines
	require_binaries hostcryptd || return 1
	lines=$(_hostcryptd lines 2>&1) || _hostcryptd_fail "${lines#hostcryptd: }"
	[[ -n $lines ]] || return 255
	# A module whose dependency isn't there is left out, and that is all.
	if [[ -n $(_hostcryptd network) ]] && ! compgen -G "$dracutbasedir/modules.d/[0-9][0-9]network" >/dev/null; then
		_hostcryptd_fail "a line has _netdev, and dracut's module network isn't installed (Debian package dracut-network)"
	fi
}

# dracut looks at what the root is on, which is an NBD device, and not below that.
depends() {
	local dir
	echo base
	while read -r dir; do
		[[ ! -d $dir/md ]] || echo mdraid
		[[ -r $dir/dm/uuid ]] || continue
		case $(<"$dir/dm/uuid") in
		LVM-*) echo lvm ;;
		*mpath-*) echo multipath ;;
		CRYPT-*) echo crypt ;;
		esac
	done < <(_hostcryptd_stack) | sort -u
	if [[ -n $(_hostcryptd network) ]]; then
		echo network
	fi
}

cmdline() {
	if [[ -n $(_hostcryptd network) ]]; then
		printf ' rd.neednet=1'
	fi
}

installkernel() {
	hostonly='' instmods nbd
	# shellcheck disable=SC2046 # words
	hostonly='' instmods -o tpm_crb tpm_tis $(_hostcryptd modules)
	local dir
	while read -r dir; do
		# shellcheck disable=SC2046 # words
		[[ ! -b /dev/${dir##*/} ]] || instmods $(get_dev_module "/dev/${dir##*/}")
	done < <(_hostcryptd_stack)
	if [[ $(_hostcryptd_option) == x-kdump.attach ]]; then
		hostonly='' instmods -o ext4 xfs
	fi
}

install() {
	local file files said failed=
	inst_multiple hostcryptd modprobe
	inst_simple /usr/lib/hostcryptd/initrd.sh
	inst_rules 90-hostcryptd.rules
	inst_hook cmdline 60 "$moddir/hostcryptd-cmdline.sh"
	inst_hook initqueue/settled 60 "$moddir/hostcryptd.sh"
	inst_hook initqueue/online 60 "$moddir/hostcryptd-online.sh"
	inst_hook initqueue/finished 60 "$moddir/hostcryptd-finished.sh"
	_hostcryptd lines >"$initdir/etc/hostcrypttab" || _hostcryptd_fail "the table can't be written"
	chmod 600 "$initdir/etc/hostcrypttab"
	said=$DRACUT_TMPDIR/hostcryptd.said
	files=$(_hostcryptd files 2>"$said") || failed=1
	while read -r file; do
		case $file in
		"W: "*) dwarn "${file#W: }" ;;
		*) derror "$file" ;;
		esac
	done <"$said"
	[[ -z $failed ]] || _hostcryptd_fail "no initramfs is made without what it needs"
	while read -r file; do
		[[ -z $file ]] || inst_simple "$file" || _hostcryptd_fail "$file is not there"
	done <<<"$files"
	if [[ -n $(_hostcryptd network) ]]; then
		cmdline >"$initdir/etc/cmdline.d/60hostcryptd.conf"
	fi
	if [[ $(_hostcryptd_option) == x-kdump.attach ]]; then
		inst_multiple blkid date mkdir mount umount reboot sync sleep cat grep
		inst_multiple -o makedumpfile
		inst_simple "$(command -v dd)" /usr/lib/hostcryptd/dd
	fi
	dracut_need_initqueue
}
