# limit: 300
# A second disk comes and goes ten times while the guest runs; each time it is written and read.
image first.img 16
image second.img 16
guest swaps "$(disk xvda /scratch/first.img)" <<'JOB'
wait_disk xvda
round=1
while [ $round -le 10 ]; do
    wait_disk xvdb
    yes "round $round" | head -c 1048576 >/tmp/pattern
    dd if=/tmp/pattern of=/dev/xvdb bs=64k oflag=direct
    sync
    dd if=/dev/xvdb of=/tmp/back bs=64k count=16 iflag=direct
    cmp /tmp/pattern /tmp/back
    rm /tmp/back
    echo "RESULT done $round"
    while [ -b /dev/xvdb ]; do sleep 0.1; done
    round=$((round + 1))
done
JOB
for round in 1 2 3 4 5 6 7 8 9 10; do
    xl block-attach swaps "$(disk xvdb /scratch/second.img)"
    wait_line swaps "^RESULT done $round\$" 120
    xl block-detach swaps xvdb
    equal "the image in round $round" "$(head -c 1048576 second.img | md5)" "$(yes "round $round" | head -c 1M | md5)"
done
wait_guest swaps 120
