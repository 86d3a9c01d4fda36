# limit: 300
# A guest is destroyed in the middle of its writes; its image serves the next guest at once.
image disk.img 64
guest load vcpus=2 "$(disk xvda /scratch/disk.img)" <<'JOB'
wait_disk xvda
fio --direct=1 --ioengine=libaio --iodepth=32 --bs=16k --rw=randwrite --time_based --runtime=600 \
    --name=load --filename=/dev/xvda >/dev/null &
sleep 2
echo "RESULT load running"
wait
JOB
wait_line load '^RESULT load' 90
directory=$(backend load)
xl destroy load
within 20 gone load || fail "the destroyed guest stays"
! xenstore-exists "$directory" || fail "$directory stays"
yes after | head -c 1048576 | dd of=disk.img bs=1M conv=notrunc iflag=fullblock status=none
guest next "$(disk xvda /scratch/disk.img)" <<'JOB'
wait_disk xvda
echo "RESULT md5 $(head -c 1048576 /dev/xvda | md5sum | cut -d' ' -f1)"
JOB
wait_guest next 120
equal "what the next guest reads" "$(result next md5)" "$(yes after | head -c 1048576 | md5)"
