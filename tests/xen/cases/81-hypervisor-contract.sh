# backends: xbd
# limit: 300
# The contract of the hypervisor boundary, against Xen: dom0 grants pages and offers ports to itself.
cd /payload
XBD_TEST_XEN=1 python3 -P -m pytest -p no:cacheprovider -q --noconftest -o trio_mode=true \
    tests/hypervisor/test_xen_contract.py
