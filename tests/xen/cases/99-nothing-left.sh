# After all that, dom0 is as it was: no domain, grant, event channel, store node, loop device, open file
# more than at the start. And the kernel's own backend is still loaded.
as_before() { traces 2>/dev/null | diff /host/out/traces-before -; }
within 20 as_before || fail "something is left behind"
[ "$SUITE-$BACKEND" = bookworm-xbd ] || lsmod | grep -q xen_blkback || fail "xen-blkback is not loaded"
