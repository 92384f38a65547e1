#!/bin/bash
# dracut module: puts hostcryptd, the lines of /etc/hostcrypttab that are for an
# initramfs, and what those need, into it. In one that is for the kernel after a
# crash (kdump-utils', or any with HOSTCRYPTD_KDUMP=1 in dracut's environment)
# those are other lines.

# shellcheck disable=SC2154 # of dracut: moddir, initdir, hostonly, add_dracutmodules

_hostcryptd_option() {
	if [[ -n ${HOSTCRYPTD_KDUMP-} || " ${add_dracutmodules-} " == *" kdumpbase "* ]]; then
		echo x-kdump.attach
	else
		echo x-initrd.attach
	fi
}

_hostcryptd_lines() {
	/usr/sbin/hostcryptd initrd-lines "$@" "$(_hostcryptd_option)"
}

check() {
	require_binaries hostcryptd || return 1
	[[ -n $(_hostcryptd_lines) ]] || return 255
}

depends() {
	echo base
	if [[ $(_hostcryptd_lines) == *_netdev* ]]; then
		echo network
	fi
}

cmdline() {
	if [[ $(_hostcryptd_lines) == *_netdev* ]]; then
		printf ' rd.neednet=1'
	fi
}

installkernel() {
	hostonly='' instmods nbd
	hostonly='' instmods -o tpm_crb tpm_tis
	local device
	while read -r device; do
		if [[ -b $device ]]; then
			# shellcheck disable=SC2046 # words
			instmods $(get_dev_module "$device")
		fi
	done < <(_hostcryptd_lines --devices)
	if [[ $(_hostcryptd_option) == x-kdump.attach ]]; then
		hostonly='' instmods -o ext4 xfs
	fi
}

install() {
	local file
	inst_multiple hostcryptd modprobe
	inst_simple /usr/lib/hostcryptd/initrd.sh
	inst_rules 90-hostcryptd.rules
	inst_hook cmdline 60 "$moddir/hostcryptd-cmdline.sh"
	inst_hook initqueue/settled 60 "$moddir/hostcryptd.sh"
	inst_hook initqueue/online 60 "$moddir/hostcryptd-online.sh"
	inst_hook initqueue/finished 60 "$moddir/hostcryptd-finished.sh"
	_hostcryptd_lines >"$initdir/etc/hostcrypttab"
	chmod 600 "$initdir/etc/hostcrypttab"
	while read -r file; do
		inst_simple "$file"
	done < <(_hostcryptd_lines --files)
	if [[ $(_hostcryptd_lines) == *_netdev* ]]; then
		cmdline >"$initdir/etc/cmdline.d/60hostcryptd.conf"
	fi
	if [[ $(_hostcryptd_option) == x-kdump.attach ]]; then
		inst_multiple blkid date mkdir mount umount reboot sync sleep cat grep
		inst_multiple -o makedumpfile
		inst_simple "$(command -v dd)" /usr/lib/hostcryptd/dd
	fi
	dracut_need_initqueue
}
