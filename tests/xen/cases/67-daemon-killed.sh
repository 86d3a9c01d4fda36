# backends: xbd
# limit: 480
# The daemon is killed four times in the middle of a guest's verified writes, and started again: the guest
# waits and goes on, without an error.
image disk.img 64
guest survives vcpus=2 "$(disk xvda /scratch/disk.img)" <<'JOB'
wait_disk xvda
round=1
while [ $round -le 4 ]; do
    echo "RESULT round $round"
    fio --direct=1 --ioengine=libaio --iodepth=16 --bsrange=4k-64k --rw=randwrite --size=24M --fsync=128 \
        --verify=crc32c --verify_fatal=1 --do_verify=1 --name=round --filename=/dev/xvda
    round=$((round + 1))
done
echo "RESULT md5 $(md5sum /dev/xvda | cut -d' ' -f1)"
JOB
for round in 1 2 3 4; do
    wait_line survives "^RESULT round $round" 120
    sleep 2     # fio has to start
    kill_daemon
    start_daemon || fail "the daemon does not start again"
done
wait_guest survives 120
equal "the number of jobs without an error" "$(console survives | grep -a -c 'err= 0')" 4
equal "the content in dom0" "$(md5 disk.img)" "$(result survives md5)"
