#!/bin/sh
# dracut hook, run when the network is there.
: >/run/hostcryptd-online
