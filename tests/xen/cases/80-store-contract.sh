# backends: xbd
# limit: 300
# The contract of the XenStore client, against xenstored.
cd /payload
XBD_TEST_XENSTORE=/run/xenstored/socket python3 -P -m pytest -p no:cacheprovider -q \
    tests/xenstore/test_store_contract_real.py
