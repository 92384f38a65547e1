#!/bin/sh
# dracut hook: tells whether there is nothing left to wait for.
. /usr/lib/hostcryptd/initrd.sh
hostcryptd_missing=
for hostcryptd_name in $(hostcryptd_names x-initrd.attach) $(hostcryptd_names x-kdump.attach); do
	[ -e "/run/hostcryptd/initrd/$hostcryptd_name" ] || hostcryptd_missing=1
done
[ -z "$hostcryptd_missing" ]
