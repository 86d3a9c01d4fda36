# backends: xbd
# limit: 300
# The contract of the XenStore client, against xenstored: over its socket, and through the kernel's device
# as in a driver domain.
cd /payload
for store in /run/xenstored/socket /dev/xen/xenbus; do
    XBD_TEST_XENSTORE=$store python3 -P -m pytest -p no:cacheprovider -q \
        tests/xenstore/test_store_contract_real.py
done
