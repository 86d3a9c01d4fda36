# backends: xbd
# limit: 600
# The daemon is killed three times while a guest's verified writes allocate clusters over a base, and started
# again: the guest sees no error, and at no time is the image damaged (clusters that nobody uses are none).
mkdir images
image images/base.img 96 random
xbd image create qcow2:/scratch/disk.qcow2 -b imagefile:images/base.img
check() { # WHEN: 3 is qemu-img's status for leaked clusters and nothing else
    code=0
    qemu-img check -U disk.qcow2 || code=$?
    [ $code = 0 ] || [ $code = 3 ] || fail "the image is damaged $1"
}
guest survives vcpus=2 "$(disk_target xvda qcow2:/scratch/disk.qcow2)" <<'JOB'
wait_disk xvda
round=0
while [ $round -lt 3 ]; do
    echo "RESULT round $((round + 1))"
    fio --direct=1 --ioengine=libaio --iodepth=16 --bsrange=4k-64k --rw=randwrite --offset=$((round * 32))M --size=24M \
        --fsync=128 --verify=crc32c --verify_fatal=1 --do_verify=1 --name=round --filename=/dev/xvda
    round=$((round + 1))
done
echo "RESULT md5 $(md5sum /dev/xvda | cut -d' ' -f1)"
JOB
for round in 1 2 3; do
    wait_line survives "^RESULT round $round" 120
    sleep 2     # fio has to start
    kill_daemon
    check "after death $round"
    start_daemon || fail "the daemon does not start again"
done
wait_guest survives 120
equal "the number of jobs without an error" "$(console survives | grep -a -c 'err= 0')" 3
check "at the end"
qemu-img convert -O raw disk.qcow2 now.img
equal "the content in dom0" "$(md5 now.img)" "$(result survives md5)"
